"""What the last run of each model took, for planning the next one like it: kept for the life of the process."""

from __future__ import annotations

import statistics
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .plan import LayerSize, Timing, Unit, rescale, single_layers
from .predict import Work

if TYPE_CHECKING:
    from .swap import Swap

KEPT = 8
RECENT = 3
ALIKE = 0.1  # runs within this share of each other are of the same kind


@dataclass(frozen=True)
class LastRun:
    """Of the last forwards of a run: ``blocks`` are the compute seconds of each block, ``outside`` those of the rest, ``beside``
    the bytes that the process reserved for everything but units."""

    blocks: tuple[float, ...]
    outside: float
    beside: int

    def work(self, weights: int) -> Work:
        """The same as what the next forward will take, where ``weights`` bytes lie beside the units."""
        activations = max(0, self.beside - weights)
        return Work(self.blocks, self.outside, activations, activations)

    def differs(self, other: LastRun) -> bool:
        """Whether a plan for one of both might not do for the other."""
        return (
            abs(self.beside - other.beside) > ALIKE * other.beside
            or abs(self.seconds - other.seconds) > ALIKE * other.seconds
        )

    @property
    def seconds(self) -> float:
        """Compute of a forward."""
        return sum(self.blocks) + self.outside


_runs: OrderedDict[Hashable, LastRun] = OrderedDict()
_number = 0


def _key(layers: Sequence[LayerSize]) -> Hashable:
    """What tells models apart before one is loaded: the bytes of their layers, in order."""
    return tuple((layer.nbytes, layer.block) for layer in layers)


def note(swap: Swap) -> None:
    """Keep what the last forwards of ``swap`` took. Does nothing where none was measured."""
    global _number
    records, beside, layers = swap.telemetry.records()[-RECENT:], swap.beside, swap.packed.sizes
    if not records or beside is None:
        return
    run = LastRun(*_per_block(swap.measured, layers, statistics.median(record.compute for record in records)), beside)
    key = _key(layers)
    before = _runs.pop(key, None)
    _runs[key] = run
    if before is None or run.differs(before):
        _number += 1
    while len(_runs) > KEPT:
        _runs.popitem(last=False)


def number() -> int:
    """A number that changes when a run was unlike the last one of its model."""
    return _number


def find(layers: Sequence[LayerSize]) -> LastRun | None:
    """The last run of a model with ``layers``, or None."""
    return _runs.get(_key(layers))


def _per_block(
    measured: tuple[Timing, tuple[Unit, ...]] | None, layers: Sequence[LayerSize], seconds: float
) -> tuple[tuple[float, ...], float]:
    """``seconds`` shared among the blocks and the rest: as they were measured, else by their bytes."""
    if measured is None:
        shares, outside = tuple(float(layer.nbytes) for layer in layers), 0.0
    else:
        timing, units = measured
        shares, outside = rescale(timing, units, single_layers(layers), layers).compute, timing.outside
    scale = seconds / max(1e-9, sum(shares) + outside)
    blocks = [0.0] * (1 + max((layer.block for layer in layers if layer.block is not None), default=-1))
    for layer, share in zip(layers, shares, strict=True):
        if layer.block is None:
            outside += share
        else:
            blocks[layer.block] += share * scale
    return tuple(blocks), outside * scale
