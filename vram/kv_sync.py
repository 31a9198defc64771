"""Key/value caches that several ranks fill together: each has a piece of the length, and all end with all pieces.

``torch.distributed`` does the communication, on NCCL or Gloo; decided here is only what is sent, from where and when.
Pieces lie in rank order behind row ``start`` of every rank's buffers, and are sent from there and received there: nothing
is cloned, staged or packed. A layer's exchange runs while the next layer computes.

    sync = CacheSync(cache, strategy="ring")      # on every rank, in the same order
    sync.agree(len_of_my_rows)                    # once a step, for all layers; before data moves
    for layer in range(len(cache)):
        key, value = attention_inputs(layer)
        sync.put(layer, key, value)               # into this rank's place in the buffers
        exchanges.append(sync.start(layer))       # returns at once
        ...                                       # the next layer computes meanwhile
    exchanges[layer].wait()                       # before the first use of the others' rows

A layout in which a piece of the length is not contiguous is refused: ``layout="lbhd"`` always is.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from .kv_agree import Intent, Meeting, RankLost, RanksDisagree
from .kv_cache import ModelCache
from .kv_layouts import as_bytes, piece_is_contiguous

__all__ = ["CacheSync", "Exchange", "NotContiguous", "RankLost", "RanksDisagree", "Transfer", "rounds"]

# renamed in torch 2.13
all_gather_flat = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)

STRATEGIES = ("ring", "pairwise", "collective")
LOOK_SECONDS = 50e-6  # between two looks at whether a device is done


class NotContiguous(ValueError):
    """Pieces of a cache's length cannot be sent as they lie."""


@dataclass(frozen=True)
class Transfer:
    """Within one round, a rank sends the piece of rank ``sends`` to rank ``to`` and receives that of rank ``receives``
    from rank ``source``. Ranks are numbers in the group."""

    to: int
    sends: int
    source: int
    receives: int


def rounds(strategy: str, rank: int, world: int) -> list[list[Transfer]]:
    """What ``rank`` of ``world`` sends and receives, round by round; a round needs what the one before it brought.

    pairwise: one round, everybody's own piece to everybody, each rank beginning with another partner. ring: world - 1
    rounds, each passing on to the next rank what came from the one before.
    """
    if strategy == "pairwise":
        return [[Transfer((rank + d) % world, rank, (rank - d) % world, (rank - d) % world) for d in range(1, world)]]
    after, before = (rank + 1) % world, (rank - 1) % world
    return [[Transfer(after, (rank - s) % world, before, (rank - s - 1) % world)] for s in range(world - 1)]


class Exchange:
    """The exchange of one layer, under way."""

    def __init__(self, sync: CacheSync, layer: int, works: list[dist.Work], later: Future[None] | None) -> None:
        self.layer = layer
        self._sync, self._works, self._later = sync, works, later
        self._waited = False

    def wait(self, confirm: bool = False) -> None:
        """Until this returns, leave the other ranks' rows alone. After it, they are in the buffers and the cache's length
        counts them. On a GPU the host does not wait: what is queued on the current stream from now on comes after the
        exchange. ``confirm``: the host waits until it is done. RankLost if a rank died or hangs: always on Gloo, on NCCL
        with ``confirm`` (else the next ``agree`` finds out).
        """
        if not self._waited:
            self._sync._guarded(self._finish)
            self._sync._arrived(self)
            self._waited = True
        if confirm and self._sync.on_stream:
            self._sync._guarded(self._confirm)

    def _finish(self) -> None:
        if self._later is not None:
            self._later.result()
        for work in self._works:
            if self._sync.on_stream:
                work.wait()
            else:
                work.wait(timedelta(seconds=self._sync.timeout))

    def _confirm(self) -> None:
        deadline = time.monotonic() + self._sync.timeout
        while not all(work.is_completed() for work in self._works):
            if time.monotonic() > deadline:
                raise RuntimeError(f"the exchange of layer {self.layer} took longer than {self._sync.timeout:g} s")
            time.sleep(LOOK_SECONDS)


