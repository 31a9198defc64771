"""What planning promises for any model, any budget and any timing; nothing here touches a device."""

from functools import lru_cache
from itertools import groupby, pairwise

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st
from intelligent_vram.vram.plan import (
    AS_FAST,
    SLOT_CHOICES,
    SMALL_UNIT,
    LayerSize,
    LimitTooSmall,
    Plan,
    Timing,
    Unit,
    allocated,
    arrange,
    choose,
    cut,
    fit,
    rescale,
    simulate,
    single_layers,
    spread,
    stream_all,
    stream_blocks,
    within,
)
from intelligent_vram.vram.units import MIB
from intelligent_vram.vram.windows import Use, issue_windows, smallest_cap

from .counting import counted

SIZES = st.integers(1, 40).map(lambda size: size * 512)


@st.composite
def layer_lists(draw, max_layers=24):
    """Layers in a few segments; blocks never decrease, None outside of them."""
    sizes = draw(st.lists(SIZES, min_size=1, max_size=max_layers))
    segment, block, layers = 0, 0, []
    for size in sizes:
        segment += draw(st.booleans()) and draw(st.booleans())
        block += draw(st.booleans())
        layers.append(LayerSize(size, segment, block))
    return layers


def equal_units(count, nbytes=1000):
    return tuple(Unit(index, index + 1, nbytes, index) for index in range(count))


def unequal_units(sizes):
    return tuple(Unit(index, index + 1, size, index) for index, size in enumerate(sizes))


# -- cut ---------------------------------------------------------------------------------------------------------------


@given(layer_lists(), st.integers(1, 60_000))
def test_units_cover_all_layers_in_order(layers, limit):
    units = cut(layers, limit)
    assert [index for unit in units for index in range(unit.first, unit.last)] == list(range(len(layers)))
    assert all(unit.nbytes == sum(layer.nbytes for layer in layers[unit.first : unit.last]) for unit in units)
    assert all(unit.block == layers[unit.first].block for unit in units)


@given(layer_lists(), st.integers(1, 60_000))
def test_a_unit_lies_in_one_segment(layers, limit):
    for unit in cut(layers, limit):
        assert len({layer.segment for layer in layers[unit.first : unit.last]}) == 1


@given(layer_lists(), st.integers(1, 60_000))
@example([LayerSize(20_000, 0, 0), LayerSize(3000, 0, 0), LayerSize(3000, 0, 0)], 5000)
def test_only_a_single_layer_is_larger_than_the_unit_size(layers, limit):
    for unit in cut(layers, limit):
        assert unit.nbytes <= limit or unit.last - unit.first == 1


def fewest_and_evenest(sizes, limit):
    """By trying everything: the fewest runs of up to ``limit`` (or of one), and the smallest largest run among those."""

    @lru_cache
    def best(start):
        if start == len(sizes):
            return (0, 0)
        options = []
        for end in range(start + 1, len(sizes) + 1):
            total = sum(sizes[start:end])
            if total <= limit or end == start + 1:
                runs, largest = best(end)
                options.append((runs + 1, max(largest, total)))
        return min(options)

    return best(0)


@given(st.lists(SIZES, min_size=1, max_size=12), st.integers(512, 60_000))
def test_units_are_as_few_and_then_as_even_as_possible(sizes, limit):
    assume(max(sizes) <= limit)
    units = cut([LayerSize(size, 0, 0) for size in sizes], limit)
    assert (len(units), max(unit.nbytes for unit in units)) == fewest_and_evenest(tuple(sizes), limit)


def test_no_layers_are_no_units():
    assert cut([], 1000) == ()


def test_single_layers_are_a_unit_each():
    layers = [LayerSize(512, 0, 0), LayerSize(1024, 0, 0), LayerSize(512, 1, None)]
    assert [(unit.first, unit.last, unit.nbytes, unit.block) for unit in single_layers(layers)] == [
        (0, 1, 512, 0),
        (1, 2, 1024, 0),
        (2, 3, 512, None),
    ]


