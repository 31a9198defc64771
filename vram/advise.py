"""Settings that need no numbers: from a model's file, the machine and a few wishes to a plan and what it will do.

The balance starts where the reference implementation does: 10% of the card stay free, 80% of the free RAM may be used, a
threshold says how much of the card the model may have. It departs from it in three ways. Sizes are the file's, not four
bytes a weight. What does not fit is not a number of blocks from the end, but what the engine's own planner leaves streamed,
spread evenly. And the threshold is a share to begin with: where more VRAM makes a step faster, automatic tuning takes it, up
to what is free less the reserve; where it does not, because copies hide behind compute, the rest of the card stays free.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from . import last_runs
from .codec_nvcomp import is_installed
from .config import DEFAULT_BLOCK_SIZE, SwapConfig
from .hardware import CONTEXT, Hardware
from .hosts import traits
from .last_runs import LastRun
from .model_facts import ModelFacts, PackedSizes
from .plan import LayerSize, LimitTooSmall, within
from .predict import Prediction, Work, as_encoded, predict, work
from .units import MIB, format_bytes
from .worth import GAIN

RESERVE = 0.1  # of the card
USABLE_RAM = 0.8  # of what is free
WORTH = 0.01  # a forward that is faster by this share is worth more VRAM
STEP = 256 * MIB  # between the limits that automatic tuning looks at, at least
LIMITS = 24


@dataclass(frozen=True)
class Wishes:
    """What a user asks for; the inputs of IntelligentVRAMNode.

    auto: choose slots and how much of the link to count on by what was measured. threshold: share of the card that the process
    may use; grow: or more, where that makes a forward faster. blocks_to_swap, vace_blocks_to_swap: exactly so many streamed, 0
    and 0 is what the plan needs. cuda: adapt the plan to measured times. dram: page-lock the streamed weights. streams: how far
    to copy ahead. bandwidth: share of the measured link that is counted on. max_vram: bytes that the process may use, instead of
    the threshold. lossless: whether weights are kept encoded, as SwapConfig has it.
    """

    auto: bool = True
    threshold: float = 0.5
    grow: bool = True
    blocks_to_swap: int = 0
    vace_blocks_to_swap: int = 0
    cuda: bool = True
    dram: bool = True
    streams: int = 8
    bandwidth: float = 0.8
    max_vram: int | None = None
    block_size: int = DEFAULT_BLOCK_SIZE
    lossless: str = "auto"

    @property
    def slots(self) -> int:
        """Slots to copy ahead into: one for every two streams, 2 to 8."""
        return max(2, min(8, self.streams // 2))


PRESETS: dict[str, dict[str, Any]] = {
    "fast preview": {"auto": True, "threshold": 0.5},
    "standard": {"auto": True, "threshold": 0.5},
    "high quality": {"auto": True, "threshold": 0.5},
    "memory optimized": {"auto": True, "threshold": 0.4, "grow": False},
    "speed optimized": {"auto": True, "threshold": 0.6},
}
"""What the reference implementation's presets change here; their steps and schedulers are no matter of memory."""


@dataclass(frozen=True)
class Advice:
    """A configuration of the engine, what it will do (None: cannot be said of this model), and why. ``available``: bytes that
    this process can have of the card less the reserve; ``usable_ram`` bytes. ``remarks``: what the user should know."""

    config: SwapConfig
    prediction: Prediction | None
    available: int
    usable_ram: int
    remarks: tuple[str, ...]


def available_vram(card: Hardware) -> int:
    """Bytes of the card that this process can have, what it holds included, less a reserve of 10%."""
    reachable = (
        card.device_total - (card.others or 0) if card.reachable is None else card.reachable + card.outside_torch
    )
    return max(0, reachable - int(RESERVE * card.device_total))


def asked_limit(card: Hardware, limit: int) -> tuple[int, tuple[str, ...]]:
    """The limit that a user gave, no more than the card has, and a remark where that is less."""
    most = card.device_total if card.reachable is None else card.reachable + card.outside_torch
    if limit <= most:
        return limit, ()
    return most, (f"{format_bytes(limit)} of VRAM were asked for; the card has {format_bytes(most)} for this process",)


def context_of(card: Hardware) -> int:
    """Bytes of the process outside torch's allocator: as measured, or what is usual where that is not known."""
    return card.outside_torch or (CONTEXT if card.device != "cpu" else 0)