class CacheSync:
    """Exchanges pieces of the layers of a cache between the ranks of ``group`` (all ranks, if None).

    ``cache``: a ``ModelCache`` that neither grows nor rolls; or for each layer the tensors to exchange, all contiguous,
    with the length as dimension ``dim``. ``strategy``: ring, pairwise, or collective (one all-gather; equal lengths
    only; slow on Gloo). ``timeout`` in seconds: how long another rank may take; the group's own must be longer.
    All ranks make their CacheSync objects, agree, and start layers in the same order; on Gloo they also wait in that order.

    Raises NotContiguous for a layout that cannot be sent in place, ValueError for an unknown strategy. Once a rank is
    lost the group is of no more use: every later call raises the same RankLost, and on NCCL the group is aborted, so that
    kernels that wait for the lost rank end.
    """

    def __init__(
        self,
        cache: ModelCache | Sequence[Sequence[torch.Tensor]],
        group: dist.ProcessGroup | None = None,
        strategy: str = "ring",
        timeout: float = 30.0,
        *,
        dim: int = 0,
        store: dist.Store | None = None,
    ) -> None:
        if strategy not in STRATEGIES:
            raise ValueError(f"strategy {strategy!r} is none of {', '.join(STRATEGIES)}")
        self.cache = cache if isinstance(cache, ModelCache) else None
        if self.cache is not None:
            if self.cache.when_full != "error":
                raise ValueError(f"rows of a cache that may {self.cache.when_full} lie elsewhere on every rank")
            dim = self.cache.shape.length_dim
            cache = [[part for side in layer for part in (side.data, side.scales)] for layer in self.cache]
        self.buffers = [[as_bytes(part) for part in layer if part is not None] for layer in cache]
        self.group, self.strategy, self.timeout, self.dim = group, strategy, timeout, dim
        self._verify()
        self._meeting = Meeting(group, timeout, store)
        self.rank, self.world = self._meeting.place, len(self._meeting.ranks)
        self.device = self.buffers[0][0].device
        self.on_stream = self.device.type == "cuda" and "nccl" in str(dist.get_backend_config(group))
        self.bounds: list[int] | None = None
        self._rounds = rounds(strategy, self.rank, self.world)
        self._forwarder: ThreadPoolExecutor | None = None
        self._lost: RankLost | None = None
        self._open: set[Exchange] = set()

    def _verify(self) -> None:
        """Every piece of the length, of every tensor, is contiguous, and all hold the same."""
        for tensor in (tensor for layer in self.buffers for tensor in layer):
            if not piece_is_contiguous(tensor, self.dim):
                raise NotContiguous(
                    f"a cache tensor {list(tensor.shape)} with strides {list(tensor.stride())} cannot be sent in place: "
                    f"pieces of its length, dimension {self.dim}, are not contiguous. Make the cache with layout='lbhd'"
                )
            if tensor.shape[self.dim] != self.buffers[0][0].shape[self.dim]:
                raise ValueError("the tensors of a cache hold different lengths")

    def agree(self, own: int, start: int = 0) -> list[int]:
        """Say that this rank brings ``own`` rows, and that all ranks' rows begin at row ``start``; for all layers.

        Returns the bounds: rank r's rows are [bounds[r], bounds[r + 1]) of every buffer on every rank. RanksDisagree on
        all ranks where they cannot go on together, RankLost where one does not come within the timeout; RuntimeError
        while an exchange has not been waited for.
        """
        self._raise_if_lost()
        if self._open:
            raise RuntimeError(f"{len(self._open)} exchanges have not been waited for")
        first = self.buffers[0]
        rows = [f"{list(t.shape[: self.dim] + t.shape[self.dim + 1 :])} {t.dtype}" for t in first]
        intent = Intent(start, own, first[0].shape[self.dim], len(self.buffers), "; ".join(rows), self.strategy)
        self.bounds = None
        try:
            self.bounds = self._meeting.agree(intent)
        except RankLost as lost:
            self._give_up(lost)
        return self.bounds

    def piece(self, layer: int, rank: int | None = None) -> list[torch.Tensor]:
        """A rank's rows in the tensors of ``layer`` (this rank's if not given): views, to write own rows into."""
        bounds = self._agreed()
        rank = self.rank if rank is None else rank
        rows = bounds[rank + 1] - bounds[rank]
        return [tensor.narrow(self.dim, bounds[rank], rows) for tensor in self.buffers[layer]]

    def put(self, layer: int, *own: torch.Tensor) -> None:
        """Copy this rank's rows (key and value, say) into their place. ValueError for other shapes or dtypes."""
        bounds = self._agreed()
        if self.cache is not None:
            sides = self.cache[layer]
            if len(own) != len(sides):
                raise ValueError(f"a layer takes a key and a value, not {len(own)} tensors")
            count = bounds[self.rank + 1] - bounds[self.rank]
            for side, tensor in zip(sides, own, strict=True):
                if side.check_rows(tensor) != count:
                    raise ValueError(f"{side.check_rows(tensor)} rows where {count} were agreed on")
            for side, tensor in zip(sides, own, strict=True):
                side.place(tensor, bounds[self.rank])
            return
        pieces = self.piece(layer)
        if [(p.shape, p.dtype) for p in pieces] != [(t.shape, t.dtype) for t in own]:
            raise ValueError(
                f"layer {layer} takes {[list(p.shape) for p in pieces]}, not {[list(t.shape) for t in own]}"
            )
        for piece, tensor in zip(pieces, own, strict=True):
            piece.copy_(tensor, non_blocking=True)

    def start(self, layer: int) -> Exchange:
        """Begin the exchange of ``layer``, whose own rows are in place or queued on the current stream to be. Returns at
        once; NCCL runs it on a stream of its own. RuntimeError without ``agree``, RankLost if a rank is already gone."""
        self._agreed()
        exchange = self._guarded(lambda: self._start(layer))
        self._open.add(exchange)
        return exchange

    def sync(self, layers: Sequence[int] | None = None) -> None:
        """Exchange ``layers`` (all, if None) and wait until that is done."""
        exchanges = [self.start(layer) for layer in (range(len(self.buffers)) if layers is None else layers)]
        for exchange in exchanges:
            exchange.wait(confirm=True)

    def close(self) -> None:
        """End the thread that passes pieces on in a ring on Gloo, if there is one."""
        if self._forwarder is not None:
            self._forwarder.shutdown()
            self._forwarder = None

    def _start(self, layer: int) -> Exchange:
        if self.world == 1 or self.bounds[0] == self.bounds[-1]:
            return Exchange(self, layer, [], None)
        if self.strategy == "collective":
            return Exchange(self, layer, self._gather(layer), None)
        if self.on_stream:  # the stream keeps the rounds in order, so that all of them can be queued now
            works = [work for step in range(len(self._rounds)) for work in self._post(layer, step)]
            return Exchange(self, layer, works, None)
        works = self._post(layer, 0)
        if len(self._rounds) == 1:
            return Exchange(self, layer, works, None)
        if self._forwarder is None:
            self._forwarder = ThreadPoolExecutor(1, thread_name_prefix="intelligent-vram-ring")
        return Exchange(self, layer, [], self._forwarder.submit(self._pass_on, layer, works))

    def _gather(self, layer: int) -> list[dist.Work]:
        """One all-gather for each tensor, in place: the input is this rank's part of the output."""
        first, end = self.bounds[0], self.bounds[-1]
        own = self.piece(layer)
        return [
            all_gather_flat(
                tensor.narrow(self.dim, first, end - first).view(-1), piece.view(-1), self.group, async_op=True
            )
            for tensor, piece in zip(self.buffers[layer], own, strict=True)
        ]

    def _post(self, layer: int, step: int) -> list[dist.Work]:
        """Queue the sends and receives of one round. Both sides know the lengths, and leave out empty pieces."""
        ranks = self._meeting.ranks
        operations = []
        for transfer in self._rounds[step]:
            outgoing, incoming = self.piece(layer, transfer.sends), self.piece(layer, transfer.receives)
            for i, (out, into) in enumerate(zip(outgoing, incoming, strict=True)):
                # Gloo matches messages by tag, NCCL by order
                tag = 0 if self.on_stream else 1 + (layer * len(self._rounds) + step) * len(outgoing) + i
                if out.numel():
                    operations.append(dist.P2POp(dist.isend, out, ranks[transfer.to], self.group, tag))
                if into.numel():
                    operations.append(dist.P2POp(dist.irecv, into, ranks[transfer.source], self.group, tag))
        return dist.batch_isend_irecv(operations) if operations else []

    def _pass_on(self, layer: int, works: list[dist.Work]) -> None:
        """Finish a round and go through the others."""
        for step in range(1, len(self._rounds) + 1):
            for work in works:
                work.wait(timedelta(seconds=self.timeout))
            works = self._post(layer, step) if step < len(self._rounds) else []

    def _arrived(self, exchange: Exchange) -> None:
        """All ranks' rows of a layer are there."""
        self._open.discard(exchange)
        if self.cache is not None:
            for side in self.cache[exchange.layer]:
                side.set_length(self.bounds[-1])

    def _agreed(self) -> list[int]:
        self._raise_if_lost()
        if self.bounds is None:
            raise RuntimeError("the ranks have not agreed on lengths: call agree() first")
        return self.bounds

    def _guarded(self, do: Callable[[], Exchange | None]) -> Exchange | None:
        """``do()``; whatever fails in it, find out whether a rank is gone."""
        self._raise_if_lost()
        try:
            return do()
        except RuntimeError as error:
            try:
                self._meeting.lost(error)
            except RankLost as lost:
                self._give_up(lost)

    def _raise_if_lost(self) -> None:
        if self._lost is not None:
            raise self._lost

    def _give_up(self, lost: RankLost) -> None:
        self._lost = lost
        if self.on_stream:
            backend = (self.group or dist.group.WORLD)._get_backend(self.device)
            if hasattr(backend, "abort"):  # torch 2.6
                backend.abort()
        raise lost