def test_a_segment_of_300_layers_is_cut_without_keeping_the_user_waiting():
    layers = [LayerSize(512 * (2000 + index * 37 % 91), 0, 0) for index in range(300)]
    with counted() as lines:
        cut(layers, 300 * MIB)
    assert lines() < 50_000


# -- arrange -----------------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(SIZES, st.none() | st.integers(0, 5)), max_size=24), st.integers(1, 60_000))
def test_layers_keep_their_order_and_segments_hold_whole_blocks_or_one_part_of_a_block(sizes, segment_bytes):
    layers = arrange(sizes, segment_bytes)
    assert [(layer.nbytes, layer.block) for layer in layers] == sizes
    assert [layer.segment for layer in layers[:1]] == [0] * bool(layers)
    assert all(after.segment - before.segment in (0, 1) for before, after in pairwise(layers))
    for _, segment in groupby(layers, key=lambda layer: layer.segment):
        inside = list(segment)
        assert sum(layer.nbytes for layer in inside) <= segment_bytes or len(inside) == 1
        assert inside[0].block is not None or len(inside) == 1


def test_small_blocks_share_a_segment_and_large_ones_are_cut_evenly():
    small = [(1000, block) for block in range(5)]
    assert [layer.segment for layer in arrange(small, 2500)] == [0, 0, 1, 1, 2]
    assert [layer.segment for layer in arrange([(1000, 0)] * 6, 4000)] == [0, 0, 0, 1, 1, 1]
    assert [layer.segment for layer in arrange([(1, 0), (1, None), (1, None), (1, 1)], 4000)] == [0, 1, 2, 3]


# -- spread ------------------------------------------------------------------------------------------------------------


@given(st.integers(1, 200), st.data())
def test_streamed_units_are_spread_evenly_around_the_cycle(count, data):
    streamed = data.draw(st.integers(1, count))
    chosen = spread(count, streamed)
    assert len(set(chosen)) == streamed
    assert list(chosen) == sorted(chosen)
    assert chosen[0] >= 0
    assert chosen[-1] < count
    gaps = [after - before for before, after in pairwise((*chosen, chosen[0] + count))]
    assert max(gaps) - min(gaps) <= 1


def test_nothing_streamed_is_no_index():
    assert spread(10, 0) == ()


# -- fit ---------------------------------------------------------------------------------------------------------------


@given(st.lists(SIZES, min_size=1, max_size=20), st.integers(0, 500_000), st.integers(2, 8))
def test_a_fitted_plan_never_takes_more_than_the_budget(sizes, budget, slots):
    plan = fit(unequal_units(sizes), budget, slots)
    assume(plan is not None)
    assert plan.device_bytes <= budget
    assert plan.slots <= slots
    assert plan.slot_bytes >= max((plan.units[index].nbytes for index in plan.streamed), default=0)


@given(st.lists(SIZES, min_size=1, max_size=20), st.integers(2, 8))
def test_everything_is_resident_exactly_when_everything_fits(sizes, slots):
    units = unequal_units(sizes)
    assert fit(units, sum(sizes), slots).streamed == ()
    assert fit(units, sum(sizes) - 1, slots) is None or fit(units, sum(sizes) - 1, slots).streamed


@given(st.lists(SIZES, min_size=1, max_size=20), st.integers(2, 8))
def test_a_plan_is_found_wherever_the_slots_of_the_largest_unit_fit(sizes, slots):
    units = unequal_units(sizes)
    assert fit(units, min(slots, len(sizes)) * max(sizes), slots) is not None


@given(st.integers(1, 30), st.integers(0, 40_000), st.integers(0, 40_000), st.integers(2, 8))
def test_with_units_of_one_size_more_budget_never_streams_more(count, budget, more, slots):
    less_room, more_room = (fit(equal_units(count), size, slots) for size in (budget, budget + more))
    assume(less_room is not None)
    assert more_room.streamed_bytes <= less_room.streamed_bytes