def advise(
    facts: ModelFacts | None,
    card: Hardware,
    wishes: Wishes,
    tokens: int,
    host: str,
    attention: float | None = None,
    as_last_run: bool = False,
) -> Advice:
    """The best configuration for ``facts`` on ``card``, for ``tokens`` tokens in ``host`` (see hosts/traits.py).

    ``attention``: FLOP/s of the host's own attention where that was measured. ``as_last_run``: for the same as the model's last
    run in this process, whatever ``tokens`` says, where it has run. Of no model, or one of an unknown family,
    nothing is predicted: the engine measures its first step. Raises NoBlocks, and LimitTooSmall where the card does not hold
    even the smallest plan.
    """
    shape = traits.shape_of(facts) if facts is not None else None
    if facts is None or shape is None:
        return _unpredicted(facts, card, wishes)
    base = traits.config_in(host, SwapConfig(block_size=wishes.block_size), facts.block_lists)
    sizes, beside = traits.sizes_in(host, facts, base)
    amount = work(facts.block_parameters, shape, traits.costs_of(host, facts), card, tokens, attention)
    remarks: tuple[str, ...] = ()
    if as_last_run:
        run = last_runs.find(sizes.layers)
        amount = amount if run is None else run.work(beside)
        remarks = (_words(run),)
    advice = _Adviser(facts, card, wishes, sizes, beside, amount).advise(base)
    advice = replace(advice, remarks=(*remarks, *advice.remarks))
    if facts.family not in traits.MEASURED:
        known = ", ".join(traits.MEASURED)
        remark = f"the constants behind time and activations were measured with {known}, not with {facts.family}"
        advice = replace(advice, remarks=(*advice.remarks, remark))
    return advice


def _words(run: LastRun | None) -> str:
    if run is None:
        return (
            "this model has not run through block swap in this session, so the size is predicted for, not the last run"
        )
    return (
        f"predicted for the same as the model's last run: {run.seconds:.3f} s of compute a forward, {format_bytes(run.beside)} beside "
        "the units"
    )


def _unpredicted(facts: ModelFacts | None, card: Hardware, wishes: Wishes) -> Advice:
    what = "no model is connected or named" if facts is None else f"{facts.description}: its family is not known"
    available, usable_ram = available_vram(card), int(USABLE_RAM * card.host_available)
    limit, remarks = available if wishes.grow else min(available, int(wishes.threshold * card.device_total)), ()
    if wishes.max_vram is not None:
        limit, remarks = asked_limit(card, wishes.max_vram)
    count = wishes.blocks_to_swap + wishes.vace_blocks_to_swap
    base = SwapConfig(max_vram=limit, block_size=wishes.block_size)
    config = _config(base, card, wishes, usable_ram, count or None)
    remark = f"{what}, so nothing is predicted; the engine measures the first step and plans then"
    return Advice(config, None, available, usable_ram, (remark, *remarks))


def _config(base: SwapConfig, card: Hardware, wishes: Wishes, usable_ram: int, streamed: int | None) -> SwapConfig:
    """``base`` with what the user chose; ``streamed``: how many blocks, None for what the plan needs."""
    return replace(
        base,
        mode="adaptive" if wishes.cuda else "chunkwise",
        slots=None if wishes.auto else wishes.slots,
        streamed_blocks=streamed,
        host_budget=min(usable_ram, card.pinnable) if wishes.dram else 0,
        lossless=wishes.lossless,
    )


