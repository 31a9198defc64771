"""The hot loop: slots, prefetch, and the waits between the copy stream and the compute stream.

A unit is *entered* before its first layer computes and *left* after its last. While it is entered its parameters in the
module are views of device memory; at all other times they are the host's own tensors. The order of use is learned from
the last forward; whatever comes out of order is copied on demand, so a wrong guess costs time and nothing else.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence

from . import replacement
from .copier import Copier
from .link import Link
from .on_demand import CopySchedule
from .order import Order
from .repeat import out_of_memory
from .slots import Slot, StreamUnit
from .telemetry import Telemetry, Visit
from .units import format_bytes

log = logging.getLogger(__name__)

LOOK_SECONDS = 0.05  # between looks at what other programs took, while a forward is queued


class Streamer:
    """Moves the units of one model. Thread-safe; a unit in use is never overwritten. ``peak_bytes`` is the most device
    memory that slots, resident units and loads took during a forward."""

    def __init__(self, link: Link, telemetry: Telemetry) -> None:
        self.link = link
        self.telemetry = telemetry
        self.lock = threading.RLock()
        self.units: list[StreamUnit] = []
        self.slots: list[Slot] = []
        self.order: Order[StreamUnit] = Order()
        self.floating = False
        self.floating_bytes = self._resident_bytes = 0
        self.peak_bytes = 0
        self._unit_of: list[StreamUnit] = []
        self._trace: list[int] = []
        self._schedule = CopySchedule(link)
        self._spilled = self._numbers = 0
        self._look: Callable[[], None] | None = None
        self._look_at = 0.0
        self._compute: object = None
        self._host_seconds = 0.0
        self._failed_ahead = False
        self._copier = Copier(link, telemetry)

    # -- configuration, between forwards ---------------------------------------------------------------------------

    def configure(self, units: list[StreamUnit], unit_of: list[StreamUnit], slots: int, slot_bytes: int) -> None:
        """Take over a new set of units; ``unit_of[layer]`` is a layer's. ``slots == 0``: every load gets memory of its
        own, given back after use. Allocates the slots; when that fails no unit is bound and the error passes on."""
        with self.lock:
            self.release_all()
            self.slots = []
            self._copier.configure(units)
            self.units, self._unit_of = units, unit_of
            self.floating = slots == 0
            self._spilled = 0
            sequence = self.order.sequence or list(range(len(unit_of)))
            self.order = Order()
            self._learn(sequence)
            self.link.trim()  # slots and resident units in memory of their own, not in splinters of the last plan's
            self._numbers = 0
            self.slots = [Slot(self.link.empty(slot_bytes), self._next_number()) for _ in range(slots)]
            self._copier.allocate()

    def make_resident(self, unit: StreamUnit) -> None:
        """Copy a unit into device memory of its own and leave it bound. Needs ``unit.nbytes`` of device memory."""
        with self.lock:
            self._drop_load(unit)
            slot = Slot(self.link.empty(unit.nbytes), -1)
            stream = self.link.compute_stream()
            self._copier.issue(unit, slot)
            try:
                self._await(unit, stream)
            finally:
                unit.slot = unit.load = slot.unit = None
            unit.bind(slot)
            unit.resident = slot.buffer
            self._resident_bytes += unit.nbytes

    def evict(self, unit: StreamUnit) -> int:
        """Drop a resident unit's device memory; it streams from now on. Returns the bytes given back."""
        with self.lock:
            if unit.resident is None or unit.active:
                return 0
            unit.unbind()
            unit.resident = None
            self._resident_bytes -= unit.nbytes
            return unit.nbytes

    def stream_evicted(self, slots: int, slot_bytes: int) -> None:
        """Units were evicted: add ``slots`` slots of ``slot_bytes`` for them and expect them in the order of use, also in
        the middle of a forward. Where there is no memory for slots, they get memory of their own when they are needed."""
        with self.lock, self.link.computing_on(self._compute):
            try:
                for _ in range(slots):
                    self.slots.append(Slot(self.link.empty(slot_bytes), self._next_number()))
            except RuntimeError as error:
                if not out_of_memory(error):
                    raise
            self.floating = not self.slots
            position = self.order.position
            self._learn(self.order.sequence)
            self.order.position = position

    def _next_number(self) -> int:
        """A number that no slot has had since the units last forgot theirs."""
        self._numbers += 1
        return self._numbers - 1

    def release_all(self) -> None:
        """Unbind all units and forget what the slots hold. Copies under way are waited for. Also when that raises, because
        the device is lost, the module sees the host's tensors again."""
        with self.lock:
            try:
                for unit in self.units:
                    if unit.load is not None:
                        unit.load.failed()
                self._copier.synchronize()
            finally:
                for unit in self.units:
                    if unit.bound:
                        unit.unbind()
                    unit.slot = unit.load = unit.resident = unit.visit = None
                    unit.active = 0
                    unit.forget_views()
                for slot in self.slots:
                    slot.unit = None
                self.floating_bytes = self._resident_bytes = 0

    def forget_sources(self) -> None:
        """Let go of the memory that units are copied from: it is packed anew, and ``configure`` comes before the next copy."""
        with self.lock:
            for unit in self.units:
                unit.source = []

    def drop_slots(self) -> None:
        """Give back the memory of slots and resident units; the next forward needs ``configure`` first."""
        with self.lock:
            try:
                self.release_all()
            finally:
                self.slots = []
                self._copier.release()

    def close(self) -> None:
        """Unbind everything, end the staging thread, give back all device memory. Finishes also when the device is lost."""
        for part in (self.drop_slots, self._copier.close):
            try:
                part()
            except Exception as error:
                log.warning("block swap is taken off, although the device does not answer: %s", str(error))
        self.telemetry.clear()
        self.units, self._unit_of, self.order = [], [], Order()

    @property
    def device_bytes(self) -> int:
        """Device memory that slots, resident units, loads and the decoder's buffers take now."""
        slots = sum(slot.buffer.numel() for slot in self.slots)
        return self._resident_bytes + slots + self.floating_bytes + self._copier.nbytes

    def relearn(self) -> None:
        """The set of resident units changed, or what a forward needs is to be measured anew."""
        with self.lock:
            self._learn(self.order.sequence)

    @property
    def prefetching(self) -> bool:
        """Whether copies are begun ahead of their use."""
        return not self.floating or self._schedule.known

    def limit_floating(self, cap: int | None) -> None:
        """Never let prefetching take streamed units and activations together past ``cap`` bytes."""
        self._schedule.cap = cap

    def _learn(self, sequence: Sequence[int]) -> None:
        self.order.learn(sequence, self._unit_of, {unit for unit in self.units if unit.resident is None})
        self._schedule.forget()

    # -- the forward ----------------------------------------------------------------------------------------------

    def begin(self, look: Callable[[], None] | None = None, repeats: int = 0) -> None:
        """A forward of the whole model begins, as repetition number ``repeats`` of one that failed. ``look`` is called
        between units from time to time, on the thread that computes."""
        with self.lock:
            self.order.position = 0
            self._trace = []
            self._host_seconds = 0.0
            self._look = look
            self._look_at = time.perf_counter() + LOOK_SECONDS
            self._compute = self.link.compute_stream()
            self.peak_bytes = self.device_bytes
            self.telemetry.begin(repeats)
            if self.floating:
                self._schedule.begin()
            self._prefetch()

    def end(self, completed: bool, peak: int) -> None:
        """The forward is over; ``completed`` is False when an exception passes through."""
        with self.lock:
            if self._schedule.measuring:
                self._measure()
            try:
                for unit in self.units:
                    if unit.bound and not unit.active and unit.resident is None:
                        self._release(unit, self.link.compute_stream())
            except Exception as error:
                if completed:
                    raise
                log.debug("the device does not answer after a forward that failed: %s", str(error))
                for unit in self.units:
                    if unit.bound and not unit.active and unit.resident is None:
                        unit.unbind()
            if completed:
                self.telemetry.end(peak, self._host_seconds)
                same = self._trace == self.order.sequence
                self._schedule.end(self.order if same else None)
                if not same:
                    self._learn(self._trace)
            else:
                self.telemetry.abandon()
                self._schedule.end(None)
            self._look = None
            self.order.position = 0
            self.link.compute_stream()
            if self.floating:
                for unit in self.units:
                    if not unit.bound:
                        self._drop_load(unit)
            elif completed:
                self._prefetch()

    def enter(self, layer: int) -> None:
        """``layer`` is about to compute on the calling thread's current stream."""
        started = time.perf_counter()
        with self.lock:
            unit = self._unit_of[layer]
            if self._schedule.measuring:
                self._measure()
            self.order.advance(layer)
            if self.telemetry.recording:
                self._trace.append(layer)
            if self._look is not None and started >= self._look_at:
                self._look_at = started + LOOK_SECONDS
                self._look()
            unit.active += 1
            if not unit.bound:
                try:
                    self._bring(unit)
                except BaseException:
                    unit.active -= 1
                    raise
            self._host_seconds += time.perf_counter() - started

    def leave(self, layer: int) -> None:
        """``layer`` has queued its compute, or failed."""
        started = time.perf_counter()
        with self.lock:
            unit = self._unit_of[layer]
            if self._schedule.measuring:
                self._measure()
            unit.active -= 1
            if not unit.active and unit.resident is None and unit.bound and self.order.next_unit() is not unit:
                self._release(unit, self.link.compute_stream())
                self._prefetch()
            self._host_seconds += time.perf_counter() - started

    def _bring(self, unit: StreamUnit) -> None:
        stream = self.link.compute_stream()
        if unit.load is not None and unit.load.failed():
            self._drop_load(unit)  # fetched ahead in vain: try once more, now that it is needed
        missed = unit.load is None
        if missed:
            self.telemetry.miss()
            self._fetch(unit, self._demand_slot(unit))
        arrive = self.link.mark(stream)
        self._await(unit, stream)
        unit.bind(unit.slot)
        unit.visit = Visit(unit.index, arrive, self.link.mark(stream))
        self.telemetry.visit(unit.visit)
        if missed or self.floating:
            self._prefetch()

    def _await(self, unit: StreamUnit, stream: object) -> None:
        load = unit.load
        if load.failed():
            self._drop_load(unit)
            raise load.error
        self.link.compute_waits_for(load.ready, stream)

    def _release(self, unit: StreamUnit, stream: object) -> None:
        """The unit's compute is queued on ``stream``: its slot may be overwritten once that is done. What it holds stays valid
        until then, because weights are read-only."""
        unit.unbind()
        slot = unit.slot
        try:
            slot.free = self.link.mark(stream)
        except BaseException:
            # nobody would know when it may be overwritten: its memory goes back to the allocator, behind the compute
            self._drop_load(unit)
            self.slots = [other for other in self.slots if other is not slot]
            raise
        if unit.visit is not None:
            unit.visit.leave = slot.free
            unit.visit = None
        if slot.number < 0:
            self._drop_load(unit)

    def _drop_load(self, unit: StreamUnit) -> None:
        """Forget a copy of the unit. Memory of its own goes back to the allocator, behind the copy."""
        slot, load = unit.slot, unit.load
        if slot is None:
            return
        failed = load.failed()
        unit.slot = unit.load = slot.unit = None
        if failed:
            self._copier.abandon(slot)
        if slot.number < 0:
            self.floating_bytes -= slot.buffer.numel()
            if not failed:
                self.link.compute_waits_for(load.ready, self.link.compute_stream())

    # -- copies ---------------------------------------------------------------------------------------------------

    def _fetch(self, unit: StreamUnit, slot: Slot) -> None:
        """Queue the copy of ``unit`` into a slot, or into memory of its own."""
        try:
            self._copier.issue(unit, slot)
        except BaseException:
            if slot.number < 0:
                self.floating_bytes -= slot.buffer.numel()
            raise

    def _demand_slot(self, unit: StreamUnit) -> Slot:
        """A slot for a unit that is needed now and that nobody fetched."""
        if self.floating:
            return self._own_memory(unit)
        slot = replacement.for_now(self.order, self.slots, unit.nbytes)
        if slot is None:
            self._spilled += 1
            log.log(
                logging.WARNING if self._spilled == 1 else logging.DEBUG,
                "unit %d is needed while units that are computing use all slots that hold it; %s allocated for it",
                unit.index,
                format_bytes(unit.nbytes),
            )
            return self._own_memory(unit)
        if slot.unit is not None and slot.unit.bound:
            self._release(slot.unit, self.link.compute_stream())
        return slot

    def _own_memory(self, unit: StreamUnit) -> Slot:
        slot = Slot(self.link.empty(unit.nbytes), -1)
        self.floating_bytes += unit.nbytes
        self.peak_bytes = max(self.peak_bytes, self.device_bytes)
        return slot

    def _prefetch(self) -> None:
        """Begin the copies of the next units, as far as slots allow. A copy that fails is tried again when its unit is needed,
        and raises then."""
        try:
            if self.floating:
                self._prefetch_floating()
            else:
                for unit, slot in replacement.ahead(self.order, self.slots):
                    self._fetch(unit, slot)
        except Exception as error:
            log.log(
                logging.DEBUG if self._failed_ahead else logging.WARNING,
                "a unit could not be copied ahead: %s",
                str(error),
            )
            self._failed_ahead = True

    def _window(self) -> int:
        """The window that this moment is in, see on_demand.py."""
        position = self.order.position
        inside = position > 0 and self._unit_of[self.order.sequence[position - 1]].active
        return 2 * position - 1 if inside else 2 * position

    def _measure(self) -> None:
        self._schedule.measure(self._window(), self.floating_bytes)

    def _prefetch_floating(self) -> None:
        runs, window = self.order.runs, self._window()
        for index in range(self.order.here(), len(runs)):
            if not self._schedule.due(index, window):
                return
            unit = runs[index].unit
            if unit.load is None:
                self._fetch(unit, self._own_memory(unit))