@given(st.lists(SIZES, min_size=1, max_size=12), st.integers(0, 300_000), st.integers(0, 300_000), st.integers(2, 8))
def test_more_budget_never_streams_more_units(sizes, budget, more, slots):
    less_room, more_room = (fit(unequal_units(sizes), size, slots) for size in (budget, budget + more))
    assume(less_room is not None)
    assert len(more_room.streamed) <= len(less_room.streamed)


@pytest.mark.parametrize("slots", [2, 3])
@pytest.mark.parametrize("sizes", [[340] * 19 + [141] * 38, [460] * 20 + [220] * 40, [703] * 40 + [800] * 8])
def test_with_the_block_sizes_of_real_models_more_budget_never_streams_more_bytes(sizes, slots):
    """Flux, HunyuanVideo, Wan VACE. Not so for any sizes at all: [1,20,100,1,20,1,100,20,1,1,20,1], two slots, streams
    80 with a budget of 246 and 220 with 266, because the units that five, four or three spread indices hit differ."""
    plans = [fit(unequal_units(sizes), budget, slots) for budget in range(0, sum(sizes) + 500, 487)]
    streamed = [plan.streamed_bytes for plan in plans if plan is not None]
    assert streamed == sorted(streamed, reverse=True)
    assert streamed[-1] == 0


# -- plans that the user asked for -------------------------------------------------------------------------------------


