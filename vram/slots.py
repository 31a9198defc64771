"""Slots, and the units that pass through them: which weights a module sees, and where."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from .layout import Entry
from .link import Event
from .staging import Piece
from .telemetry import Visit
from .unit_coding import UnitCoding


class Slot:
    """Device memory that a streamed unit is copied into. ``number`` names it for cached views; -1: used once."""

    __slots__ = ("buffer", "free", "number", "unit")

    def __init__(self, buffer: torch.Tensor, number: int) -> None:
        self.buffer = buffer
        self.number = number
        self.unit: StreamUnit | None = None
        self.free: Event | None = None


class Load:
    """A copy on its way into a slot. ``issued`` is set once the copy is queued, or failed with ``error``."""

    __slots__ = ("error", "issued", "ready")

    def __init__(self, ready: Event) -> None:
        self.ready = ready
        self.issued: threading.Event | None = None
        self.error: Exception | None = None

    def failed(self) -> bool:
        """Whether the copy could not be queued; waits until that is known."""
        if self.issued is not None:
            self.issued.wait()
        return self.error is not None


@dataclass(eq=False)
class StreamUnit:
    """A unit with its weights, which take ``nbytes`` in a slot. ``source`` is page-locked host memory with them, or pieces that
    have to be staged, ``link_bytes`` in all; with ``coding`` they are encoded there, and decoded as that says.
    ``entries`` are its parameters with the shift that binds them. ``overlap``: its copy must be hidden behind compute
    even where that takes memory for two units."""

    index: int
    nbytes: int
    entries: Sequence[tuple[Entry, int]]
    source: torch.Tensor | list[Piece]
    overlap: bool = True
    coding: UnitCoding | None = None
    link_bytes: int = 0
    slot: Slot | None = None
    load: Load | None = None
    resident: torch.Tensor | None = None
    active: int = 0
    bound: bool = False
    visit: Visit | None = None
    _views: dict[int, list[torch.Tensor]] = field(default_factory=dict)
    _targets: dict[int, torch.Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.link_bytes = self.link_bytes or self.nbytes

    def bind(self, slot: Slot) -> None:
        """Let the module see this unit's weights in ``slot``."""
        views = self._views.get(slot.number)
        if views is None:
            with torch.inference_mode(False):
                views = [entry.bind(slot.buffer, shift) for entry, shift in self.entries]
            if slot.number >= 0:
                self._views[slot.number] = views
        for (entry, _), view in zip(self.entries, views, strict=True):
            entry.owner[entry.name] = view
        self.bound = True

    def unbind(self) -> None:
        """Let the module see the host's tensors again."""
        for entry, _ in self.entries:
            entry.owner[entry.name] = entry.host
        self.bound = False

    def target(self, slot: Slot) -> torch.Tensor:
        """The part of the slot's buffer that this unit takes."""
        if slot.number < 0:
            return slot.buffer
        target = self._targets.get(slot.number)
        if target is None:
            target = self._targets[slot.number] = slot.buffer[: self.nbytes]
        return target

    def forget_views(self) -> None:
        """The slots are going."""
        self._views.clear()
        self._targets.clear()
        if self.coding is not None:
            self.coding.batch.forget()
