"""One budget of page-locked RAM for all models of the process.

Page-locked memory is memory that the system cannot use otherwise. What may be page-locked is what leaves the system 4 GiB
or 10% of its RAM, whichever is more, and what the system lets GPUs lock. When it is spent, the model that was used least
recently, and is not computing, gives back its page-locked memory first: its weights stay in RAM as ordinary memory, and
stream through the staging ring.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections import deque
from collections.abc import Callable
from typing import Protocol

import psutil

from .page_lock import most_page_locked
from .units import GIB, format_bytes

log = logging.getLogger(__name__)


def reserve(total: int) -> int:
    """Bytes of ``total`` bytes of RAM that are left to the system: 4 GiB or 10%, whichever is more."""
    return max(4 * GIB, total // 10)


def page_lockable(total: int, available: int) -> int:
    """Bytes of RAM that may be page-locked where ``available`` of ``total`` are free."""
    return max(0, available - reserve(total))


def ram() -> tuple[int, int]:
    """Bytes of RAM of this machine: all, and what is available without swapping."""
    host = psutil.virtual_memory()
    return host.total, host.available


class Holder(Protocol):
    """A model with page-locked memory. ``last_used``: larger for a later use."""

    last_used: int

    def give_back(self, nbytes: int) -> int:
        """Unlock at least ``nbytes``, as far as there are as many, and none while the model computes. Never waits for
        another thread's forward. Returns the bytes unlocked."""


class HostBudget:
    """Counts what is packed and page-locked in this process, in bytes. Thread-safe.

    ``limit``: the most that may be page-locked in all, whatever is free; None: what the system lets GPUs lock.
    ``ram``: returns (total, available) bytes of RAM.

    ``held`` is packed memory that was filled, page-locked or not; ``pending`` what was claimed and is not filled yet;
    ``locked`` what is page-locked or claimed for it.
    """

    def __init__(self, limit: int | None = None, ram: Callable[[], tuple[int, int]] = ram) -> None:
        self.limit = limit
        self.ram = ram
        self.lock = threading.RLock()
        self.locked = 0
        self.pending = 0
        self._held = 0
        self._gone: deque[int] = deque()
        self._uses = 0
        self._holders: weakref.WeakSet[Holder] = weakref.WeakSet()

    @property
    def held(self) -> int:
        """Bytes of packed memory in this process."""
        with self.lock:
            while self._gone:
                self._held -= self._gone.popleft()
            return self._held

    def quota(self) -> int:
        """Bytes that may be page-locked in all now, what is packed already counted in."""
        total, available = self.ram()
        limit = self.limit if self.limit is not None else most_page_locked(total)
        quota = page_lockable(total, available + self.held)
        return quota if limit is None else min(quota, limit)

    def add(self, holder: Holder) -> None:
        """``holder`` may be asked to give back, as long as it lives."""
        with self.lock:
            self._holders.add(holder)

    def use(self) -> int:
        """The number of a use, for ``Holder.last_used``."""
        with self.lock:
            self._uses += 1
            return self._uses

    def claim(
        self,
        nbytes: int,
        holder: Holder | None = None,
        *,
        new: bool,
        lock: bool = True,
        insist: bool = False,
        older_than: int | None = None,
    ) -> bool:
        """Whether ``nbytes`` may be packed (``new``) and page-locked (``lock``); they are counted if so.

        Where the budget is spent others give back first: those used before ``older_than``, or all but ``holder``.
        ``insist``: a budget of the user's own stands behind it, so that it is granted though others cannot give enough.
        """
        with self.lock:
            if new and not insist and nbytes > page_lockable(*self.ram()) - self.pending:
                return False  # no page-locked memory of others, given back, is free RAM
            if lock:
                missing = self.locked + nbytes - self.quota()
                if missing > 0 and self.take(missing, holder, older_than) < missing and not insist:
                    return False
                self.locked += nbytes
            if new:
                self.pending += nbytes
            return True

    def take(self, nbytes: int, holder: Holder | None = None, older_than: int | None = None) -> int:
        """Let the models used least recently give back ``nbytes``. Returns the bytes unlocked."""
        taken = 0
        with self.lock:
            for other in sorted((h for h in self._holders if h is not holder), key=lambda h: h.last_used):
                if taken >= nbytes or (older_than is not None and other.last_used >= older_than):
                    break
                taken += other.give_back(nbytes - taken)
        return taken

    def filled(self, segment: object, nbytes: int) -> None:
        """Claimed memory was filled: it counts as packed as long as ``segment`` lives."""
        with self.lock:
            self.pending -= nbytes
            self._held += nbytes
        weakref.finalize(
            segment, self._gone.append, nbytes
        ).atexit = False  # not under the lock: called while collecting

    def unclaim(self, nbytes: int, *, new: bool, lock: bool) -> None:
        """What was claimed did not come about."""
        with self.lock:
            self.pending -= nbytes if new else 0
            self.locked -= nbytes if lock else 0

    def unlocked(self, nbytes: int) -> None:
        """Memory that was page-locked is not any more."""
        with self.lock:
            self.locked -= nbytes

    def describe(self) -> str:
        """One line in plain words."""
        return (
            f"{format_bytes(self.locked)} of RAM page-locked for weights, of {format_bytes(self.quota())} that may be"
        )


_budget = HostBudget()


def process_budget() -> HostBudget:
    """The budget that all models of this process share."""
    return _budget