@given(st.integers(1, 12), st.integers(1, 4), st.integers(0, 14), st.integers(2, 6))
def test_exactly_so_many_blocks_are_streamed_whole(blocks, units_per_block, streamed, slots):
    count = blocks * units_per_block
    inside = [Unit(index, index + 1, 1000 + index, index // units_per_block) for index in range(count)]
    units = (*inside, Unit(count, count + 1, 700, None))
    plan = stream_blocks(units, streamed, slots)
    assert len({units[index].block for index in plan.streamed}) == min(streamed, blocks)
    assert len(plan.streamed) == min(streamed, blocks) * units_per_block
    assert len(units) - 1 in plan.resident


def test_streaming_all_takes_no_more_slots_than_units():
    assert stream_all(equal_units(2), 5) == Plan(equal_units(2), frozenset(), 2, 1000)
    assert stream_all((), 3).device_bytes == 0


def test_a_plan_describes_itself_in_numbers():
    units = equal_units(4, 2 * MIB)
    assert Plan(units, frozenset(range(4)), 0, 0).describe() == "all 4 units resident (8.0 MiB)"
    assert (
        Plan(units, frozenset((1,)), 2, 2 * MIB).describe()
        == "3 of 4 units streamed (6.0 MiB a forward, through 2 slots of 2.0 MiB), 1 resident (2.0 MiB)"
    )
    assert "memory on demand" in stream_all(units, 0).describe()


def test_device_bytes_count_resident_units_and_slots():
    units = unequal_units((100, 200, 300))
    assert Plan(units, frozenset((1,)), 2, 300).device_bytes == 200 + 2 * 300
    assert Plan(units, frozenset(), 0, 0).device_bytes == 200 + 300
    assert Plan(units, frozenset((0, 1, 2)), 0, 0).device_bytes == 600


def test_large_buffers_count_as_the_allocator_rounds_them():
    assert allocated(10 * MIB - 1) == 10 * MIB - 1
    assert allocated(10 * MIB) == 10 * MIB
    assert allocated(10 * MIB + 1) == 12 * MIB
    assert allocated(703 * MIB) == 704 * MIB


# -- simulate and choose -----------------------------------------------------------------------------------------------


@st.composite
def timed_plans(draw):
    sizes = draw(st.lists(st.integers(1, 50), min_size=1, max_size=10))
    resident = frozenset(draw(st.sets(st.integers(0, len(sizes) - 1))))
    streamed = [size for index, size in enumerate(sizes) if index not in resident]
    slots = min(draw(st.integers(1, 8)), len(streamed))
    compute = draw(st.lists(st.integers(0, 40), min_size=len(sizes), max_size=len(sizes)))
    plan = Plan(unequal_units(sizes), resident, slots, max(streamed, default=0))
    return plan, Timing(tuple(float(seconds) for seconds in compute), float(draw(st.integers(0, 60))), 1.0)


@given(timed_plans())
def test_no_schedule_beats_compute_or_the_link(timed):
    plan, timing = timed
    floor = max(sum(timing.compute) + timing.outside, plan.streamed_bytes / timing.bandwidth)
    assert simulate(plan, timing, forwards=12) >= floor


@given(st.lists(st.integers(0, 40), min_size=1, max_size=10), st.integers(0, 60))
def test_with_everything_resident_a_forward_takes_its_compute(compute, outside):
    units = equal_units(len(compute))
    plan = Plan(units, frozenset(range(len(units))), 0, 0)
    timing = Timing(tuple(map(float, compute)), float(outside), 1.0)
    assert simulate(plan, timing) == sum(compute) + outside


@given(timed_plans(), st.integers(1, 4))
def test_another_slot_never_slows_a_forward_in_the_long_run(timed, more):
    plan, timing = timed
    assume(plan.slots)
    wider = Plan(plan.units, plan.resident, plan.slots + more, plan.slot_bytes)

    def forty_forwards(plan):
        return sum(simulate(plan, timing, forwards=number) for number in range(1, 41))

    assert forty_forwards(wider) <= forty_forwards(plan) + 1e-9


def test_three_slots_hide_what_two_cannot():
    plan = stream_all(equal_units(6, 10), 2)
    timing = Timing((1.0,) * 6, 30.0, 1.0)
    assert simulate(plan, timing) > simulate(stream_all(plan.units, 3), timing) >= 60.0


def test_memory_on_demand_can_be_simulated_too():
    plan = stream_all(equal_units(4, 10), 0)
    assert simulate(plan, Timing((1.0,) * 4, 0.0, 1.0)) >= 40.0


@given(layer_lists(), st.integers(512, 60_000), st.integers(512, 60_000))
def test_compute_time_is_neither_lost_nor_made_by_cutting_differently(layers, before, after):
    measured, units = cut(layers, before), cut(layers, after)
    timing = Timing(tuple(float(index + 1) for index in range(len(measured))), 5.0, 1e6)
    scaled = rescale(timing, measured, units, layers)
    assert len(scaled.compute) == len(units)
    assert sum(scaled.compute) == pytest.approx(sum(timing.compute))
    assert (scaled.outside, scaled.bandwidth) == (5.0, 1e6)


@given(layer_lists(), st.integers(1, 60_000), st.integers(0, 800_000), st.floats(1e3, 1e9))
def test_the_chosen_plan_fits_and_is_no_slower_than_a_plain_one(layers, block_size, budget, bandwidth):
    measured = cut(layers, block_size)
    timing = Timing(tuple(unit.nbytes * 1e-7 for unit in measured), 0.001, bandwidth)
    chosen = choose(layers, measured, timing, budget, block_size)
    plain = fit(measured, budget, 2)
    if chosen is None:
        assert plain is None
        return
    assert chosen.device_bytes <= budget
    if plain is not None:
        seconds = simulate(chosen, rescale(timing, measured, chosen.units, layers))
        assert seconds <= 1.01 * simulate(plain, timing) + 1e-12


@given(layer_lists(), st.integers(1, 250), st.integers(0, 3000), st.floats(1e8, 1e13), st.integers(0, 9))
def test_no_plan_that_is_as_fast_as_the_chosen_one_streams_less(layers, size, budget, bandwidth, outside):
    layers = [layer._replace(nbytes=4096 * layer.nbytes) for layer in layers]  # 2 to 80 MiB each
    block_size, budget = size * MIB, budget * MIB
    measured = cut(layers, block_size)
    timing = Timing(tuple((1 + index % 3) * 0.01 for index in range(len(measured))), outside * 0.01, bandwidth)
    chosen = choose(layers, measured, timing, budget, block_size)
    sizes = [size for size in (block_size, block_size // 2, block_size // 4) if size >= min(block_size, SMALL_UNIT)]
    tried = [fit(cut(layers, size), budget, slots) for size in sizes for slots in SLOT_CHOICES]
    plans = [plan for plan in tried if plan is not None]
    seconds = [simulate(plan, rescale(timing, measured, plan.units, layers)) for plan in plans]
    good = [plan for plan, taken in zip(plans, seconds, strict=True) if taken <= AS_FAST * min(seconds)]
    assert chosen == min(good, key=lambda plan: (plan.streamed_bytes, len(plan.units)), default=None)


def test_blocks_that_were_asked_for_are_as_many_as_there_are():
    there = {"blocks": 40, "VACE blocks": 8}
    assert within({"blocks": 12, "VACE blocks": 8}, there) == (20, [])
    count, (remark,) = within({"blocks": 48, "VACE blocks": 3}, there)
    assert (count, remark) == (43, "48 blocks are to be streamed, but the model has 40")


def test_everything_is_resident_when_the_budget_allows():
    layers = [LayerSize(10 * 512, index, index) for index in range(8)]
    measured = cut(layers, 10 * 512)
    plan = choose(layers, measured, Timing((0.001,) * 8, 0.0, 1e6), 8 * 10 * 512, 10 * 512)
    assert plan.streamed == ()


def test_nothing_is_chosen_where_nothing_fits():
    layers = [LayerSize(5120, 0, 0), LayerSize(5120, 1, 1), LayerSize(5120, 2, 2)]
    measured = cut(layers, 5120)
    assert choose(layers, measured, Timing((0.001,) * 3, 0.0, 1e6), 2 * 5120 - 1, 5120) is None


# -- memory on demand --------------------------------------------------------------------------------------------------


@st.composite
def forwards_of_uses(draw):
    """Uses in order, none beginning before the one before has ended, and what each window needs beside them."""
    uses, window = [], draw(st.integers(0, 2))
    for _ in range(draw(st.integers(0, 10))):
        last = window + draw(st.integers(0, 3))
        uses.append(Use(draw(st.integers(1, 100)), window, last, draw(st.booleans())))
        window = last + draw(st.integers(1, 3))
    windows = window + draw(st.integers(1, 3))
    return uses, draw(st.lists(st.integers(0, 100), min_size=windows, max_size=windows))


def occupied(uses, windows, activation):
    total = list(activation)
    for use, begin in zip(uses, windows, strict=True):
        for window in range(begin, use.last + 1):
            total[window] += use.nbytes
    return total


@given(forwards_of_uses(), st.integers(0, 100))
def test_copies_begun_early_never_pass_the_cap(forward, extra):
    uses, activation = forward
    cap = smallest_cap(uses, activation) + extra
    assert max(occupied(uses, issue_windows(uses, activation, cap), activation)) <= cap


@given(forwards_of_uses(), st.integers(0, 400))
def test_copies_begin_in_order_of_use_and_never_after_it(forward, cap):
    uses, activation = forward
    windows = issue_windows(uses, activation, cap)
    assert windows == sorted(windows)
    assert all(0 <= begin <= use.first for begin, use in zip(windows, uses, strict=True))


@given(forwards_of_uses())
def test_with_the_smallest_cap_every_copy_can_hide_behind_the_unit_before(forward):
    uses, activation = forward
    windows = issue_windows(uses, activation, smallest_cap(uses, activation))
    for before, use, begin in zip(uses, uses[1:], windows[1:], strict=False):
        idle = range(before.last + 1, use.first)
        if use.overlap and all(activation[window] <= activation[before.last] for window in idle):
            assert begin <= before.last


@given(forwards_of_uses())
def test_less_than_the_smallest_cap_does_not_do(forward):
    uses, activation = forward
    cap = smallest_cap([Use(use.nbytes, use.first, use.last, overlap=False) for use in uses], activation)
    assert max(occupied(uses, [use.first for use in uses], activation), default=0) == cap


# -- errors ------------------------------------------------------------------------------------------------------------


def test_a_limit_that_is_too_small_tells_the_smallest():
    assert LimitTooSmall("say", 123).needed == 123
    assert issubclass(LimitTooSmall, ValueError)
