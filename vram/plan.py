"""Pure planning: sizes, a budget and timings in, a plan out. Nothing here touches a device or a module.

A plan says which units are resident, which are streamed, and through how many slots. See shared words in README.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import accumulate, pairwise

from .units import format_bytes

MODES = ("adaptive", "chunkwise", "layerwise")
SMALL_UNIT = 64 << 20  # below this the host's work for each unit begins to count
SLOT_CHOICES = (2, 3, 4, 5, 6, 8)


class LimitTooSmall(ValueError):
    """The VRAM limit does not hold what the mode needs; ``needed`` is the smallest limit in bytes that would do."""

    def __init__(self, message: str, needed: int) -> None:
        super().__init__(message)
        self.needed = needed


def allocated(nbytes: int) -> int:
    """Bytes that torch's CUDA allocator takes for a buffer: from 10 MiB on it rounds up to 2 MiB
    (c10/cuda/CUDACachingAllocator.cpp, ``get_allocation_size``)."""
    return nbytes if nbytes < 10 << 20 else -(-nbytes // (2 << 20)) * (2 << 20)


@dataclass(frozen=True)
class LayerSize:
    """A layer as planning sees it: ``nbytes`` in its segment (aligned), and ``segment``, the packed buffer it lies in.
    ``block`` is the index of the block it belongs to, or None outside the block lists."""

    nbytes: int
    segment: int
    block: int | None


@dataclass(frozen=True)
class Unit:
    """Layers ``first`` to ``last`` (exclusive) of one segment, moved by one copy of ``nbytes``."""

    first: int
    last: int
    nbytes: int
    block: int | None = None


@dataclass(frozen=True)
class Timing:
    """Measured seconds of one forward: ``compute`` per unit of the plan it was measured with, ``outside`` of all
    units, and ``bandwidth`` of the link in bytes per second."""

    compute: tuple[float, ...]
    outside: float
    bandwidth: float


@dataclass(frozen=True)
class Plan:
    """Which units are resident and which are streamed. ``slots`` buffers of ``slot_bytes`` hold streamed units;
    ``slots == 0`` with streamed units means that each load gets memory of its own size (layerwise)."""

    units: tuple[Unit, ...]
    resident: frozenset[int]
    slots: int
    slot_bytes: int

    @property
    def streamed(self) -> tuple[int, ...]:
        """Indices of the streamed units, in order."""
        return tuple(index for index in range(len(self.units)) if index not in self.resident)

    @property
    def resident_bytes(self) -> int:
        return sum(self.units[index].nbytes for index in self.resident)

    @property
    def streamed_bytes(self) -> int:
        """Bytes that cross the link in one forward."""
        return sum(self.units[index].nbytes for index in self.streamed)

    @property
    def device_bytes(self) -> int:
        """Bytes of device memory that resident units and slots take. Without fixed slots: the two largest units."""
        resident = sum(allocated(self.units[index].nbytes) for index in self.resident)
        if self.slots or not self.streamed:
            return resident + self.slots * allocated(self.slot_bytes)
        return resident + sum(sorted(allocated(self.units[index].nbytes) for index in self.streamed)[-2:])

    def describe(self) -> str:
        """One line in plain words, with numbers."""
        slots = f"{self.slots} slots of {format_bytes(self.slot_bytes)}" if self.slots else "memory on demand"
        return (
            f"{len(self.streamed)} of {len(self.units)} units streamed ({format_bytes(self.streamed_bytes)} a forward, "
            f"through {slots}), {len(self.resident)} resident ({format_bytes(self.resident_bytes)})"
            if self.streamed
            else f"all {len(self.units)} units resident ({format_bytes(self.resident_bytes)})"
        )


def cut(layers: Sequence[LayerSize], limit: int) -> tuple[Unit, ...]:
    """Units of consecutive layers of up to ``limit`` bytes, within segments: as few as possible, and then as even
    as possible, because the largest decides the size of a slot. A layer larger than ``limit`` is a unit of its own.
    """
    return _cut(tuple(layers), limit)


@lru_cache(maxsize=16)
def _cut(layers: tuple[LayerSize, ...], limit: int) -> tuple[Unit, ...]:
    units: list[Unit] = []
    start = 0
    for index in range(1, len(layers) + 1):
        if index == len(layers) or layers[index].segment != layers[start].segment:
            units += _cut_segment(layers, start, index, limit)
            start = index
    return tuple(units)


def _cut_segment(layers: Sequence[LayerSize], first: int, last: int, limit: int) -> list[Unit]:
    sizes = [layer.nbytes for layer in layers[first:last]]
    count = len(_groups(sizes, limit))
    low, high = 0, limit  # the smallest cap that needs no more groups; fewer bytes a group never need fewer groups
    while low < high:
        middle = (low + high) // 2
        if len(_groups(sizes, middle)) <= count:
            high = middle
        else:
            low = middle + 1
    bounds = [0, *_groups(sizes, low)]
    return [Unit(first + a, first + b, sum(sizes[a:b]), layers[first + a].block) for a, b in pairwise(bounds)]


def _groups(sizes: Sequence[int], cap: int) -> list[int]:
    """End indices of greedy runs whose sums are at most ``cap`` (a single larger size is a run)."""
    ends, total = [], 0
    for index, size in enumerate(sizes):
        if total and total + size > cap:
            ends.append(index)
            total = 0
        total += size
    return [*ends, len(sizes)]


def by_block(layers: Sequence[LayerSize]) -> list[LayerSize]:
    """``layers`` with segments that end where blocks do, so that no unit spans two blocks."""
    numbers: dict[tuple[int, int | None], int] = {}
    return [replace(layer, segment=numbers.setdefault((layer.segment, layer.block), len(numbers))) for layer in layers]


def single_layers(layers: Sequence[LayerSize]) -> tuple[Unit, ...]:
    """A unit per layer."""
    return tuple(Unit(index, index + 1, layer.nbytes, layer.block) for index, layer in enumerate(layers))


def spread(count: int, streamed: int) -> tuple[int, ...]:
    """``streamed`` of ``count`` indices, as evenly as possible with the wrap-around counted: gaps differ by one."""
    return tuple((2 * index + 1) * count // (2 * streamed) for index in range(streamed))


def stream_all(units: Sequence[Unit], slots: int) -> Plan:
    """Every unit streamed, through ``slots`` buffers of the largest unit's size (0: memory on demand)."""
    slots = min(slots, len(units))
    return Plan(tuple(units), frozenset(), slots, max((u.nbytes for u in units), default=0) if slots else 0)


