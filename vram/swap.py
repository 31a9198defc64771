"""Attach block swap to a model and take it off again, leaving no trace."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator

import torch
from torch import nn

from . import limit
from .adapt import Adapter
from .coding import AUTO
from .config import SwapConfig
from .device import resolve
from .discover import WHOLE, Scope, Slotted, find_blocks
from .fits import plan_that_fits
from .forward import Forward
from .gates import MARK, InstancePatches, as_function, gate, hide_from_compile, stay
from .link import open_link
from .memory import snapshot
from .offload import find_offload_device
from .packing import PackedModel
from .patches import NO_PATCHES, Patches, Progress
from .plan import Plan, Timing, Unit
from .repeat import let_go, out_of_memory
from .rest import Rest, sort_tensors
from .stream import Streamer, StreamUnit
from .telemetry import Telemetry
from .units import format_bytes
from .weights import Weights
from .worth import Rates

log = logging.getLogger(__name__)


def attach(
    root: nn.Module,
    config: SwapConfig | None = None,
    device: torch.device | str = "cuda",
    *,
    patches: Patches = NO_PATCHES,
    packed: PackedModel | None = None,
    progress: Progress | None = None,
    scope: Scope = WHOLE,
) -> Swap:
    """Stream ``root``'s blocks to ``device`` from now on, each time ``root`` is called, until ``detach``.

    ``patches`` are applied to weights when they are packed. ``packed`` is what an earlier ``Swap.detach`` of the same
    model left: only what its patches changed is packed again. ``progress(done, total)`` is told bytes while packing and
    may raise to break off. ``scope`` says which part of the model is the engine's.

    Raises NoBlocks, ValueError (parameters on the meta device), LimitTooSmall (with the smallest limit that would do),
    or what allocation raises; the model is then as it was.
    """
    swap = Swap(root, config or SwapConfig(), resolve(device), scope)
    try:
        swap._attach(patches, packed, progress)
    except BaseException:
        swap.detach()
        raise
    return swap


class Swap:
    """Block swap attached to one model. Made by ``attach``."""

    def __init__(self, root: nn.Module, config: SwapConfig, device: torch.device, scope: Scope = WHOLE) -> None:
        self.root = root
        self.config = config
        self.device = device
        self.scope = scope
        self.link = open_link(device)
        self.telemetry = Telemetry(self.link)
        self.streamer = Streamer(self.link, self.telemetry)
        self.plan: Plan | None = None
        self.limit = 0
        self.setup_seconds = 0.0
        self._rest = Rest(device)
        self._instance = InstancePatches()
        self._forward = Forward(self)
        self._patches = NO_PATCHES
        self._undone: Plan | None = None  # the plan to go back to, while it is not sure which patches the weights have
        self.weights: Weights | None = None  # while attached
        self.adapter: Adapter | None = None

    @property
    def packed(self) -> PackedModel | None:
        """The packed weights that are streamed; None while the engine is not attached."""
        weights = self.weights  # another thread may take it off meanwhile
        return weights.packed if weights is not None else None

    @property
    def rest_bytes(self) -> int:
        """Bytes of the weights that are on the device beside units: what does not stream."""
        return self._rest.nbytes

    @property
    def beside(self) -> int | None:
        """Bytes that the process reserved beside units in the last measured forward; None before one was measured."""
        return self.adapter.beside if self.adapter is not None else None

    @property
    def measured(self) -> tuple[Timing, tuple[Unit, ...]] | None:
        """Compute times of a forward, and the units that they belong to; None where they were not measured."""
        return self.adapter.measured if self.adapter is not None else None

    @property
    def repeated(self) -> int:
        """How often a forward was begun again because memory ran out in it."""
        return self._forward.repeated

    # -- attach and detach ------------------------------------------------------------------------------------------

    @property
    def attached(self) -> bool:
        return self.plan is not None

    @property
    def computing(self) -> bool:
        """Whether a forward of the model is under way."""
        return self._forward.depth > 0

    def _attach(self, patches: Patches, packed: PackedModel | None, progress: Progress | None) -> None:
        started = time.perf_counter()
        if any(hasattr(module.__dict__.get("forward"), MARK) for module in self.root.modules()):
            raise RuntimeError(
                f"block swap is attached to {type(self.root).__name__}, or to a part of it, already; detach it first"
            )
        offload = find_offload_device(self.config.offload_device, self.device)
        streamed, rest = sort_tensors(self.root, self.config, self.scope)
        now = limit.now_free(self.device)
        self.limit = self.config.max_vram or limit.automatic_limit(now)
        self.weights = weights = Weights(self.device, self.config, streamed, packed, progress, offload)
        weights.lay_out(weights.lossless)
        for slotted, reason in weights.packed.left_out:
            log.warning("%s stays resident, because it cannot be packed: %s", slotted.path, reason)
        rest += [slotted for slotted, _ in weights.packed.left_out]
        self.adapter = Adapter(self)
        plan_that_fits(self, self.adapter.first(), rest, now)  # before anything is moved
        written = weights.pack(patches, meanwhile=lambda go_on: self._rest.place(rest, patches, go_on))
        weights.packed.owner = self
        first = plan_that_fits(self, self.adapter.first(), rest, now)
        self._patches = patches
        self._install()
        self._forward.outside_torch = snapshot(self.device).outside_torch
        with limit.held(self.device, limit.budget_now(self.device, self.limit, self._forward.outside_torch)):
            self._begin_with(first)
        self.setup_seconds = time.perf_counter() - started
        log.info(
            "block swap (%s) attached to %s in %.1f s: %s packed, %s of streamed weights in %s of RAM (%s page-locked), "
            "%s beside them on %s, limit %s; begins with %s",
            self.config.mode,
            type(self.root).__name__,
            self.setup_seconds,
            format_bytes(written),
            format_bytes(self.packed.packed_bytes),
            format_bytes(self.packed.host_bytes),
            format_bytes(self.packed.arena.page_locked_bytes),
            format_bytes(self.rest_bytes),
            self.device,
            format_bytes(self.limit),
            self.plan.describe(),
        )

    def take_other_weights(self, rates: Rates | None) -> None:
        """Between forwards: weights encoded at these ``rates``, or those decoded that were encoded for speed; packed anew, with
        the first plan. When that breaks off, the model is whole, and the next forward begins with packing them."""
        weights = self.weights
        self._undone = self._undone or self.plan
        self.streamer.drop_slots()
        if rates is None:
            weights.decode()
        weights.lay_out(AUTO, rates)
        self._laid_out_anew()
        weights.pack(self._patches)
        self._begin_with(self._undone)
        self._undone = None

    def _laid_out_anew(self) -> None:
        """What is packed from now on is not what units were made of: their memory is given back, and plans begin anew."""
        self.streamer.forget_sources()
        self.packed.owner = self
        self.adapter.failed()
        self._undone = self.adapter.first()

    def repack(self, patches: Patches) -> None:
        """Change the patches of an attached model between forwards: only the weights that they touch are packed again. When
        that fails, the ones before are in force; until they are again, no forward begins."""
        with self._forward.lock:
            try:
                self._change(patches)
            except BaseException:
                try:
                    self.mend()
                except Exception as error:
                    log.warning(
                        "weights that a LoRA changed could not be put back yet, and are before the next forward: %s",
                        str(error),
                    )
                raise

    def mend(self) -> None:
        """Finish what a change of patches that failed left undone."""
        if self._undone is not None or not self.weights.whole or self.packed.torn or self._rest.torn:
            self._change(self._patches)

    def _change(self, patches: Patches) -> None:
        with limit.held(self.device, limit.budget_now(self.device, self.limit, self._forward.outside_torch)):
            self._undone = self._undone or self.plan
            self.streamer.release_all()
            if not self.weights.whole:
                self.weights.lay_out_again()
                self._laid_out_anew()
            self._take_patches(patches)
            self._begin_with(self._undone)
            self._patches, self._undone = patches, None

    def _take_patches(self, patches: Patches) -> None:
        """Bring all weights, packed and on the device, up to date with ``patches``."""
        self._rest.unbind()
        before = self.packed
        try:
            self.weights.pack(patches)
            self._rest.update(patches)
        finally:
            self._rest.bind()
            if self.packed is not before and self.weights.whole:  # patched ones did not fit encoded
                self._laid_out_anew()

    def ready(self) -> None:
        """Weights whole, and page-locked as far as the budget goes, before a forward computes with them."""
        self.mend()
        if self.packed.use():
            self.sources_changed()

    @contextlib.contextmanager
    def idle(self) -> Iterator[bool]:
        """Whether no forward and no copy of the model is under way, see ``packing.Owner``."""
        if not self._forward.lock.acquire(blocking=False):
            yield False
            return
        try:
            if self._forward.depth or self.plan is None:
                yield False
                return
            with self.streamer.lock:
                for unit in self.streamer.units:
                    if unit.load is not None:
                        unit.load.failed()
                self.link.synchronize()
                yield True
        finally:
            self._forward.lock.release()

    def sources_changed(self) -> None:
        """Page-locked memory went to another model, or came back."""
        if self._undone is not None:
            return  # units are made anew before anything is streamed
        for unit, planned in zip(self.streamer.units, self.plan.units, strict=True):
            unit.source = self.packed.source(planned.first, planned.last)

    def tensors(self) -> Iterator[Slotted]:
        """All weights that the engine has in its hands, as they are in host memory without patches."""
        for layer in self.packed.layers:
            for packed in layer.entries:
                entry = packed.entry
                yield Slotted(entry.path, entry.owner, entry.name, entry.host)
        yield from self._rest.tensors()

    def _install(self) -> None:
        enter, leave = (
            hide_from_compile(as_function(self.streamer.enter)),
            hide_from_compile(as_function(self.streamer.leave)),
        )
        for index, packed in enumerate(self.packed.layers):
            module = packed.layer.module
            forward = gate(module.forward, _call(enter, index), _call(leave, index))
            self._instance.set(module, "forward", forward)
        blocks = [block for _, block in find_blocks(self.root, self.config.block_names)]
        for part in [self.root] if self.scope.outside else blocks:
            for module in part.modules():
                if module._parameters or module._buffers:
                    self._instance.set(module, "_apply", stay(module))
        within = self.scope.repeat
        if within == "forward":
            self._instance.set(self.root, "forward", self._forward.gate(self._forward.repeatable(self.root.forward)))
        else:
            self._instance.set(self.root, within, self._forward.repeatable(getattr(self.root, within)))
            self._instance.set(self.root, "forward", self._forward.gate(self.root.forward))

    def detach(self, keep_encoded: bool = False) -> PackedModel | None:
        """Take everything off the model: its own parameters, ``forward`` and ``to`` are back, its weights are in host
        memory, all device memory is given back. Returns the packed weights, which ``attach`` takes again.

        Weights that ``attach`` encoded are decoded, and None is returned. With ``keep_encoded`` they stay as they are, and
        read as plain ones do, until they are decoded by the ``coding`` of what is returned."""
        with self._forward.lock:
            if self._forward.depth:
                raise RuntimeError("block swap cannot be taken off a model while it computes")
            seen = self.adapter.seen() if self.adapter is not None else None
            self.streamer.close()
            self._instance.restore()
            self._rest.clear()
            weights, self.weights, self.plan = self.weights, None, None
            if weights is None:
                return None
            weights.coding.seen = seen or weights.coding.seen
            if weights.packed is not None:
                weights.packed.close()
            return None if not keep_encoded and weights.coding.decode() else weights.packed

    # -- plans -------------------------------------------------------------------------------------------------------

    def apply(self, plan: Plan) -> None:
        """Take over another plan between forwards. When memory runs out on the way, nothing is resident."""
        codings = self.packed.codings([(unit.first, unit.last) for unit in plan.units])
        units = [
            StreamUnit(
                index,
                unit.nbytes,
                self.packed.entries(unit.first, unit.last),
                self.packed.source(unit.first, unit.last),
                overlap=unit.block is not None,
                coding=codings[index],
                link_bytes=unit.link_bytes,
            )
            for index, unit in enumerate(plan.units)
        ]
        unit_of = [unit for unit, planned in zip(units, plan.units, strict=True) for _ in _layers(planned)]
        with self.streamer.lock:
            self.plan = Plan(plan.units, frozenset(), 0, 0)
            try:
                self.streamer.configure(units, unit_of, plan.slots, plan.slot_bytes)
                for index in sorted(plan.resident):
                    self.streamer.make_resident(units[index])
            except BaseException:
                self.adapter.failed()
                self.streamer.drop_slots()
                raise
            self.streamer.relearn()
            self.plan = plan

    def _begin_with(self, plan: Plan) -> None:
        """Take over the first plan, or the largest one below it that there is memory for."""
        while True:
            try:
                self.apply(plan)
                return
            except RuntimeError as error:
                if not out_of_memory(error) or not self.adapter.shrink():
                    raise
                let_go(error)
            plan = self.adapter.first()

    def evict(self, nbytes: int) -> int:
        """Give back at least ``nbytes`` of device memory at once, as far as resident units go; they stream from now on,
        also when the model is computing, on this thread or another. Returns the bytes given back, less what slots for them
        took."""
        with self.streamer.lock:
            before = self.streamer.device_bytes
            resident = [unit for unit in self.streamer.units if unit.resident is not None and not unit.active]
            slot_bytes = max((unit.nbytes for unit in resident), default=0)
            large = sum(slot.buffer.numel() >= slot_bytes for slot in self.streamer.slots)
            slots = 0 if self.streamer.floating and self.plan.streamed else max(0, 2 - large)
            left, evicted = nbytes + slots * slot_bytes, set()
            for unit in resident[1::2] + resident[0::2]:
                if left <= 0:
                    break
                left -= self.streamer.evict(unit)
                evicted.add(unit.index)
            if evicted:
                self.adapter.evicted()
                self.streamer.stream_evicted(slots, slot_bytes)
                plan = self.plan
                self.plan = Plan(
                    plan.units,
                    plan.resident - evicted,
                    len(self.streamer.slots),
                    max((slot.buffer.numel() for slot in self.streamer.slots), default=0),
                )
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            return max(0, before - self.streamer.device_bytes)

    @property
    def device_bytes(self) -> int:
        """Device memory that the model's weights take now: beside the blocks, resident, slots."""
        return self.rest_bytes + self.streamer.device_bytes


def _call(function: Callable[[int], None], index: int) -> Callable[[], None]:
    return lambda: function(index)


def _layers(unit: Unit) -> range:
    return range(unit.first, unit.last)
