"""Which slot a unit is copied into: the one whose present unit is needed last (the victim of Belady's rule, A study of
replacement algorithms for a virtual-storage computer, IBM Systems Journal 5, 1966), as soon as that is later than the unit
to come. So every copy begins as early as it can; units are not kept from one forward to the next by waiting with it, for
what VRAM holds at all times the plan makes resident."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from .order import Order
from .slots import Slot, StreamUnit


def ahead(order: Order[StreamUnit], slots: Sequence[Slot]) -> Iterator[tuple[StreamUnit, Slot]]:
    """The units to copy next, each with its slot, until a slot's present unit would be needed before the one that is to
    come. Each copy must have been begun before the next pair is asked for."""
    runs = order.runs
    here, count = order.here(), len(runs)
    idle = [
        (order.distance(slot.unit, here), slot)
        for slot in slots
        if slot.unit is None or not (slot.unit.bound or slot.unit.active)
    ]
    if len(idle) > 1:
        idle.sort(key=_by_distance, reverse=True)
    for distance in range(min(count, len(slots) + 1)):
        unit = runs[(here + distance) % count].unit
        if unit.load is not None:
            continue
        best = next((entry for entry in idle if entry[1].buffer.numel() >= unit.nbytes), None)
        if best is None or best[0] <= distance:
            return
        idle.remove(best)
        yield unit, best[1]


def for_now(order: Order[StreamUnit], slots: Sequence[Slot], nbytes: int) -> Slot | None:
    """The slot for a unit of ``nbytes`` that is needed at once; it may hold a unit that is bound. None where units that are
    computing use all that are large enough."""
    usable = [slot for slot in slots if slot.buffer.numel() >= nbytes and (slot.unit is None or not slot.unit.active)]
    return max(usable, key=lambda slot: order.distance(slot.unit), default=None)


def _by_distance(entry: tuple[int, Slot]) -> int:
    return entry[0]