def stream_blocks(units: Sequence[Unit], streamed_blocks: int, slots: int) -> Plan:
    """The units of ``streamed_blocks`` blocks streamed, spread evenly; all other units resident. More than there
    are is all of them."""
    blocks = sorted({unit.block for unit in units if unit.block is not None})
    chosen = {blocks[index] for index in spread(len(blocks), min(streamed_blocks, len(blocks)))}
    return _with_resident(units, [i for i, unit in enumerate(units) if unit.block not in chosen], slots)


def _with_resident(units: Sequence[Unit], resident: Sequence[int], slots: int) -> Plan:
    kept = frozenset(resident)
    streamed = [unit.nbytes for index, unit in enumerate(units) if index not in kept]
    slots = min(slots, len(streamed))
    return Plan(tuple(units), kept, slots, max(streamed, default=0) if slots else 0)


def fit(units: Sequence[Unit], budget: int, slots: int) -> Plan | None:
    """As many units resident as ``budget`` bytes hold beside ``slots`` slots, the streamed ones spread evenly.
    None when not even the slots fit."""
    sizes = [allocated(unit.nbytes) for unit in units]
    total = left = sum(sizes)
    fewest = 0  # so many have to be streamed even if they were the largest
    for size in sorted(sizes, reverse=True):
        if left <= budget:
            break
        left -= size
        fewest += 1
    smallest = [0, *accumulate(sorted(sizes))]
    best: tuple[int, tuple[int, ...]] | None = None
    count, step = fewest, 2 * max(sizes, default=1)
    # sizes differ, so that more units may be fewer bytes
    while count <= len(units) and (best is None or smallest[count] < best[0]):
        streamed = spread(len(units), count) if count else ()
        chosen = [sizes[index] for index in streamed]
        missing = total - sum(chosen) + min(slots, count) * max(chosen, default=0) - budget
        if missing <= 0 and (best is None or sum(chosen) < best[0]):
            best = sum(chosen), streamed
        count += 1 if best is not None else max(1, min(missing // step, len(units) - count))
    if best is None:
        return None
    return _with_resident(units, sorted(set(range(len(units))).difference(best[1])), slots)


def simulate(plan: Plan, timing: Timing, forwards: int = 4) -> float:
    """Seconds of one forward in the long run under ``plan``: one copy engine, one compute stream, copies in the order
    of use, a slot free again when its unit was computed; memory on demand counts as two slots. ``timing.compute`` is per unit of ``plan``."""
    link = clock = begin = 0.0
    released: deque[float] = deque([0.0] * (plan.slots or 2), plan.slots or 2)
    steps = [
        (None if index in plan.resident else unit.nbytes / timing.bandwidth, seconds)
        for index, (unit, seconds) in enumerate(zip(plan.units, timing.compute, strict=True))
    ]
    for _ in range(forwards):
        begin = clock
        clock += timing.outside
        for copying, computing in steps:
            if copying is None:
                clock += computing
                continue
            link = max(link, released[0]) + copying
            clock = max(clock, link) + computing
            released.append(clock)
    return clock - begin


def rescale(timing: Timing, measured: Sequence[Unit], units: Sequence[Unit], layers: Sequence[LayerSize]) -> Timing:
    """``timing`` of the ``measured`` units as that of other ``units`` over the same layers: a unit's compute time is
    shared among its layers in proportion to their bytes."""
    per_layer = [0.0] * len(layers)
    for unit, seconds in zip(measured, timing.compute, strict=True):
        for index in range(unit.first, unit.last):
            per_layer[index] = seconds * layers[index].nbytes / max(1, unit.nbytes)
    return replace(timing, compute=tuple(sum(per_layer[u.first : u.last]) for u in units))


def choose(
    layers: Sequence[LayerSize], measured: Sequence[Unit], timing: Timing, budget: int, block_size: int
) -> Plan | None:
    """The plan with the shortest simulated forward within ``budget`` bytes for resident units and slots: over the
    unit size (``block_size``, and half and a quarter of it down to 64 MiB) and the number of slots. Among plans within 1% of the shortest,
    the one that streams least: it depends least on the link. None when nothing fits."""
    candidates: list[tuple[float, Plan]] = []
    for size in [
        size for size in (block_size, block_size // 2, block_size // 4) if size >= min(block_size, SMALL_UNIT)
    ]:
        units = cut(layers, size)
        scaled = rescale(timing, measured, units, layers)
        for slots in SLOT_CHOICES:
            plan = fit(units, budget, slots)
            if plan is None:
                break
            candidates.append((simulate(plan, scaled), plan))
    if not candidates:
        return None
    shortest = min(seconds for seconds, _ in candidates)
    good = [plan for seconds, plan in candidates if seconds <= 1.01 * shortest]
    return min(good, key=lambda plan: (plan.streamed_bytes, len(plan.units)))


@dataclass(frozen=True)
class Use:
    """A streamed unit's stay in a forward: needed from window ``first`` to window ``last`` (inclusive). ``overlap``:
    its copy is to be hidden behind the unit before it, also where that raises the least memory."""

    nbytes: int
    first: int
    last: int
    overlap: bool = True


def smallest_cap(uses: Sequence[Use], activation: Sequence[int]) -> int:
    """The least device memory in bytes in which each unit is there when needed, and those with ``overlap`` can be copied
    while the unit before them computes. ``activation[w]`` is what window ``w`` needs beside streamed units."""
    cap = max(activation, default=0)
    for index, use in enumerate(uses):
        for window in range(use.first, use.last + 1):
            cap = max(cap, activation[window] + use.nbytes)
        if index and use.overlap:
            cap = max(cap, activation[uses[index - 1].last] + uses[index - 1].nbytes + use.nbytes)
    return cap


def issue_windows(uses: Sequence[Use], activation: Sequence[int], cap: int) -> list[int]:
    """When to begin copying each unit of a forward: the earliest window from which it fits under ``cap`` bytes until it
    is used, in order of use. Where it never fits earlier, at its first use. Pure greedy, O(uses x windows)."""
    occupied = list(activation)
    windows: list[int] = []
    for use in uses:
        earliest = use.first
        while earliest > (windows[-1] if windows else 0) and occupied[earliest - 1] + use.nbytes <= cap:
            earliest -= 1
        for window in range(earliest, use.last + 1):
            occupied[window] += use.nbytes
        windows.append(earliest)
    return windows


@dataclass(frozen=True)
class Preset:
    """What a card of a given size is best run with. Sizes in bytes."""

    max_vram: int
    block_size: int
    mode: str


_SHARES = {"balanced": (0.8, 300, "adaptive"), "low memory": (0.7, 200, "layerwise"), "fast": (0.9, 500, "chunkwise")}
PRESETS = tuple(_SHARES)


def preset(name: str, device_total: int) -> Preset:
    """The seeds' advice for 20 GB (16 GB/300 MB/adaptive, 14/200/layerwise, 18/500/chunkwise) for a card of
    ``device_total`` bytes. Raises KeyError for an unknown name."""
    share, block_size_mb, mode = _SHARES[name]
    return Preset(int(device_total * share), block_size_mb << 20, mode)
