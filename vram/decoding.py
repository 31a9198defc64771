"""Units that cross the link encoded: two buffers on the device that they are copied into, and decoded from, in turn.

The copy stream fills one buffer while the other is decoded on a stream of its own into the unit's slot. The slot is waited
for by the decoding only, so that copies run ahead of the slots by two units.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from .link import Event, Link

if TYPE_CHECKING:
    from .slots import Load, Slot, StreamUnit
    from .telemetry import Copy

BUFFERS = 2


class Buffer:
    """Device memory for the encoded bytes of a unit; ``free`` once they are decoded. ``load``: the last one that used it."""

    __slots__ = ("free", "load", "memory", "number")

    def __init__(self, memory: torch.Tensor, number: int) -> None:
        self.memory = memory
        self.number = number
        self.free: Event | None = None
        self.load: Load | None = None


class Decoder:
    """Decodes the units of one model, behind the copies of ``link``."""

    def __init__(self, link: Link) -> None:
        self.link = link
        self.stream = link.second_stream()
        self._buffers: list[Buffer] = []
        self._size = 0
        self._next = 0

    def configure(self, nbytes: int) -> None:
        """Units of up to ``nbytes`` encoded are to be decoded from now on; 0: there are none. Nothing is being decoded."""
        self._buffers, self._size = [], nbytes

    def allocate(self) -> None:
        """Allocate the buffers. Where there is no memory for one now, it is tried again when it is needed."""
        while self._size and len(self._buffers) < BUFFERS:
            self._add()

    def release(self) -> None:
        """Give the buffers back; they are allocated again when they are needed. Nothing is being decoded."""
        self._buffers = []

    def _add(self) -> None:
        self._buffers.append(Buffer(self.link.empty(self._size), len(self._buffers)))

    @property
    def nbytes(self) -> int:
        """Device memory of the buffers."""
        return sum(buffer.memory.numel() for buffer in self._buffers)

    def take(self, load: Load, staged: bool = False) -> Buffer:
        """The buffer that the next unit, with its ``load``, goes to. Its copy begins after ``free``, once that is known:
        what goes through the staging ring is queued there in order, other copies have to wait until it is."""
        if len(self._buffers) < BUFFERS:
            self._add()
            self._next = len(self._buffers) - 1
        else:
            self._next = (self._next + 1) % BUFFERS
        buffer = self._buffers[self._next]
        if buffer.load is not None and not staged:
            buffer.load.failed()
        buffer.load = load
        return buffer

    def decode(self, unit: StreamUnit, buffer: Buffer, slot: Slot, copy: Copy) -> None:
        """Queue the decoding of ``unit`` from ``buffer`` into ``slot``, behind ``copy`` and the compute that last used the
        slot. ``copy.ready`` is recorded behind it. Raises Corrupt."""
        unit.coding.verified()
        link, stream = self.link, self.stream
        link.stream_waits_for(stream, copy.end)
        if slot.free is not None:
            link.stream_waits_for(stream, slot.free)
        copy.decoding.record(stream)
        key = (slot.number, buffer.number) if slot.number >= 0 else None
        unit.coding.batch.decode(buffer.memory, slot.buffer, key, stream)
        for begin, to, nbytes in unit.coding.moves:
            link.copy_on(stream, slot.buffer[to : to + nbytes], buffer.memory[begin : begin + nbytes])
        copy.ready.record(stream)
        buffer.free = copy.ready

    def synchronize(self) -> None:
        """Wait for all decoding."""
        self.link.synchronize_stream(self.stream)
