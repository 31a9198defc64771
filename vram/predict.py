"""What a run will take, before anything is loaded: device memory by use, RAM, and seconds of a forward.

Sizes of the model are exact (model_facts.py). Compute follows from its operations and the measured rates of the card
(hardware.py), activations from the number of tokens; both with a few constants of a host's implementation, which were
measured (benchmarks/README.md) and belong to no card. The plan is the one that the engine will choose: the same functions
choose it, from the predicted timing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from .config import SwapConfig
from .hardware import Hardware
from .model_headers import Weight
from .plan import LayerSize, LimitTooSmall, Plan, Timing, Unit, allocated, by_block, cut, rescale, simulate, stream_all
from .policy import MARGIN, as_asked, best
from .units import format_bytes

OUTSIDE = 0.01  # time outside the blocks, as a share of theirs
# what encoding leaves of weights in a dtype, measured (benchmarks/README.md), with the room for patched ones
ENCODED = {"bfloat16": 0.68, "float16": 0.87, "float8_e4m3fn": 0.86, "float8_e5m2": 0.735, "int8": 0.91}


@dataclass(frozen=True)
class Shape:
    """What the compute of a transformer's blocks follows from. ``text_tokens`` are attended to beside the video or image
    tokens, ``text_parameters`` of each block are applied to them and not to the others."""

    width: int
    text_tokens: int = 0
    text_parameters: int = 0


@dataclass(frozen=True)
class Costs:
    """Of a host's implementation of a family of models.

    activation: bytes that the allocator reserves beside weights, for each token and unit of width, where it may; least: with
    which it makes do under a tight limit; fixed: bytes besides.
    passes: how often a block reads or writes a tensor of [tokens, width], two bytes an element, outside of products.
    weight_bytes: bytes read or written for each parameter outside of products (weights that are cast at each use).
    calls: operations that Python starts for a block; a block takes no less time than starting them. fp8_products: whether FP8 weights are multiplied
    as such.
    """

    activation: float
    least: float
    fixed: int
    passes: float
    calls: float
    weight_bytes: float = 0.0
    fp8_products: bool = False


@dataclass(frozen=True)
class Work:
    """Seconds and bytes that a forward takes whatever is streamed. ``blocks``: seconds of each block, ``outside``: seconds of the
    rest. ``activations``: bytes that the allocator reserves beside weights, ``least``: with which it makes do, ``grain``: steps in
    which it reserves."""

    blocks: tuple[float, ...]
    outside: float
    activations: int
    least: int
    grain: int = 0


@dataclass(frozen=True)
class Prediction:
    """Bytes and seconds of one forward under ``plan``. ``context``: device memory of the process outside the allocator;
    ``beside``: weights outside the blocks; ``activations``: what else the allocator reserves."""

    plan: Plan
    limit: int
    context: int
    beside: int
    activations: int
    seconds: float
    compute: float
    link: float
    arena: int

    @property
    def slot_bytes(self) -> int:
        """Bytes of slots; what the allocator rounds resident units up by counts to those."""
        plan = self.plan
        return plan.device_bytes - sum(allocated(plan.units[index].nbytes) for index in plan.resident)

    @property
    def resident_bytes(self) -> int:
        return self.plan.device_bytes - self.slot_bytes

    @property
    def peak(self) -> int:
        """Device memory of the whole process at its most."""
        return self.context + self.beside + self.activations + self.plan.device_bytes

    @property
    def floor(self) -> float:
        """Seconds that no schedule beats without moving fewer bytes."""
        return max(self.compute, self.plan.streamed_bytes / self.link)

    def describe(self) -> str:
        """In plain words, with numbers that add up."""
        return (
            f"{format_bytes(self.peak)} of {format_bytes(self.limit)}: {format_bytes(self.resident_bytes)} resident, "
            f"{format_bytes(self.slot_bytes)} slots, {format_bytes(self.beside)} beside the blocks, "
            f"{format_bytes(self.activations)} activations, {format_bytes(self.context)} CUDA context; "
            f"{self.seconds:.3f} s a forward (floor {self.floor:.3f} s, compute alone {self.compute:.3f} s); "
            + self.plan.describe()
        )


def as_encoded(layers: Sequence[LayerSize], weights: Sequence[Weight]) -> tuple[LayerSize, ...]:
    """Layers as planning sees them where they are kept encoded: by the dtype that most bytes of the model's weights have."""
    taken: Counter[str] = Counter()
    for weight in weights:
        taken[weight.dtype] += weight.nbytes
    share = ENCODED.get(taken.most_common(1)[0][0]) if taken else None
    if share is None:
        return tuple(layers)
    return tuple(layer._replace(encoded=int(share * layer.nbytes)) for layer in layers)


