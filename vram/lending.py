"""The page-locked memory of one packed model: taken when it computes, lent to other models when it does not."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Protocol

from .arena import Arena
from .segments import Segment
from .units import format_bytes

log = logging.getLogger(__name__)


class Owner(Protocol):
    """What streams from a packed model."""

    def idle(self) -> AbstractContextManager[bool]:
        """Whether no forward and no copy of the model is under way; none begins while inside. Does not wait for a forward:
        it is False then."""

    def sources_changed(self) -> None:
        """``PackedModel.source`` gives other answers than before."""


class Lender:
    """Page-locks ``segments`` again, and gives back: a ``Holder`` of host_budget.py. ``lock`` is held while the model is
    packed; ``owner`` is what streams from it while it is attached."""

    def __init__(self, arena: Arena, segments: Sequence[Segment], lock: threading.RLock) -> None:
        self.arena = arena
        self.segments = segments
        self.lock = lock
        self.owner: Owner | None = None
        self.last_used = arena.shared.use()
        self._lent = False
        arena.holder = self
        arena.shared.add(self)

    def attached(self) -> None:
        """The model is being attached: page-lock what is not, as far as the budget goes; other models that are not computing
        give back for it."""
        with self.lock:
            self.last_used = self.arena.shared.use()
            self._lock_again(None)
            self.arena.tell_refusals()

    def use(self) -> bool:
        """A forward is about to begin: page-lock what was lent, where there is room or where the others were last used before
        this model's own last forward. True if any was. About a microsecond where nothing was lent."""
        before, self.last_used = self.last_used, self.arena.shared.use()
        if not self._lent:
            return False
        with self.lock:
            changed = self._lock_again(before)
            self.arena.tell_refusals()
            return changed

    def _lock_again(self, older_than: int | None) -> bool:
        """Page-lock packed segments, the first ones first, until the budget is spent. True if any was."""
        changed = self._lent = False
        for segment in self.segments:
            if segment.host is None or segment.away is not None or segment.host.page_locked:
                continue
            if not self.arena.lock(segment.host, older_than):
                self._lent = True
                break
            changed = True
        return changed

    def give_back(self, nbytes: int) -> int:
        """Unlock at least ``nbytes`` of page-locked memory for another model, as far as there are as many: nothing while this
        one computes, is being attached or packed. Returns the bytes unlocked."""
        owner = self.owner
        if owner is None or not self.arena.page_locked_bytes or not self.lock.acquire(blocking=False):
            return 0
        try:
            with owner.idle() as idle:
                return self._unlock(nbytes, owner) if idle else 0
        except RuntimeError as error:  # the device is lost: its copies cannot be waited for
            log.warning("page-locked memory of a model cannot be given back: %s", error)
            return 0
        finally:
            self.lock.release()

    def _unlock(self, nbytes: int, owner: Owner) -> int:
        freed = 0
        for segment in reversed(self.segments):
            if freed >= nbytes:
                break
            if segment.host is not None and segment.host.page_locked:
                self.arena.drop(segment.host)
                freed += segment.nbytes
        self._lent = True
        owner.sources_changed()
        log.info(
            "%s of page-locked RAM go to another model; until there is room again these weights stream through a staging "
            "ring, which is slower",
            format_bytes(freed),
        )
        return freed

    def close(self) -> None:
        """Unlock everything; the model is taken off. Never raises because of the device."""
        self.owner, self._lent = None, False
        with self.lock:
            for segment in self.segments:
                if segment.host is not None:
                    self.arena.drop(segment.host)
            self.arena.tell_refusals()
