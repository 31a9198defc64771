"""How ranks make sure of each other before data moves, and find out who is gone: through the group's key-value store.

A send and a receive of different sizes end a process from C++ (Gloo) or never return (NCCL), and a backend seldom knows
which rank failed. So every rank leaves what it is about to do in the store that ``torch.distributed`` was set up with,
and reads what the others left; who leaves nothing in time is lost, and is named.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any, NoReturn

import torch.distributed as dist


class RanksDisagree(RuntimeError):
    """Ranks are about to exchange different things; every rank raises this with the same text, before data moves."""


class RankLost(RuntimeError):
    """``ranks`` (numbers in the whole job) did not answer in time, or died."""

    def __init__(self, ranks: Sequence[int], message: str) -> None:
        super().__init__(message)
        self.ranks = tuple(ranks)


@dataclass(frozen=True)
class Intent:
    """What a rank is about to exchange: ``length`` rows of its own, the first of all ranks' rows at ``start``, in each
    of ``layers`` layers, whose tensors have these rows (shapes without length, and dtypes) and hold ``capacity``."""

    start: int
    length: int
    capacity: int
    layers: int
    rows: str
    strategy: str


SAME = ("start", "layers", "rows", "strategy")


def bounds_of(intents: Sequence[Intent], ranks: Sequence[int]) -> list[int]:
    """Where each rank's rows begin, in rank order, and where the last ones end: world + 1 numbers.

    RanksDisagree: ranks differ in what they must share, a length is negative, the rows do not fit into every cache, or a
    collective of unequal lengths, which not every backend can do.
    """

    def each(name: str) -> str:
        return ", ".join(f"rank {r} has {getattr(i, name)}" for r, i in zip(ranks, intents, strict=True))

    for name in SAME:
        if len({getattr(intent, name) for intent in intents}) > 1:
            raise RanksDisagree(f"{name}: {each(name)}")
    lengths = [intent.length for intent in intents]
    if min(lengths) < 0 or intents[0].start < 0:
        raise RanksDisagree(f"lengths are not negative, but start is {intents[0].start} and length: {each('length')}")
    bounds = [intents[0].start]
    for length in lengths:
        bounds.append(bounds[-1] + length)
    if bounds[-1] > min(intent.capacity for intent in intents):
        raise RanksDisagree(f"{bounds[-1]} rows do not fit: length: {each('length')}; max_length: {each('capacity')}")
    if intents[0].strategy == "collective" and len(set(lengths)) > 1:
        raise RanksDisagree(f"a collective needs equal lengths (use ring or pairwise): {each('length')}")
    return bounds


class Meeting:
    """Where the ranks of ``group`` meet: the n-th meeting made for a group is the same one on every rank, so all ranks
    must make theirs in the same order. ``timeout`` in seconds, longer than any rank computes between two meetings."""

    _made: dict[tuple[int, ...], int] = {}  # noqa: RUF012  (counts of this process, on purpose)

    def __init__(self, group: dist.ProcessGroup | None, timeout: float, store: dist.Store | None) -> None:
        self.ranks = tuple(dist.get_process_group_ranks(group or dist.group.WORLD))
        self.place = dist.get_rank(group)
        self.timeout = timeout
        number = self._made[self.ranks] = self._made.get(self.ranks, 0) + 1
        name = f"kv_sync/{'_'.join(map(str, self.ranks))}/{number}"
        self._store = dist.PrefixStore(name, store or dist.distributed_c10d._get_default_store())
        self._round = 0

    def agree(self, intent: Intent) -> list[int]:
        """Exchange intents and return ``bounds_of`` them. RankLost names who did not come."""
        self._round += 1
        intents = [Intent(**given) for given in self._meet(f"agree/{self._round}", asdict(intent), self.timeout)]
        if self._round > 1:  # everybody is past the last round, having come to this one
            self._store.delete_key(f"agree/{self._round - 1}/{self.place}")
        return bounds_of(intents, self.ranks)

    def lost(self, error: BaseException) -> NoReturn:
        """An exchange failed with ``error``: say that this rank lives, wait for the others to notice as much, and raise
        RankLost for those that don't; ``error`` itself if all live."""
        # the slowest survivor notices only when its own wait ends
        try:
            self._meet(f"lost/{self._round}", {}, self.timeout + 1)
        except RankLost as lost:
            raise lost from error
        raise error

    def _meet(self, key: str, given: dict[str, Any], timeout: float) -> list[dict[str, Any]]:
        """Leave ``given`` under ``key`` and return what every rank left there, in rank order."""
        keys = [f"{key}/{place}" for place in range(len(self.ranks))]
        deadline = time.monotonic() + timeout
        try:
            self._store.set(keys[self.place], json.dumps(given))
            for waited in keys:
                left = max(0.001, deadline - time.monotonic())
                try:
                    self._store.wait([waited], timedelta(seconds=left))
                except dist.DistStoreError:
                    break
            absent = [rank for rank, one in zip(self.ranks, keys, strict=True) if not self._store.check([one])]
            if absent:
                names = ", ".join(map(str, absent))
                raise RankLost(absent, f"rank {names} did not answer within {timeout:g} s ({key})")
            return [json.loads(self._store.get(one)) for one in keys]
        except dist.DistNetworkError as error:
            raise RankLost([0], "the store is gone, and with it rank 0 or the launcher that hosts it") from error
