"""Pure planning: sizes, a budget and timings in, a plan out. Nothing here touches a device or a module.

A plan says which units are resident, which are streamed, and through how many slots. See shared words in README.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import accumulate, groupby, pairwise
from typing import NamedTuple

import numpy

from .units import format_bytes

MODES = ("adaptive", "chunkwise", "layerwise")
SMALL_UNIT = 64 << 20  # below this the host's work for each unit begins to count
SLOT_CHOICES = (2, 3, 4, 5, 6, 8)
AS_FAST = 1.01  # times the shortest forward: a plan within it is as good


class LimitTooSmall(ValueError):
    """The VRAM limit does not hold what the mode needs; ``needed`` is the smallest limit in bytes that would do."""

    def __init__(self, message: str, needed: int) -> None:
        super().__init__(message)
        self.needed = needed


def allocated(nbytes: int) -> int:
    """Bytes that torch's CUDA allocator takes for a buffer: from 10 MiB on it rounds up to 2 MiB
    (c10/cuda/CUDACachingAllocator.cpp, ``get_allocation_size``)."""
    return nbytes if nbytes < 10 << 20 else -(-nbytes // (2 << 20)) * (2 << 20)


def decoder_bytes(units: Iterable[Unit]) -> int:
    """Bytes of device memory that units are copied into before they are decoded: two times the largest that is encoded.
    They are there whichever units are streamed."""
    return 2 * allocated(max((unit.encoded for unit in units), default=0))


class LayerSize(NamedTuple):
    """A layer as planning sees it: ``nbytes`` in its segment (aligned), and ``segment``, the packed buffer it lies in.
    ``block`` is the index of the block it belongs to, or None outside the block lists. ``encoded``: what it takes in RAM and
    on the link where it is kept encoded, else 0."""

    nbytes: int
    segment: int
    block: int | None
    encoded: int = 0

    @property
    def link_bytes(self) -> int:
        """Bytes that cross the link."""
        return self.encoded or self.nbytes


@dataclass(frozen=True)
class Unit:
    """Layers ``first`` to ``last`` (exclusive) of one segment, which take ``nbytes`` on the device, moved by one copy: of
    ``encoded`` bytes where some of them are encoded, else of ``nbytes``."""

    first: int
    last: int
    nbytes: int
    block: int | None = None
    encoded: int = 0

    @property
    def link_bytes(self) -> int:
        """Bytes that cross the link."""
        return self.encoded or self.nbytes


@dataclass(frozen=True)
class Timing:
    """Measured seconds of one forward: ``compute`` per unit of the plan it was measured with, ``outside`` of all
    units, ``bandwidth`` of the link in bytes per second, and ``decoding``: plain bytes per second of weights that cross it
    encoded."""

    compute: tuple[float, ...]
    outside: float
    bandwidth: float
    decoding: float = float("inf")


@dataclass(frozen=True)
class Plan:
    """Which units are resident and which are streamed. ``slots`` buffers of ``slot_bytes`` hold streamed units;
    ``slots == 0`` with streamed units means that each load gets memory of its own size (layerwise)."""

    units: tuple[Unit, ...]
    resident: frozenset[int]
    slots: int
    slot_bytes: int

    @cached_property
    def streamed(self) -> tuple[int, ...]:
        """Indices of the streamed units, in order."""
        return tuple(index for index in range(len(self.units)) if index not in self.resident)

    @property
    def resident_bytes(self) -> int:
        return sum(self.units[index].nbytes for index in self.resident)

    @cached_property
    def streamed_bytes(self) -> int:
        """Bytes that cross the link in one forward."""
        return sum(self.units[index].link_bytes for index in self.streamed)

    @cached_property
    def encoded_bytes(self) -> int:
        """Bytes that cross the link encoded, in one forward."""
        return sum(self.units[index].encoded for index in self.streamed)

    @cached_property
    def decoded_bytes(self) -> int:
        """Bytes of the streamed units that cross the link encoded, once they are decoded."""
        return sum(self.units[index].nbytes for index in self.streamed if self.units[index].encoded)

    @property
    def device_bytes(self) -> int:
        """Bytes of device memory that resident units, slots and the decoder's buffers take. Without fixed slots: the two
        largest units."""
        resident = sum(allocated(self.units[index].nbytes) for index in self.resident) + decoder_bytes(self.units)
        if self.slots or not self.streamed:
            return resident + self.slots * allocated(self.slot_bytes)
        return resident + sum(sorted(allocated(self.units[index].nbytes) for index in self.streamed)[-2:])

    def describe(self) -> str:
        """One line in plain words, with numbers."""
        coded = f" encoded, {format_bytes(self.decoded_bytes)} decoded" if self.decoded_bytes else ""
        slots = f"{self.slots} slots of {format_bytes(self.slot_bytes)}" if self.slots else "memory on demand"
        return (
            f"{len(self.streamed)} of {len(self.units)} units streamed ({format_bytes(self.streamed_bytes)} a forward{coded}, "
            f"through {slots}), {len(self.resident)} resident ({format_bytes(self.resident_bytes)})"
            if self.streamed
            else f"all {len(self.units)} units resident ({format_bytes(self.resident_bytes)})"
        )


def arrange(sizes: Iterable[tuple[int, int | None]], segment_bytes: int) -> list[LayerSize]:
    """Layers, each of so many bytes and of a block or None, in segments: in each block as few of up to ``segment_bytes`` as
    possible, as even as possible; blocks that are smaller share a segment. A layer outside blocks has one of its own."""
    groups: list[tuple[int | None, list[int]]] = []
    for nbytes, block in sizes:
        if groups and block is not None and groups[-1][0] == block:
            groups[-1][1].append(nbytes)
        else:
            groups.append((block, [nbytes]))
    layers: list[LayerSize] = []
    segment, filled, may_join = -1, 0, False
    for block, group in groups:
        joins = block is not None and may_join and filled + sum(group) <= segment_bytes
        for first, last in _runs(tuple(group), segment_bytes):
            if first or not joins:
                segment, filled = segment + 1, 0
            filled += sum(group[first:last])
            layers += [LayerSize(nbytes, segment, block) for nbytes in group[first:last]]
        may_join = block is not None
    return layers


def cut(layers: Sequence[LayerSize], limit: int) -> tuple[Unit, ...]:
    """Units of consecutive layers of up to ``limit`` bytes, within segments: as few as possible, and then as even
    as possible, because the largest decides the size of a slot. A layer larger than ``limit`` is a unit of its own.
    """
    return _cut(tuple(layers), limit)


@lru_cache(maxsize=16)
def _cut(layers: tuple[LayerSize, ...], limit: int) -> tuple[Unit, ...]:
    units: list[Unit] = []
    start = 0
    for _, same in groupby(layers, key=lambda layer: layer.segment):
        sizes = tuple(layer.nbytes for layer in same)
        units += [_unit(layers, start + first, start + last) for first, last in _runs(sizes, limit)]
        start += len(sizes)
    return tuple(units)


def _unit(layers: Sequence[LayerSize], first: int, last: int) -> Unit:
    run = layers[first:last]
    encoded = sum(layer.link_bytes for layer in run) if any(layer.encoded for layer in run) else 0
    return Unit(first, last, sum(layer.nbytes for layer in run), layers[first].block, encoded)


@lru_cache(maxsize=64)  # most blocks of a model are alike
def _runs(sizes: tuple[int, ...], limit: int) -> tuple[tuple[int, int], ...]:
    """Begin and end of the runs that ``sizes`` are cut into."""
    count = len(_groups(sizes, limit))
    low, high = 0, limit  # the smallest cap that needs no more groups; fewer bytes a group never need fewer groups
    while low < high:
        middle = (low + high) // 2
        if len(_groups(sizes, middle)) <= count:
            high = middle
        else:
            low = middle + 1
    return tuple(pairwise((0, *_groups(sizes, low))))


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
    return [layer._replace(segment=numbers.setdefault((layer.segment, layer.block), len(numbers))) for layer in layers]


def single_layers(layers: Sequence[LayerSize]) -> tuple[Unit, ...]:
    """A unit per layer."""
    return tuple(_unit(layers, index, index + 1) for index in range(len(layers)))


def spread(count: int, streamed: int) -> tuple[int, ...]:
    """``streamed`` of ``count`` indices, as evenly as possible with the wrap-around counted: gaps differ by one."""
    return tuple(_spread(count, streamed).tolist())


def _spread(count: int, streamed: int) -> numpy.ndarray:
    return numpy.arange(1, 2 * streamed, 2, numpy.int64) * count // max(1, 2 * streamed)


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


def within(asked: Mapping[str, int], there: Mapping[str, int]) -> tuple[int, list[str]]:
    """How many blocks are streamed where so many of each kind were ``asked`` for and are ``there``, and a remark for each
    kind of which there are fewer."""
    remarks = [
        f"{count} {kind} are to be streamed, but the model has {there[kind]}"
        for kind, count in asked.items()
        if count > there[kind]
    ]
    return sum(min(count, there[kind]) for kind, count in asked.items()), remarks


def _with_resident(units: Sequence[Unit], resident: Iterable[int], slots: int) -> Plan:
    kept = frozenset(resident)
    streamed = [unit.nbytes for index, unit in enumerate(units) if index not in kept]
    slots = min(slots, len(streamed))
    return Plan(tuple(units), kept, slots, max(streamed, default=0) if slots else 0)


def fit(units: Sequence[Unit], budget: int, slots: int) -> Plan | None:
    """As many units resident as ``budget`` bytes hold beside ``slots`` slots, the streamed ones spread evenly.
    None when not even the slots fit."""
    fitting = _Fitting(tuple(units))
    count = fitting.count(budget, slots)
    return None if count is None else fitting.plan(count, slots)


class _Fitting:
    """Plans of ``units`` that stream a number of them, spread evenly. What that takes is computed once for each number."""

    def __init__(self, units: tuple[Unit, ...]) -> None:
        self.units = units
        self._nbytes = numpy.array([unit.link_bytes for unit in units], numpy.int64)
        self._decoder = decoder_bytes(units)
        self._sizes = numpy.array([allocated(unit.nbytes) for unit in units], numpy.int64)
        ordered = sorted(self._sizes.tolist())
        self._smallest = [0, *accumulate(ordered)]  # bytes of so many units, at least
        self._largest = [0, *accumulate(reversed(ordered))]  # and at most
        self._taken: dict[int, tuple[int, int]] = {0: (0, 0)}

    def count(self, budget: int, slots: int) -> int | None:
        """How many units to stream, so that the others fit ``budget`` bytes beside ``slots`` slots and the fewest bytes are
        streamed; None when not even the slots fit."""
        total, most, step = self._smallest[-1], len(self.units), max(1, 2 * self._largest[:2][-1])
        budget -= self._decoder
        # so many have to be streamed even if they were the largest
        count = bisect_left(self._largest, total - budget)
        best: tuple[int, int] | None = None
        # sizes differ, so that more units may be fewer bytes
        while count <= most and (best is None or self._smallest[count] < best[0]):
            streamed, largest = self._take(count)
            missing = total - streamed + min(slots, count) * largest - budget
            if missing <= 0 and (best is None or streamed < best[0]):
                best = streamed, count
            count += 1 if best is not None else max(1, min(missing // step, most - count))
        return None if best is None else best[1]

    def _take(self, count: int) -> tuple[int, int]:
        """Bytes of memory that ``count`` streamed units would take if they were resident, and the largest of them."""
        if count not in self._taken:
            chosen = self._sizes[_spread(len(self.units), count)]
            self._taken[count] = int(chosen.sum()), int(chosen.max())
        return self._taken[count]

    def streamed_bytes(self, count: int) -> int:
        """Bytes that cross the link for ``count`` streamed units."""
        return int(self._nbytes[_spread(len(self.units), count)].sum())

    def plan(self, count: int, slots: int) -> Plan:
        """The plan that streams ``count`` units."""
        streamed = spread(len(self.units), count)
        return _with_resident(self.units, sorted({*range(len(self.units))}.difference(streamed)), slots)


@lru_cache(maxsize=8)
def _fitting(layers: tuple[LayerSize, ...], limit: int) -> _Fitting:
    return _Fitting(_cut(layers, limit))


def simulate(plan: Plan, timing: Timing, forwards: int = 4) -> float:
    """Seconds of one forward in the long run under ``plan``: one copy engine, one compute stream, copies in the order
    of use, a slot free again when its unit was computed; memory on demand counts as two slots. ``timing.compute`` is per unit of ``plan``."""
    link = clock = begin = 0.0
    released: deque[float] = deque([0.0] * (plan.slots or 2), plan.slots or 2)
    steps = [
        (
            None if index in plan.resident else unit.link_bytes / timing.bandwidth,
            unit.nbytes / timing.decoding if unit.encoded else 0.0,
            seconds,
        )
        for index, (unit, seconds) in enumerate(zip(plan.units, timing.compute, strict=True))
    ]
    for _ in range(forwards):
        begin = clock
        clock += timing.outside
        for copying, decoding, computing in steps:
            if copying is None:
                clock += computing
                continue
            free = released[0]  # conditions, because max() takes three times as long
            link = (link if link > free else free) + copying
            ready = link + decoding
            clock = (clock if clock > ready else ready) + computing
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
    candidates: list[tuple[int, int, int, int, _Fitting]] = []
    for size in [
        size for size in (block_size, block_size // 2, block_size // 4) if size >= min(block_size, SMALL_UNIT)
    ]:
        fitting = _fitting(tuple(layers), size)
        for slots in SLOT_CHOICES:
            count = fitting.count(budget, slots)
            if count is None:
                break
            candidates.append((fitting.streamed_bytes(count), len(fitting.units), slots, count, fitting))
    candidates.sort(key=lambda candidate: candidate[:2])
    plans: list[Plan] = []
    seconds: list[float] = []
    busy = 0.0
    for nbytes, _, slots, count, fitting in candidates:
        # No schedule of this one, or of those after it, which stream more, beats its floor (less what rounding may be).
        # Where the first plan is within 1% of that, or the best one found is no longer, the others need no look.
        floor = (1 - 1e-9) * max(busy, nbytes / timing.bandwidth if nbytes else 0.0)
        if seconds and floor >= min(*seconds, seconds[0] / AS_FAST):
            break
        plans.append(fitting.plan(count, slots))
        scaled = rescale(timing, measured, fitting.units, layers)
        busy = scaled.outside + sum(scaled.compute)
        seconds.append(simulate(plans[-1], scaled))
    good = (plan for plan, taken in zip(plans, seconds, strict=True) if taken <= AS_FAST * min(seconds))
    return next(good, None)
