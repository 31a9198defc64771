"""Each unit is copied into the slot whose present unit is needed last."""

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from intelligent_vram.vram import replacement
from intelligent_vram.vram.order import Order


class Unit:
    """What replacement looks at of a StreamUnit."""

    def __init__(self, name, nbytes=8):
        self.name, self.nbytes = name, nbytes
        self.bound, self.active, self.load = False, 0, None

    def __repr__(self):
        return self.name


class Memory:
    """A buffer of so many bytes."""

    def __init__(self, nbytes):
        self.nbytes = nbytes

    def numel(self):
        return self.nbytes


def slot(unit=None, nbytes=8):
    if unit is not None:
        unit.load = "copied"
    return SimpleNamespace(unit=unit, buffer=Memory(nbytes))


def expecting(units, position=0):
    order = Order()
    order.learn(range(len(units)), units, set(units))
    order.position = position
    return order


def copied(order, slots):
    """What ``ahead`` yields when each copy begins at once, as pairs of a unit and the number of its slot."""
    pairs = []
    for unit, into in replacement.ahead(order, slots):
        if into.unit is not None:
            into.unit.load = None
        into.unit, unit.load = unit, "copied"
        pairs.append((unit.name, next(number for number, one in enumerate(slots) if one is into)))
    return pairs


def test_empty_slots_are_filled_in_the_order_of_use():
    units = [Unit(name) for name in "abcd"]
    assert [name for name, _ in copied(expecting(units), [slot(), slot(), slot()])] == ["a", "b", "c"]


def test_what_is_needed_before_the_unit_to_come_is_not_overwritten():
    units = [Unit(name) for name in "abcd"]
    a, _, c, d = units
    # c comes next; the next forward begins with a
    assert copied(expecting(units, position=2), [slot(c), slot(a)]) == [("d", 1)]
    assert copied(expecting(units, position=2), [slot(c), slot(d)]) == []


def test_a_slot_that_is_too_small_or_in_use_is_left_alone():
    a, b = Unit("a"), Unit("b")
    units = [a, b, Unit("large", 16)]
    a.bound = True
    assert copied(expecting(units), [slot(a, 16), slot(b), slot(None, 8)]) == []


def test_what_is_needed_now_may_take_the_slot_of_a_bound_unit_but_not_of_one_that_computes():
    units = [Unit(name) for name in "abcd"]
    a, b = units[:2]
    a.bound = b.bound = True
    b.active = 1
    slots = [slot(a), slot(b)]
    assert replacement.for_now(expecting(units, position=1), slots, 8) is slots[0]
    a.active = 1
    assert replacement.for_now(expecting(units, position=1), slots, 8) is None


@pytest.mark.parametrize("count", [2, 3, 5])
@given(units=st.integers(1, 12), forwards=st.integers(1, 4))
def test_units_used_in_turn_are_there_in_time_and_copied_at_most_once_a_forward(count, units, forwards):
    models = [Unit(str(number)) for number in range(units)]
    order, slots = expecting(models), [slot() for _ in range(count)]
    total = 0
    for _ in range(forwards):
        for position, unit in enumerate(models):
            order.position = position
            total += len(copied(order, slots))
            assert unit.load is not None
    if units <= count:
        assert total == units
    else:
        assert total <= forwards * units + count - 1  # that many are copied ahead for the next forward
