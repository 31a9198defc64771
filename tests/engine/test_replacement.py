"""Each unit is copied into the slot whose present unit is needed last."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from intelligent_vram.vram import replacement
from intelligent_vram.vram.order import Order
from intelligent_vram.vram.slots import Load, Slot, StreamUnit

COPIED = Load(ready=None)


def unit(index, nbytes=8):
    return StreamUnit(index, nbytes, (), [])


def slot(holds=None, nbytes=8):
    made = Slot(torch.empty(nbytes, dtype=torch.uint8), 0)
    made.unit = holds
    if holds is not None:
        holds.load = COPIED
    return made


def expecting(units, position=0):
    order = Order()
    order.learn(range(len(units)), units, set(units))
    order.position = position
    return order


def copied(order, slots):
    """What ``ahead`` yields when each copy begins at once, as pairs of a unit's index and the number of its slot."""
    pairs = []
    for one, into in replacement.ahead(order, slots):
        if into.unit is not None:
            into.unit.load = None
        into.unit, one.load = one, COPIED
        pairs.append((one.index, slots.index(into)))
    return pairs


def test_empty_slots_are_filled_in_the_order_of_use():
    units = [unit(index) for index in range(4)]
    assert [index for index, _ in copied(expecting(units), [slot(), slot(), slot()])] == [0, 1, 2]


def test_what_is_needed_before_the_unit_to_come_is_not_overwritten():
    units = [unit(index) for index in range(4)]
    a, _, c, d = units
    # c comes next, then d; the next forward begins with a
    assert copied(expecting(units, position=2), [slot(c), slot(a)]) == [(3, 1)]
    assert copied(expecting(units, position=2), [slot(c), slot(d)]) == []


def test_a_slot_that_is_too_small_or_in_use_is_left_alone():
    a, b = unit(0), unit(1)
    units = [a, b, unit(2, 16)]
    a.bound = True
    assert copied(expecting(units), [slot(a, 16), slot(b), slot(None, 8)]) == []


def test_what_is_needed_now_may_take_the_slot_of_a_bound_unit_but_not_of_one_that_computes():
    units = [unit(index) for index in range(4)]
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
    used = [unit(index) for index in range(units)]
    order, slots = expecting(used), [slot() for _ in range(count)]
    total = 0
    for _ in range(forwards):
        for position, one in enumerate(used):
            order.position = position
            total += len(copied(order, slots))
            assert one.load is not None
    if units <= count:
        assert total == units
    else:
        assert total <= forwards * units + count - 1  # that many are copied ahead for the next forward