def work(
    parameters: Sequence[int], shape: Shape, costs: Costs, card: Hardware, tokens: int, attention: float | None = None
) -> Work:
    """The work of a forward over ``tokens`` tokens on ``card``; ``parameters``: how many each block has, in order;
    ``attention``: FLOP/s of the host's own attention, by default that of the card.

    Products take 2 FLOP a parameter and token, attention 4 FLOP a pair of tokens and unit of width (q k and the sum over
    v).
    """
    linear = card.matmul_fp8 if costs.fp8_products and card.matmul_fp8 is not None else card.matmul
    pairs = 4 * tokens * (tokens + shape.text_tokens) * shape.width / (attention or card.attention)
    passes = costs.passes * 2 * tokens * shape.width / card.memory
    seconds = []
    for count in parameters:
        text = min(count, shape.text_parameters)
        products = 2 * (tokens * (count - text) + shape.text_tokens * text) / linear
        casts = costs.weight_bytes * count / card.memory
        seconds.append(max(costs.calls / card.calls, products + pairs + passes + casts))
    activations, least = (round(rate * tokens * shape.width) + costs.fixed for rate in (costs.activation, costs.least))
    return Work(tuple(seconds), OUTSIDE * sum(seconds), activations, least, grain=2 * tokens * shape.width)


def predict(
    layers: Sequence[LayerSize], config: SwapConfig, limit: int, work: Work, beside: int, link: float, context: int
) -> Prediction:
    """What the engine will do with ``layers`` under ``limit`` bytes for the whole process.

    ``beside``: bytes of the weights outside the blocks, ``link``: bytes per second, ``context``: bytes of the process
    outside the allocator. Raises LimitTooSmall when the limit does not hold the smallest plan of the mode.
    """
    units = cut(layers if config.streamed_blocks is None else by_block(layers), config.block_size)
    timing = Timing(_per_unit(layers, units, work), work.outside, link)
    free = limit - context - beside
    room = free - work.activations - MARGIN
    plan = as_asked(config, layers) or best(config, layers, room, timing, units) or stream_all(units, 2)
    activations = min(work.activations, free - plan.device_bytes)
    if (
        work.least < activations < work.activations
    ):  # another grain would not fit, and half of one is left on the average
        activations = max(work.least, activations - work.grain // 2)
    if activations < work.least:
        needed = limit - activations + work.least
        raise LimitTooSmall(
            f"{format_bytes(limit)} of VRAM do not hold the smallest plan: {format_bytes(needed)} are needed, of which "
            f"{format_bytes(work.least)} are activations and {format_bytes(plan.device_bytes)} streamed units. Allow more, use "
            "swap_mode layerwise, or a smaller resolution or fewer frames.",
            needed,
        )
    seconds = simulate(plan, rescale(timing, units, plan.units, layers))
    compute = sum(work.blocks) + work.outside
    arena = sum(layer.link_bytes for layer in layers)
    return Prediction(plan, limit, context, beside, activations, seconds, compute, link, arena)


def _per_unit(layers: Sequence[LayerSize], units: Sequence[Unit], work: Work) -> tuple[float, ...]:
    """A block's seconds shared among its units by their bytes."""
    of_block: dict[int | None, int] = {}
    for layer in layers:
        of_block[layer.block] = of_block.get(layer.block, 0) + layer.nbytes
    per_layer = [
        0.0 if layer.block is None else work.blocks[layer.block] * layer.nbytes / max(1, of_block[layer.block])
        for layer in layers
    ]
    return tuple(sum(per_layer[unit.first : unit.last]) for unit in units)
