"""Between forwards: measure what a forward needs beside its weights, and choose the plan that fits the limit."""

from __future__ import annotations

import logging
import weakref
from typing import TYPE_CHECKING

import torch

from .config import SwapConfig
from .memory import snapshot
from .plan import Plan, Timing, Unit, cut, single_layers, stream_all
from .policy import FIRST_SLOTS, MARGIN, as_asked, best
from .telemetry import ForwardRecord
from .units import format_bytes
from .worth import plain_is_shorter

if TYPE_CHECKING:
    from .swap import Swap

log = logging.getLogger(__name__)

FIRST_SHARE = 0.6  # of what is free for units and activations, before activations are known
REGROW_AFTER = 8
SETTLED = 2  # forwards after the measured one until it is asked if other weights would be faster
LOOKS = 3  # forwards after each plan whose memory is looked at once more
SINGLE_LAYERS = 4  # times that memory ran out: units of a half, a quarter, an eighth of their size, then layer by layer
CAUTION = 8 * MARGIN  # left free after memory ran out, doubled each time
CALM = 16  # forwards without running out of memory until half of that is used again
LONGEST_WAIT = 256  # forwards


class Adapter:
    """Chooses the plans of one Swap.

    A forward with larger inputs than any before is run with every unit streamed and is measured: what the allocator
    reserves beside the units, and, in adaptive mode, compute times and bandwidth. From the next forward on as many
    units are resident as the limit holds. Adaptive mode then looks again at what is really needed, until that changes nothing, and goes on watching
    the limit: what other programs take or give back changes the plan; chunkwise keeps it. Once the plan is settled, the
    weights are encoded, or decoded again, where forwards are shorter that way, and the next one is measured anew.

    When memory runs out in a forward, ``shrink`` finds the next smaller plan, down to single layers that get memory only
    while they compute; what the limit holds is then resident again, with more caution each time.
    """

    def __init__(self, swap: Swap) -> None:
        self._swap = weakref.ref(swap)
        self._largest = -1
        self._elements = 0
        self._measuring = False
        self._starved = 0
        self._caution = 0
        self._calm = 0
        self._patience = REGROW_AFTER
        self._undecided = self._lost = False
        self._beside = 0
        self._planned_budget = 0
        self._looks = 0
        self._wait = 0
        self._settled = 0
        self._weighed = -1
        self._margin = MARGIN if swap.device.type == "cuda" else 0
        self._measured_units: tuple[Unit, ...] = ()
        self._timing: Timing | None = None
        self._peak_reserved = 0
        self._peak_allocated = 0

    @property
    def swap(self) -> Swap:
        """The Swap whose plans these are, which keeps this."""
        return self._swap()

    @property
    def _config(self) -> SwapConfig:
        return self.swap.config

    @property
    def _fixed(self) -> bool:
        """Whether the plan is the user's own, or layerwise, which has only one."""
        return self._config.streamed_blocks is not None or self._config.mode == "layerwise"

    def first(self) -> Plan:
        """The plan before anything was measured. Adaptive mode begins small; all do after memory ran out."""
        config, sizes = self._config, self.swap.weights.sizes
        asked = as_asked(config, sizes)
        if asked is not None and not self._starved:
            return asked
        if config.mode == "layerwise" or self._starved >= SINGLE_LAYERS:
            return stream_all(single_layers(sizes), 0)
        slots = config.slots or (2 if config.mode == "adaptive" else FIRST_SLOTS)
        return stream_all(cut(sizes, max(1, config.block_size >> self._starved)), 2 if self._starved else slots)

    def before(self, elements: int, budget: int) -> None:
        """A forward with ``elements`` input elements begins; torch may reserve ``budget`` bytes."""
        swap = self.swap
        before, self._elements = self._elements, elements
        cuda = swap.device.type == "cuda"
        if elements > self._largest:
            seen = swap.weights.coding.seen
            if seen is not None and not swap.telemetry.forwards and swap.weights.chooses:
                self._recode(seen)
            self._begin_measuring(budget)
        elif self._settled >= SETTLED and before == elements == self._largest > self._weighed and self._recoded():
            self._begin_measuring(budget)
        elif self._fixed and self._starved:
            self._return_to_asked()
        elif not self._fixed and self._undecided:
            self._decide(budget)
        elif not self._fixed and self._config.mode == "adaptive":
            self._watch(budget, before == self._largest)
        if cuda and not self._measuring:
            torch.cuda.reset_peak_memory_stats(swap.device)

    def _begin_measuring(self, budget: int) -> None:
        swap = self.swap
        self._measuring = True
        self._looks = self._settled = 0
        if not self._fixed or self._lost:
            self._lost = False
            plan = self.first()
            now = snapshot(swap.device).allocated
            beside = swap.rest_bytes if now is None else now - swap.streamer.device_bytes
            room = budget - beside
            if plan.slots > 2 and plan.device_bytes > room * FIRST_SHARE:
                plan = stream_all(plan.units, 2)
            if plan != swap.plan:
                swap.apply(plan)
        if swap.streamer.floating:
            on_cpu = swap.device.type != "cuda"  # where activations are not counted, and the rest neither
            swap.streamer.limit_floating(budget - (swap.rest_bytes if on_cpu else 0))
            swap.streamer.relearn()
        if swap.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(swap.device)

    def peak(self) -> int:
        """Highest memory in use during the forward that just ended, in bytes; on a CPU that of the weights only."""
        if self.swap.device.type != "cuda":
            return self.swap.rest_bytes + self.swap.streamer.peak_bytes
        statistics = torch.cuda.memory_stats_as_nested_dict(self.swap.device)
        self._peak_reserved = statistics["reserved_bytes"]["all"]["peak"]
        self._peak_allocated = statistics["allocated_bytes"]["all"]["peak"]
        return self._peak_allocated

    def after(self, completed: bool) -> None:
        """The forward is over."""
        if not self._measuring:
            self._settled += completed and self._elements == self._largest
            return
        self._measuring = False
        if not completed:
            self._largest = -1
            return
        swap = self.swap
        self._largest = self._elements
        on_device = swap.rest_bytes if swap.device.type != "cuda" else self._peak_reserved - swap.streamer.device_bytes
        self._beside = on_device
        self._undecided = True

    @property
    def beside(self) -> int | None:
        """Bytes that the process reserved beside units in a forward like the last one; None before one was measured."""
        return None if self._largest < 0 or self._measuring else self._beside

    @property
    def measured(self) -> tuple[Timing, tuple[Unit, ...]] | None:
        """Compute times that were measured, and the units that they belong to."""
        return None if self._timing is None else (self._timing, self._measured_units)

    def need(self) -> int:
        """Bytes that torch will have reserved at the peak of a forward like the last one, as far as that was measured."""
        return 0 if self.beside is None else self._beside + self.swap.streamer.device_bytes

    def evicted(self) -> None:
        """Resident units were given back on request: they do not come back at once."""
        self._wait = REGROW_AFTER
        self._planned_budget = 0

    def shrink(self) -> bool:
        """Memory ran out. Whether there is a plan that takes less than the present one, which ``start_smaller`` takes over."""
        swap = self.swap
        present, asked = swap.plan, self._config.streamed_blocks is not None
        if present.resident:
            self._caution = max(CAUTION, 2 * self._caution)
            self._calm = 0
        self._wait, self._patience = self._patience, min(LONGEST_WAIT, 2 * self._patience)
        single = self._starved >= SINGLE_LAYERS or (self._config.mode == "layerwise" and not asked)
        if single and not present.resident:
            return swap.streamer.prefetching  # the repetition is measured, and nothing is copied ahead in it
        for starved in range(self._starved + (asked or not present.resident), SINGLE_LAYERS + 1):
            self._starved = starved
            if starved == SINGLE_LAYERS or self.first().device_bytes < present.device_bytes:
                return True
        return False

    def start_smaller(self, budget: int) -> None:
        """Take over the plan that ``shrink`` found; the forward that begins now is measured."""
        swap = self.swap
        plan = self.first()
        if plan != swap.plan:
            swap.apply(plan)
        self._begin_measuring(budget)

    def failed(self) -> None:
        """A forward ended for want of memory, a plan could not be taken over, or weights were packed anew: the next forward is
        measured."""
        self._largest = -1
        self._lost = True

    def _return_to_asked(self) -> None:
        """Memory ran out under a plan that the user asked for: try that again after a while."""
        self._wait -= 1
        if self._wait > 0:
            return
        self._starved = 0
        plan = self.first()
        if plan != self.swap.plan:
            log.info("block swap: back to the plan that was asked for: %s", plan.describe())
            self.swap.apply(plan)

    def _recoded(self) -> bool:
        """Whether weights were encoded, or decoded again, because of the last forward. Asked once for each size of inputs."""
        swap, self._weighed = self.swap, self._elements
        record = swap.telemetry.last(wait=True) if swap.weights.chooses else None
        return record is not None and record.index == swap.telemetry.forwards - 1 and self._recode(record)

    def _recode(self, record: ForwardRecord) -> bool:
        """Encode the weights, or decode those that were encoded for speed, where forwards like ``record`` are shorter that way
        and there is RAM for both. True if that was done, which takes the first plan."""
        swap, weights = self.swap, self.swap.weights
        encoded, rates = weights.coding.for_speed, None
        if not encoded:
            rates = weights.coding.faster(weights.layers, record)
            swap.link.trim()  # what that took is not left to other streams
        wanted = plain_is_shorter(record) if encoded else rates is not None
        if not wanted or not weights.has_room(encode=not encoded):
            return False
        log.info(
            "block swap: a forward takes %.3f s, of which %.3f s waiting for copies: %s of weights are %s",
            record.seconds,
            record.stall,
            format_bytes(weights.nbytes),
            "decoded, because that costs more than it saves" if encoded else "encoded, so that fewer bytes are copied",
        )
        swap.take_other_weights(rates)
        return True

    def seen(self) -> ForwardRecord | None:
        """The last forward, with plain weights under a plan that was decided; None where there was none such. For the next time
        that the model is attached: hosts attach it for each run, and a run may be shorter than it takes to settle."""
        try:
            record = self.swap.telemetry.last() if self._settled else None
        except Exception as error:  # the device is lost
            log.debug("what the last forward took is not known: %s", str(error))
            return None
        return record if record is not None and not record.encoded_bytes else None

    def _decide(self, budget: int) -> None:
        """The first plan after a measurement."""
        self._undecided = False
        record = self.swap.telemetry.last(wait=True)
        if self._config.mode == "adaptive" and record is not None:
            self._timing = timing(record, len(self.swap.plan.units))
            self._measured_units = self.swap.plan.units
        self._replan(budget)

    def _watch(self, budget: int, full: bool) -> None:
        """Follow the limit: shrink at once, grow when there was room for a while. ``full``: the last forward was one with the
        largest inputs, so that what it needed is enough for all."""
        if budget < self._planned_budget - MARGIN:
            self._replan(budget)
            return
        if full and self._looks < LOOKS:
            self._looks += 1
            if self._use_slack(budget):
                self._looks = 0
                return
        if self._caution:
            self._calm += 1
            if self._calm >= CALM:
                self._calm, self._caution = 0, self._caution // 2 if self._caution > CAUTION else 0
                self._patience = REGROW_AFTER
                self._replan(budget)
                return
        if budget > self._planned_budget + 4 * MARGIN and self._planned_budget < self._whole_need():
            self._wait -= 1
            if self._wait <= 0:
                self._replan(budget)
        else:
            self._wait = REGROW_AFTER

    def _use_slack(self, budget: int) -> bool:
        """The measured forward reserved more beside its units than the last one did, in splinters that nobody needed: plan
        again with what is really needed. True if that changed the plan."""
        swap = self.swap
        beside = self._peak_reserved - swap.streamer.device_bytes
        if swap.device.type != "cuda" or not swap.plan.streamed or beside > self._beside - 4 * MARGIN:
            return False
        self._beside = beside
        self._replan(budget)
        return True

    def _whole_need(self) -> int:
        return self._beside + self._margin + sum(size.nbytes for size in self.swap.weights.sizes)

    def _replan(self, budget: int) -> None:
        self._planned_budget = budget
        self._wait = REGROW_AFTER
        swap, config = self.swap, self._config
        room = budget - self._beside - self._margin - self._caution
        for _ in range(6):
            plan = self._best(room)
            if plan == swap.plan:
                return
            try:
                swap.apply(plan)
            except torch.OutOfMemoryError:
                room -= max(4 * MARGIN, room // 8)
                swap.streamer.drop_slots()
                continue
            log.info(
                "block swap (%s): %s beside the units, %s left for them: %s",
                config.mode,
                format_bytes(self._beside),
                format_bytes(room),
                plan.describe(),
            )
            return
        swap.apply(self.first())

    def _best(self, room: int) -> Plan:
        config, sizes = self._config, self.swap.weights.sizes
        plan = best(config, sizes, room, self._timing, self._measured_units)
        if plan is not None:
            return plan
        return self.first() if self._starved else stream_all(cut(sizes, config.block_size), 2)


def timing(record: ForwardRecord, count: int) -> Timing:
    """Compute time per unit, the rest of the forward, and the link's bandwidth, from a forward in which every one of
    ``count`` units was visited. What computes between two units counts to the first of them."""
    compute = [0.0] * count
    for index, span in enumerate(record.units):
        until = record.arrivals[index + 1] if index + 1 < len(record.arrivals) else span.end
        compute[span.unit] += until - span.start
    outside = max(0.0, record.seconds - record.stall - sum(compute))
    bandwidth = record.streamed_bytes / record.copying if record.copying > 0 else float("inf")
    decoding = record.decoded_bytes / record.decode_seconds if record.decode_seconds > 0 else float("inf")
    return Timing(tuple(compute), outside, bandwidth, decoding)