class _Adviser:
    """The balance for one model, card and workload."""

    def __init__(
        self, facts: ModelFacts, card: Hardware, wishes: Wishes, sizes: PackedSizes, beside: int, amount: Work
    ) -> None:
        self.facts = facts
        self.card = card
        self.wishes = wishes
        self.sizes = sizes
        self.beside = beside
        self.work = amount
        self.available = available_vram(card)
        self.usable_ram = int(USABLE_RAM * card.host_available)
        self.remarks: list[str] = []
        self._encoded: tuple[LayerSize, ...] | None = None
        if wishes.lossless != "off" and card.device != "cpu" and is_installed():
            self._encoded = as_encoded(sizes.layers, facts.weights)
        self._link = card.to_device * (1.0 if wishes.auto else wishes.bandwidth)

    def advise(self, base: SwapConfig) -> Advice:
        """The configuration for what the user chose, at the limit that is best."""
        wishes = self.wishes
        config = _config(base, self.card, wishes, self.usable_ram, self._blocks())
        limits = self._limits()
        growing = wishes.auto and wishes.grow and config.streamed_blocks is None
        prediction = self._fast_enough(config, limits) if growing else self._first(config, limits)
        # which lists hold blocks is the host's to say
        return self._advice(replace(config, max_vram=prediction.limit, block_names=None), prediction)

    def _first(self, config: SwapConfig, limits: list[int]) -> Prediction:
        """At the smallest limit that holds the smallest plan."""
        found = next((p for limit in limits if (p := self._try(config, limit)) is not None), None)
        return found or self._predict(config, limits[-1])

    def _fast_enough(self, config: SwapConfig, limits: list[int]) -> Prediction:
        """At the smallest limit at which a forward is as fast as with all that is available, found by halving: more VRAM makes
        nothing slower."""
        best = most = self._predict(config, limits[-1])
        low, high = 0, len(limits) - 1
        while low < high:
            middle = (low + high) // 2
            fast = (1 + WORTH) * most.seconds
            prediction = self._try(config, limits[middle]) if self._floor(limits[middle]) <= fast else None
            if prediction is None or prediction.seconds > fast:
                low = middle + 1
            else:
                high, best = middle, prediction
        return best

    def _floor(self, limit: int) -> float:
        """Seconds that a forward takes at least to copy what ``limit`` cannot hold."""
        held = limit - context_of(self.card) - self.beside - self.work.least
        return (self.sizes.packed_bytes - held) / self._link

    def _limits(self) -> list[int]:
        """Limits to look at, from the threshold to what is available."""
        if self.wishes.max_vram is not None:
            limit, remark = asked_limit(self.card, self.wishes.max_vram)
            self.remarks += remark
            return [limit]
        first = min(int(self.wishes.threshold * self.card.device_total), self.available)
        count = min(LIMITS, (self.available - first) // STEP)
        return [first + (self.available - first) * index // max(1, count) for index in range(count + 1)]

    def _try(self, config: SwapConfig, limit: int) -> Prediction | None:
        try:
            return self._predict(config, limit)
        except LimitTooSmall:
            return None

    def _predict(self, config: SwapConfig, limit: int) -> Prediction:
        """With plain weights, or encoded ones: as the user says, else as the engine will choose."""

        def of(layers: Sequence[LayerSize]) -> Prediction:
            return predict(layers, config, limit, self.work, self.beside, self._link, context_of(self.card))

        if self._encoded is not None and self.wishes.lossless == "on":
            return of(self._encoded)
        plain = of(self.sizes.layers)
        must = config.host_budget is not None and plain.arena > config.host_budget
        if self._encoded is None or not (must or plain.seconds > (1 + GAIN) * plain.compute):
            return plain
        encoded = of(self._encoded)
        return encoded if must or encoded.seconds < (1 - GAIN) * plain.seconds else plain

    def _blocks(self) -> int | None:
        wishes = self.wishes
        if not wishes.blocks_to_swap and not wishes.vace_blocks_to_swap:
            return None
        vace = sum(count for name, count in self.facts.block_lists.items() if name.startswith("vace"))
        asked = {"blocks": wishes.blocks_to_swap, "VACE blocks": wishes.vace_blocks_to_swap}
        count, remarks = within(asked, {"blocks": len(self.facts.blocks) - vace, "VACE blocks": vace})
        self.remarks += remarks
        return count

    def _advice(self, config: SwapConfig, prediction: Prediction) -> Advice:
        missing = prediction.arena - self.card.host_available
        if missing > 0:
            self.remarks.append(
                f"RAM is too small by {format_bytes(missing)}: the streamed weights take {format_bytes(prediction.arena)} and "
                f"{format_bytes(self.card.host_available)} are free. A model in FP8 or a GGUF file of half the size would fit"
            )
        elif prediction.arena > (config.host_budget or 0) and prediction.plan.streamed:
            self.remarks.append(
                f"{format_bytes(prediction.arena - (config.host_budget or 0))} of the weights will not be page-locked and "
                "pass through a staging ring, which is slower than predicted"
            )
        return Advice(config, prediction, self.available, self.usable_ram, tuple(self.remarks))
