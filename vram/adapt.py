"""Between forwards: measure what a forward needs beside its weights, and choose the plan that fits the limit."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch

from .config import SwapConfig
from .memory import snapshot
from .plan import Plan, Timing, Unit, by_block, choose, cut, fit, single_layers, stream_all, stream_blocks
from .telemetry import ForwardRecord
from .units import MIB, format_bytes

if TYPE_CHECKING:
    from .swap import Swap

log = logging.getLogger(__name__)

FIRST_SLOTS = 3
FIRST_SHARE = 0.6  # of what is free for units and activations, before activations are known
MARGIN = 32 * MIB
REGROW_AFTER = 8
LOOKS = 3  # forwards after each plan whose memory is looked at once more


class Adapter:
    """Chooses the plans of one Swap.

    A forward with larger inputs than any before is run with every unit streamed and is measured: what the allocator
    reserves beside the units, and, in adaptive mode, compute times and bandwidth. From the next forward on as many
    units are resident as the limit holds. Adaptive mode then looks again at what is really needed, until that changes nothing, and goes on watching
    the limit: what other programs take or give back changes the plan; chunkwise keeps it.
    """

    def __init__(self, swap: Swap) -> None:
        self.swap = swap
        self._largest = -1
        self._elements = 0
        self._measuring = False
        self._starved = 0
        self._undecided = False
        self._beside = 0
        self._planned_budget = 0
        self._looks = 0
        self._wait = 0
        self._margin = MARGIN if swap.device.type == "cuda" else 0
        self._measured_units: tuple[Unit, ...] = ()
        self._timing: Timing | None = None
        self._peak_reserved = 0
        self._peak_allocated = 0

    @property
    def _config(self) -> SwapConfig:
        return self.swap.config

    @property
    def _fixed(self) -> bool:
        """Whether the plan is the user's own, or layerwise, which has only one."""
        return self._config.streamed_blocks is not None or self._config.mode == "layerwise"

    def first(self) -> Plan:
        """The plan before anything was measured. Adaptive mode begins small, and smaller after it ran out of memory."""
        config, sizes = self._config, self.swap._sizes
        if config.mode == "layerwise":
            units, slots = single_layers(sizes), 0
        else:
            size = max(1, config.block_size >> self._starved)
            units = cut(sizes if config.streamed_blocks is None else by_block(sizes), size)
            slots = config.slots or (2 if config.mode == "adaptive" and config.streamed_blocks is None else FIRST_SLOTS)
        if config.streamed_blocks is not None:
            return stream_blocks(units, config.streamed_blocks, slots)
        return stream_all(units, slots)

    def before(self, elements: int, budget: int) -> None:
        """A forward with ``elements`` input elements begins; torch may reserve ``budget`` bytes."""
        swap = self.swap
        before, self._elements = self._elements, elements
        cuda = swap.device.type == "cuda"
        if elements > self._largest:
            self._begin_measuring(budget)
        elif not self._fixed and self._undecided:
            self._decide(budget)
        elif not self._fixed and self._config.mode == "adaptive":
            self._watch(budget, before == self._largest)
        if cuda and not self._measuring:
            torch.cuda.reset_peak_memory_stats(swap.device)

    def _begin_measuring(self, budget: int) -> None:
        swap = self.swap
        self._measuring = True
        self._looks = 0
        if self._config.mode == "layerwise":
            on_cpu = swap.device.type != "cuda"  # where activations are not counted, and the rest neither
            swap.streamer.limit_floating(budget - (swap.rest_bytes if on_cpu else 0))
            swap.streamer.relearn()
        elif not self._fixed:
            plan = self.first()
            now = snapshot(swap.device).allocated
            beside = swap.rest_bytes if now is None else now - swap.streamer.device_bytes
            room = budget - beside
            if plan.device_bytes > room * FIRST_SHARE:
                plan = stream_all(plan.units, 2)
            if plan != swap.plan:
                swap.apply(plan)
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

    def evicted(self) -> None:
        """Resident units were given back on request: they do not come back at once."""
        self._wait = REGROW_AFTER
        self._planned_budget = 0

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
        return self._beside + self._margin + sum(size.nbytes for size in self.swap._sizes)

    def _replan(self, budget: int) -> None:
        self._planned_budget = budget
        self._wait = REGROW_AFTER
        swap, config = self.swap, self._config
        room = budget - self._beside - self._margin
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
        swap.apply(stream_all(swap.plan.units, 2))

    def _best(self, room: int) -> Plan:
        config = self._config
        units = cut(self.swap._sizes, config.block_size)
        if config.mode == "adaptive" and self._timing is not None and config.slots is None:
            plan = choose(self.swap._sizes, self._measured_units, self._timing, room, config.block_size)
        else:
            plan = fit(units, room, config.slots or FIRST_SLOTS) or fit(units, room, 2)
        return plan if plan is not None else stream_all(units, 2)

    def explain(self, error: torch.OutOfMemoryError) -> torch.OutOfMemoryError:
        """An out-of-memory error of a forward in words that say what to change. The next forward begins smaller."""
        swap = self.swap
        if self._config.mode == "adaptive":
            self._starved = min(self._starved + 1, 3)
            self._largest = -1
        return torch.OutOfMemoryError(
            f"The forward needs more than the VRAM limit of {format_bytes(swap.limit)}: {format_bytes(self._peak_allocated)} "
            f"were in use ({format_bytes(swap.device_bytes)} of them weights) when an allocation failed. Raise max_vram_gb, "
            f"use swap_mode layerwise, or a smaller resolution or fewer frames. ({error})"
        )


def timing(record: ForwardRecord, count: int) -> Timing:
    """Compute time per unit, the rest of the forward, and the link's bandwidth, from a forward in which every one of
    ``count`` units was visited. What computes between two units counts to the first of them."""
    compute = [0.0] * count
    for index, span in enumerate(record.units):
        until = record.arrivals[index + 1] if index + 1 < len(record.arrivals) else span.end
        compute[span.unit] += until - span.start
    outside = max(0.0, record.seconds - record.stall - sum(compute))
    busy = sum(copy.end - copy.start for copy in record.copies)
    bandwidth = record.streamed_bytes / busy if busy > 0 else float("inf")
    return Timing(tuple(compute), outside, bandwidth)
