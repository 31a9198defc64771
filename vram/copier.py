"""Queues the copies of units to the device: from page-locked memory, through the staging ring, or encoded and then decoded."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence

import torch

from .decoding import Decoder
from .link import Link
from .slots import Load, Slot, StreamUnit
from .staging import StagingRing
from .telemetry import Copy, Telemetry

log = logging.getLogger(__name__)


class Copier:
    """Copies the units of one model into slots, on the copy stream of ``link``; tells ``telemetry`` of each."""

    def __init__(self, link: Link, telemetry: Telemetry) -> None:
        self.link = link
        self.telemetry = telemetry
        self._staging = StagingRing(link)
        self._decoder = Decoder(link)

    def configure(self, units: Sequence[StreamUnit]) -> None:
        """These units are to be copied from now on. Nothing is under way."""
        self._decoder.configure(max((unit.link_bytes for unit in units if unit.coding is not None), default=0))

    def allocate(self) -> None:
        """Allocate the device memory that is needed beside slots."""
        self._decoder.allocate()

    def release(self) -> None:
        """Give that back; it is allocated again when it is needed. Nothing is under way."""
        self._decoder.release()

    @property
    def nbytes(self) -> int:
        """Device memory that is taken beside slots."""
        return self._decoder.nbytes

    def synchronize(self) -> None:
        """Wait for all copies that are queued, and for what is decoded behind them."""
        self.link.synchronize()
        self._decoder.synchronize()

    def close(self) -> None:
        """End the staging thread."""
        self._staging.close()

    def issue(self, unit: StreamUnit, slot: Slot) -> None:
        """Queue the copy of ``unit`` into ``slot``, behind the compute that last used the slot."""
        if slot.unit is not None:
            slot.unit.load.failed()  # a copy through the staging ring is queued late, but before this one
            slot.unit.slot = slot.unit.load = None
            slot.unit = None
        link = self.link
        copy = Copy(unit.index, unit.link_bytes, link.event(), link.event())
        if unit.coding is not None:
            copy.plain, copy.decoding, copy.ready = unit.nbytes, link.event(), link.event()
        load = Load(copy.last)
        try:
            if not isinstance(unit.source, torch.Tensor):
                self._issue_staged(unit, slot, load, copy)
            else:
                buffer = self._decoder.take(load) if unit.coding is not None else None
                free = slot.free if buffer is None else buffer.free
                if free is not None:
                    link.copy_waits_for(free)
                copy.begin.record(link.stream)
                link.copy(unit.target(slot) if buffer is None else buffer.memory[: unit.link_bytes], unit.source)
                copy.end.record(link.stream)
                if buffer is not None:
                    self._decoder.decode(unit, buffer, slot, copy)
                self.telemetry.copy(copy)
        except BaseException:
            self.abandon(slot)
            raise
        # not before the copy is queued: else a slot that holds other bytes would be taken for the unit
        unit.slot, unit.load, slot.unit = slot, load, unit

    def abandon(self, slot: Slot) -> None:
        """A copy into ``slot`` failed, perhaps half-way. Memory of its own must not be used again before that has ended, nor a
        slot that something is decoded into; a slot's next copy is queued behind it."""
        if slot.number < 0 or self._decoder.nbytes:
            try:
                self.synchronize()
            except Exception as error:  # the device is lost, and with it whatever was under way
                log.debug("copies cannot be waited for: %s", str(error))

    def _issue_staged(self, unit: StreamUnit, slot: Slot, load: Load, copy: Copy) -> None:
        """The same through the staging ring, whose thread does it a little later."""
        load.issued = threading.Event()
        buffer = None if unit.coding is None else self._decoder.take(load, staged=True)
        free, link = slot.free, self.link

        def before() -> None:
            begin = free if buffer is None else buffer.free
            if begin is not None:
                link.copy_waits_for(begin)
            copy.begin.record(link.stream)

        def after(error: Exception | None) -> None:
            try:
                copy.end.record(link.stream)
                if error is None and buffer is not None:
                    self._decoder.decode(unit, buffer, slot, copy)
            except Exception as failure:
                error = error or failure
            load.error = error
            if error is None:
                self.telemetry.copy(copy)
            load.issued.set()

        self._staging.submit(unit.source, slot.buffer if buffer is None else buffer.memory, before, after)
