"""What the picture of a plan shows: blocks, VRAM by use, and times; pure. picture.py draws it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite

from .plan import Plan
from .predict import Prediction

MOST_LISTS = 10  # of more lists of blocks all become one
OUTSIDE = "outside the blocks"


@dataclass(frozen=True)
class Cell:
    """One or more blocks of a list, from number ``first`` on. ``parts``: bytes of their units in order, and whether these
    are streamed."""

    first: int
    parts: tuple[tuple[int, bool], ...]

    @property
    def state(self) -> str:
        """In a word: "resident", "streamed", "partly", "not in the plan"."""
        streamed = {is_streamed for _, is_streamed in self.parts}
        if len(streamed) == 2:
            return "partly"
        return "not in the plan" if not streamed else "streamed" if streamed.pop() else "resident"


def block_cells(plan: Plan, block_lists: Mapping[str, int] | None = None) -> dict[str, list[Cell]]:
    """A cell for each block, by the lists' names; without lists, and for blocks beyond them, as many as the plan has.

    A unit of several small blocks bears the number of the first, so a block without a unit of its own gets that of the
    block before it. Units outside the blocks make one more cell.
    """
    lists = {name: count for name, count in (block_lists or {}).items() if count > 0}
    beyond = max((unit.block + 1 for unit in plan.units if unit.block is not None), default=0) - sum(lists.values())
    if beyond > 0:
        lists["further blocks" if lists else "blocks"] = beyond
    if len(lists) > MOST_LISTS:
        lists = {"blocks of all lists": sum(lists.values())}
    blocks: list[list[tuple[int, bool]]] = [[] for _ in range(sum(lists.values()))]
    outside: list[tuple[int, bool]] = []
    for index, unit in enumerate(plan.units):
        (outside if unit.block is None else blocks[unit.block]).append((unit.nbytes, index not in plan.resident))
    for number in range(1, len(blocks)):
        blocks[number] = blocks[number] or blocks[number - 1][-1:]
    cells: dict[str, list[Cell]] = {}
    start = 0
    for name, count in lists.items():
        cells[name] = [Cell(number, tuple(blocks[start + number])) for number in range(count)]
        start += count
    if outside:
        cells[OUTSIDE] = [Cell(0, tuple(outside))]
    return cells


def join_cells(cells: list[Cell], count: int) -> list[Cell]:
    """``count`` neighbours in each cell."""
    groups = [cells[start : start + count] for start in range(0, len(cells), count)]
    return [Cell(group[0].first, tuple(part for cell in group for part in cell.parts)) for group in groups]


@dataclass(frozen=True)
class Use:
    """What a part of the card is used for. ``nbytes`` may be 0."""

    label: str
    nbytes: int


@dataclass(frozen=True)
class Memory:
    """The card from its first byte to its last. ``limit`` and ``total`` are 0 where they are not known; ``excess``: by what
    the peak is above what there is, in words and bytes."""

    uses: tuple[Use, ...]
    peak: int
    limit: int
    total: int
    excess: tuple[str, int] | None

    @property
    def span(self) -> int:
        """Bytes that the bar stands for."""
        return max(1, self.total, self.limit, sum(use.nbytes for use in self.uses))


def memory_by_use(prediction: Prediction, device_total: int, others: int | None) -> Memory:
    """The prediction's bytes, in the order of the bar. Other programs are at the card's end, or behind the peak where
    there is less room."""
    total, limit, others = _bytes(device_total), _bytes(prediction.limit), _bytes(others)
    plan = prediction.plan
    slots = prediction.slot_bytes if plan.streamed else 0  # without streamed units it is what the allocator rounds up
    used = [
        Use("CUDA context", _bytes(prediction.context)),
        Use("beside the blocks", _bytes(prediction.beside)),
        Use("resident", plan.device_bytes - slots),
        Use("slots", slots),
        Use("activations", _bytes(prediction.activations)),
    ]
    peak = sum(use.nbytes for use in used)
    there = total - others if total else limit
    end = max(peak, there)
    free = max(0, min(limit, end) - peak)
    excess = None
    if limit and peak > limit:
        excess = ("above the limit", peak - limit)
    elif total and peak > there:
        excess = ("more than is free", peak - there)
    uses = [
        *used,
        Use("free within the limit", free),
        Use("rest of the card", end - peak - free),
        Use("other programs", others),
    ]
    return Memory(tuple(uses), peak, limit, total, excess)


def times(prediction: Prediction) -> dict[str, float | None]:
    """Seconds of one forward by the names of the bars; None where they cannot be told."""
    link, compute = _known(prediction.link), _known(prediction.compute)
    streamed = prediction.plan.streamed_bytes
    copies = 0.0 if not streamed else _known(streamed / link) if link else None
    return {
        "predicted": _known(prediction.seconds),
        "floor": None if copies is None or compute is None else max(compute, copies),
        "compute alone": compute,
        "copies alone": copies,
    }


def _known(number: float | None) -> float | None:
    """A size or a time; None for what is none."""
    return number if number is not None and isfinite(number) and number >= 0 else None


def _bytes(size: int | None) -> int:
    return int(_known(size) or 0)
