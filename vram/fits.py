"""Whether a plan fits the limit before anything is moved, and what to say when none does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from . import limit
from .discover import Slotted, tensor_bytes
from .memory import MemorySnapshot
from .plan import LimitTooSmall, Plan, single_layers, stream_all
from .units import format_bytes

if TYPE_CHECKING:
    from .swap import Swap


def plan_that_fits(swap: Swap, plan: Plan, rest: Sequence[Slotted], now: MemorySnapshot) -> Plan:
    """``plan``, or the smallest one of its kind where that does not fit. Raises LimitTooSmall when the weights alone do not
    fit."""
    distinct = {id(slotted.tensor): tensor_bytes(slotted.tensor) for slotted in rest}
    beside = sum(distinct.values()) + (now.allocated or 0)
    budget = limit.torch_budget(swap.limit, now)
    if beside + plan.device_bytes <= budget:
        return plan
    smallest = plan if swap.config.streamed_blocks is not None else stream_all(plan.units, 2 if plan.slots else 0)
    needed = beside + smallest.device_bytes
    if needed <= budget:
        return smallest
    least = needed + max(0, swap.limit - budget)
    if swap.config.streamed_blocks is not None:
        advice = " blocks_to_swap keeps all other blocks there: raise it, or let it be 0 to stream as many as it takes."
    else:
        layers = stream_all(single_layers(swap.weights.sizes), 0).device_bytes + beside
        advice = (
            f" Layerwise mode would do with about {format_bytes(layers + swap.limit - budget)}."
            if swap.config.mode != "layerwise" and layers < needed
            else ""
        )
    raise LimitTooSmall(
        f"max_vram is {format_bytes(swap.limit)}, of which {format_bytes(budget)} can be used here, but "
        f"{type(swap.root).__name__} needs {format_bytes(needed)} before any activation: "
        f"{format_bytes(beside)} beside the blocks and {format_bytes(needed - beside)} for resident and streamed units. The "
        f"smallest limit that holds its weights is {format_bytes(least)}; activations come on top.{advice}",
        least,
    )
