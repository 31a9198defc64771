"""Which plan the settings lead to: the engine asks with what it measured, the prediction with what it expects."""

from __future__ import annotations

from collections.abc import Sequence

from .config import SwapConfig
from .plan import LayerSize, Plan, Timing, Unit, by_block, choose, cut, fit, single_layers, stream_all, stream_blocks
from .units import MIB

FIRST_SLOTS = 3
MARGIN = 32 * MIB  # of the limit, left free


def as_asked(config: SwapConfig, layers: Sequence[LayerSize]) -> Plan | None:
    """The plan of settings that leave no choice: a number of streamed blocks, or layerwise mode. None for all others."""
    single = config.mode == "layerwise"
    if config.streamed_blocks is not None:
        units = single_layers(layers) if single else cut(by_block(layers), config.block_size)
        return stream_blocks(units, config.streamed_blocks, 0 if single else config.slots or FIRST_SLOTS)
    return stream_all(single_layers(layers), 0) if single else None


def best(
    config: SwapConfig, layers: Sequence[LayerSize], room: int, timing: Timing | None, timed: Sequence[Unit]
) -> Plan | None:
    """The plan for ``room`` bytes of units in adaptive or chunkwise mode, None where none fits. ``timing``: what a forward
    takes, by the units ``timed``; None while that is not known."""
    if config.mode == "adaptive" and timing is not None and config.slots is None:
        return choose(layers, timed, timing, room, config.block_size)
    units = cut(layers, config.block_size)
    return fit(units, room, config.slots or FIRST_SLOTS) or fit(units, room, 2)
