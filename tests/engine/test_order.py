"""The order of use is learned from the last forward and followed through skipped, repeated and unexpected layers."""

from hypothesis import given
from hypothesis import strategies as st
from intelligent_vram.vram.order import Order

UNIT_OF = ("A", "A", "B", "C", "C", "D")  # the units of layers 0 to 5


def learned(sequence, streamed="ABCD", unit_of=UNIT_OF):
    order = Order()
    order.learn(sequence, unit_of, set(streamed))
    return order


def runs(order):
    return [(run.unit, run.first, run.last) for run in order.runs]


def walk(order, layers):
    for layer in layers:
        order.advance(layer)
    return order


def test_consecutive_layers_of_a_unit_are_one_run():
    assert runs(learned([0, 1, 2, 3, 4, 5])) == [("A", 0, 1), ("B", 2, 2), ("C", 3, 4), ("D", 5, 5)]


def test_a_unit_that_comes_back_later_is_another_run():
    assert runs(learned([0, 2, 1, 0])) == [("A", 0, 0), ("B", 1, 1), ("A", 2, 3)]


def test_resident_units_make_no_runs():
    assert runs(learned([0, 1, 2, 3, 4, 5], streamed="BD")) == [("B", 2, 2), ("D", 5, 5)]


def test_a_resident_layer_between_does_not_divide_a_run():
    assert runs(learned([0, 2, 1], streamed="A")) == [("A", 0, 2)]


def test_the_next_unit_is_that_of_the_next_layer():
    order = learned([0, 1, 2, 3, 4, 5])
    seen = [order.next_unit()]
    for layer in range(6):
        order.advance(layer)
        seen.append(order.next_unit())
    assert seen == ["A", "A", "B", "C", "C", "D", None]


def test_a_skipped_layer_is_left_behind():
    order = walk(learned([0, 1, 2, 3, 4, 5]), [0, 1, 3])
    assert order.next_unit() == "C"
    assert order.distance("C") == 0
    assert order.distance("B") == 3  # in the next forward


def test_a_layer_that_comes_early_moves_on_to_its_place():
    assert walk(learned([0, 1, 2, 3, 4, 5]), [5]).position == 6


def test_a_layer_that_comes_again_is_looked_for_around_the_cycle():
    order = walk(learned([0, 1, 2, 3, 4, 5]), [0, 1, 2, 0])
    assert order.position == 1
    assert order.next_unit() == "A"


def test_a_repeated_block_is_followed_through_both_uses():
    order = learned([0, 2, 0, 2, 3])
    assert [walk(order, [layer]).next_unit() for layer in (0, 2, 0, 2, 3)] == ["B", "A", "B", "C", None]


def test_a_layer_that_was_never_seen_changes_nothing():
    order = walk(learned([0, 1, 2]), [0, 5])
    assert order.position == 1
    assert order.next_unit() == "A"


def test_nothing_is_expected_before_anything_was_learned():
    order = Order()
    order.advance(3)
    assert order.next_unit() is None
    assert order.here() == 0
    assert order.distance("A") > 0


def test_distance_counts_runs_ahead_with_the_wrap_around():
    order = walk(learned([0, 1, 2, 3, 4, 5]), [0, 1, 2])
    assert [order.distance(unit) for unit in "CDAB"] == [0, 1, 2, 3]


def test_a_unit_in_the_middle_of_its_run_is_here():
    order = walk(learned([0, 1, 2, 3, 4, 5]), [0])
    assert order.distance("A") == 0
    assert order.distance("B") == 1


def test_at_the_end_of_a_forward_the_first_unit_of_the_next_is_nearest():
    order = walk(learned([0, 1, 2, 3, 4, 5]), range(6))
    assert order.here() == 4
    assert [order.distance(unit) for unit in "ABCD"] == [0, 1, 2, 3]


def test_what_is_not_expected_is_farther_than_everything_that_is():
    order = learned([0, 1, 2], streamed="AB")
    farthest = max(order.distance("A"), order.distance("B"))
    assert order.distance("D") > farthest
    assert order.distance(None) > farthest


def test_learning_anew_forgets_the_old_order_and_starts_at_the_beginning():
    order = walk(learned([0, 1, 2, 3]), [0, 1])
    order.learn([5, 2], UNIT_OF, set("ABCD"))
    assert order.next_unit() == "D"
    assert order.distance("A") > order.distance("B")


layers = st.lists(st.integers(0, 5), max_size=20)


@given(layers, st.sets(st.sampled_from("ABCD")))
def test_following_the_learned_order_every_unit_is_predicted(sequence, streamed):
    order = learned(sequence, streamed)
    for layer in sequence:
        assert order.next_unit() == UNIT_OF[layer]
        if UNIT_OF[layer] in streamed:
            assert order.distance(UNIT_OF[layer]) == 0
        order.advance(layer)
    assert order.next_unit() is None
    assert order.here() == len(order.runs)


@given(layers, st.sets(st.sampled_from("ABCD")))
def test_runs_are_the_streamed_units_in_order_without_repeats_side_by_side(sequence, streamed):
    order = learned(sequence, streamed)
    used = [UNIT_OF[layer] for layer in sequence if UNIT_OF[layer] in streamed]
    assert [run.unit for run in order.runs] == [
        unit for index, unit in enumerate(used) if index == 0 or used[index - 1] != unit
    ]
    assert all(UNIT_OF[sequence[at]] == run.unit for run in order.runs for at in (run.first, run.last))


@given(layers, layers, st.sampled_from("ABCD"))
def test_distance_is_the_number_of_runs_until_the_unit_comes(sequence, walked, unit):
    order = walk(learned(sequence), walked)
    around = [order.runs[(order.here() + ahead) % len(order.runs)].unit for ahead in range(len(order.runs))]
    assert order.distance(unit) == (around.index(unit) if unit in around else len(order.runs) + 1)


@given(layers, layers)
def test_after_any_expected_layer_the_position_is_just_behind_it(sequence, walked):
    order = learned(sequence)
    for layer in walked:
        order.advance(layer)
        assert 0 <= order.position <= len(sequence)
        if layer in sequence:
            assert sequence[order.position - 1] == layer
