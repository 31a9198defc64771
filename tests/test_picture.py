"""What users of the picture of a plan rely on."""

from collections import Counter
from contextlib import contextmanager
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from intelligent_vram.vram import picture
from intelligent_vram.vram.drawing import COMPUTE_SHADES, STALL_GROUND, format_time
from intelligent_vram.vram.picture import blank_plan, draw_plan
from intelligent_vram.vram.picture_parts import block_cells, memory_by_use, times
from intelligent_vram.vram.plan import Plan, Unit, stream_all, stream_blocks
from intelligent_vram.vram.predict import Prediction
from PIL import ImageColor, ImageDraw

GIB, MIB = 1 << 30, 1 << 20


def units(blocks, per_block=2, nbytes=64 * MIB, outside=0):
    numbers = [block for block in range(blocks) for _ in range(per_block)] + [None] * outside
    return [Unit(index, index + 1, nbytes, block) for index, block in enumerate(numbers)]


def predicted(plan, **given):
    numbers = dict(
        limit=12 * GIB, context=GIB // 2, beside=GIB, activations=2 * GIB, seconds=1.5, compute=1.2, link=2e10, arena=0
    )
    return Prediction(plan=plan, **{**numbers, **given})


def pixels(image, colour, top=0, bottom=None):
    """How many pixels of a colour there are between two rows."""
    part = image.crop((0, top, image.width, image.height if bottom is None else bottom))
    counts = {found: count for count, found in part.getcolors(part.width * part.height)}
    return counts.get(ImageColor.getrgb(colour), 0)


def in_strip(prediction, colour, **arguments):
    """Pixels of a colour in the strips of blocks, without their legend."""
    drawn = picture.PlanPicture(prediction, 16 * GIB, None, arguments.get("block_lists"))
    return pixels(drawn.draw("Title"), colour, picture.BLOCKS_Y + 70, drawn.memory_y - 20)


def bar_widths(prediction, total=16 * GIB, others=None):
    """The columns of each colour in the bar of the card, lines between uses included in what they are drawn over."""
    drawn = picture.PlanPicture(prediction, total, others, None)
    image = drawn.draw("Title")
    row = drawn.memory_y + 66 + 3
    counts = Counter(image.getpixel((x, row)) for x in range(picture.LEFT, picture.RIGHT))
    return {use.label: counts[ImageColor.getrgb(picture.USES[use.label])] for use in drawn.memory.uses}


@contextmanager
def recorded():
    """The box of each text that is drawn inside, and the text."""
    drawn = []
    original = ImageDraw.ImageDraw.text

    def text(self, xy, text, fill, font, anchor):
        drawn.append((self.textbbox(xy, text, font, anchor), text))
        original(self, xy, text, fill, font, anchor)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ImageDraw.ImageDraw, "text", text)
        yield drawn


@pytest.fixture
def texts():
    with recorded() as drawn:
        yield drawn


@pytest.mark.parametrize("blocks", [1, 7, 40, 57, 120])
@pytest.mark.parametrize("share", [0, 0.3, 0.5, 1])
def test_the_strip_is_streamed_as_far_as_the_plan_is(blocks, share):
    plan = stream_blocks(units(blocks), round(blocks * share), 2)
    streamed = in_strip(predicted(plan), picture.STREAMED)
    resident = in_strip(predicted(plan), picture.RESIDENT)
    assert streamed / (streamed + resident) == pytest.approx(plan.streamed_bytes / (blocks * 128 * MIB), abs=0.02)


def test_a_block_is_divided_among_its_units_by_their_bytes():
    plan = Plan((Unit(0, 1, 3 * MIB, 0), Unit(1, 2, MIB, 0)), frozenset({0}), 1, MIB)
    streamed, resident = (in_strip(predicted(plan), colour) for colour in (picture.STREAMED, picture.RESIDENT))
    assert streamed / (streamed + resident) == pytest.approx(1 / 4, abs=0.02)
    (cell,) = block_cells(plan)["blocks"]
    assert cell.state == "partly"


def test_each_list_of_blocks_has_a_strip_of_its_own(texts):
    plan = stream_all(units(48), 3)
    draw_plan(predicted(plan), 16 * GIB, title="Title", block_lists={"blocks": 40, "vace_blocks": 8})
    written = [text for _, text in texts]
    assert "blocks: 40" in written
    assert "vace_blocks: 8" in written
    numbers = Counter(text for text in written if text.isdigit())
    assert numbers == {str(number): 2 if number < 8 else 1 for number in range(40)}


def test_a_block_that_shares_its_unit_with_the_one_before_looks_like_it():
    plan = Plan((Unit(0, 3, MIB, 0), Unit(3, 4, MIB, 2)), frozenset({1}), 1, MIB)
    assert [cell.state for cell in block_cells(plan, {"blocks": 4})["blocks"]] == [
        "streamed", "streamed", "resident", "resident"
    ]  # fmt: skip


def test_blocks_that_no_list_names_and_units_outside_the_blocks_are_shown():
    cells = block_cells(stream_all(units(5, outside=2), 2), {"blocks": 3, "vace_blocks": 0})
    assert {name: len(found) for name, found in cells.items()} == {
        "blocks": 3, "further blocks": 2, "outside the blocks": 1
    }  # fmt: skip


def test_the_legend_counts_blocks(texts):
    plan = Plan(tuple(units(3, outside=2)), frozenset({0, 1, 2, 6}), 2, 64 * MIB)
    draw_plan(predicted(plan), 16 * GIB, title="Title")
    assert {"resident: 1", "streamed: 1", "partly: 1"} <= {text for _, text in texts}


def test_a_prediction_of_nothing_can_be_drawn():
    nothing = predicted(
        Plan((), frozenset(), 0, 0), limit=0, context=0, beside=0, activations=0, seconds=0.0, compute=0.0
    )
    assert draw_plan(nothing, 0, title="").width == picture.WIDTH


def test_the_bar_is_as_wide_for_each_use_as_its_bytes():
    plan = stream_blocks(units(40), 20, 4)
    prediction = predicted(plan)
    uses = memory_by_use(prediction, 16 * GIB, 2 * GIB).uses
    widths = bar_widths(prediction, others=2 * GIB)
    assert sum(use.nbytes for use in uses) == 16 * GIB
    for use in uses:
        expected = use.nbytes / (16 * GIB) * (picture.RIGHT - picture.LEFT)
        assert widths[use.label] == pytest.approx(expected, abs=13 if use.label == "free within the limit" else 5)


def test_uses_add_up_to_the_predicted_peak():
    prediction = predicted(stream_blocks(units(40), 20, 4))
    memory = memory_by_use(prediction, 16 * GIB, GIB)
    assert memory.peak == prediction.peak
    assert sum(use.nbytes for use in memory.uses[:5]) == prediction.peak
    assert {use.label: use.nbytes for use in memory.uses}["free within the limit"] == 12 * GIB - prediction.peak
    assert memory.excess is None


def test_with_nothing_streamed_there_are_no_slots():
    plan = stream_blocks(units(3, nbytes=13 * MIB), 0, 2)
    sizes = {use.label: use.nbytes for use in memory_by_use(predicted(plan), 16 * GIB, None).uses}
    assert sizes["slots"] == 0
    assert sizes["resident"] == plan.device_bytes


@pytest.mark.parametrize(
    ("limit", "total", "others", "words", "excess"),
    [
        (3 * GIB, 16 * GIB, None, "above the limit", GIB // 2),
        (8 * GIB, 3 * GIB, 0, "more than is free", GIB // 2),
        (8 * GIB, 4 * GIB, 2 * GIB, "more than is free", 3 * GIB // 2),
    ],
    ids=["limit", "card", "other programs"],
)
def test_what_is_above_the_limit_or_the_card_is_hatched_and_named(texts, limit, total, others, words, excess):
    prediction = predicted(Plan((), frozenset(), 0, 0), limit=limit)
    assert memory_by_use(prediction, total, others).excess == (words, excess)
    image = draw_plan(prediction, total, title="Title", others=others)
    assert any(text.startswith(f"{words}: ") for _, text in texts)
    assert pixels(image, STALL_GROUND) > 0
    roomy = draw_plan(prediction, 16 * GIB, title="Title", others=others)
    assert (limit > prediction.peak) == (pixels(roomy, STALL_GROUND) == 0)


def test_the_limit_is_a_line_where_its_bytes_end():
    drawn = picture.PlanPicture(predicted(stream_all(units(4), 2), limit=12 * GIB), 16 * GIB, None, None)
    image = drawn.draw("Title")
    row = drawn.memory_y + 66 - 5
    ink = [x for x in range(image.width) if image.getpixel((x, row)) == ImageColor.getrgb(picture.INK)]
    assert sum(ink) / len(ink) == pytest.approx(picture.LEFT + 0.75 * (picture.RIGHT - picture.LEFT), abs=1)


@pytest.mark.parametrize("gib", range(1, 17))
def test_a_size_in_the_bar_is_inside_its_use_and_no_line_crosses_it(texts, gib):
    plan = stream_blocks(units(40), 20, 4)
    drawn = picture.PlanPicture(predicted(plan, limit=gib * GIB), 6 * GIB, GIB, None)
    image = drawn.draw("Title")
    check_boxes(texts, image.size)
    top = drawn.memory_y + 66
    inside = [box for box, _ in texts if top < box[1] < top + picture.BAR_HEIGHT]
    assert inside
    for left, _, right, _ in inside:
        assert len({image.getpixel((x, top + 3)) for x in range(round(left) - 4, round(right) + 4)}) == 1


def test_bars_of_time_are_as_long_as_their_seconds():
    plan = stream_all(units(40), 3)
    prediction = predicted(plan, seconds=0.8, compute=0.2, link=plan.streamed_bytes / 0.4)
    assert times(prediction) == {
        "predicted": 0.8, "floor": pytest.approx(0.4), "compute alone": 0.2, "copies alone": pytest.approx(0.4)
    }  # fmt: skip
    drawn = picture.PlanPicture(prediction, 16 * GIB, None, None)
    image = drawn.draw("Title")

    def length(row, colour):
        y = drawn.times_y + 48 + row * picture.TIME_HEIGHT - picture.TIME_BAR // 2 + 1
        return sum(image.getpixel((x, y)) == ImageColor.getrgb(colour) for x in range(image.width))

    longest = length(0, picture.INK)
    assert longest == picture.TIME_RIGHT - picture.TIME_LEFT
    assert length(2, COMPUTE_SHADES[0]) == pytest.approx(longest / 4, abs=2)
    assert length(3, picture.STREAMED) == pytest.approx(longest / 2, abs=2)


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0, "0 ms"), (0.0213, "21.3 ms"), (0.99949, "999 ms"), (0.9996, "1 s"), (3.0931, "3.09 s"), (1234.4, "1234 s")],
)
def test_times_are_in_ms_or_s(seconds, words):
    assert format_time(seconds) == words


@pytest.mark.parametrize("link", [0.0, 5e-324, float("nan"), None])
def test_a_link_that_moves_nothing_is_no_time(link):
    found = times(predicted(stream_all(units(2), 2), link=link))
    assert found["copies alone"] is None
    assert found["floor"] is None
    draw_plan(predicted(stream_all(units(2), 2), link=link), 16 * GIB, title="Title")


def test_times_that_cannot_be_told_are_said_to_be_unknown(texts):
    prediction = predicted(stream_all(units(2), 2), seconds=None, compute=float("nan"), link=0.0)
    draw_plan(prediction, 16 * GIB, title="Title")
    assert [text for _, text in texts].count("not known") == 4


sizes = st.one_of(st.none(), st.integers(0, 200 * GIB))
moments = st.one_of(st.none(), st.floats())


@st.composite
def plans(draw):
    blocks = draw(st.one_of(st.integers(0, 60), st.just(120), st.just(700)))
    nbytes = draw(st.sampled_from([0, 1, MIB, 300 * MIB, 40 * GIB]))
    found = units(blocks, draw(st.integers(1, 3)), nbytes, draw(st.integers(0, 3)))
    chosen = draw(st.sets(st.integers(0, len(found) - 1))) if found else set()
    return Plan(tuple(found), frozenset(chosen), draw(st.integers(0, 8)), nbytes)


@settings(max_examples=60, deadline=None)
@given(
    plan=plans(),
    numbers=st.fixed_dictionaries({"limit": sizes, "seconds": moments, "compute": moments, "link": moments}),
    total=sizes,
    others=sizes,
    title=st.text(max_size=200),
    block_lists=st.one_of(st.none(), st.dictionaries(st.text(max_size=100), st.integers(-1, 100), max_size=12)),
)
def test_anything_can_be_drawn_and_no_text_overlaps(plan, numbers, total, others, title, block_lists):
    with recorded() as boxes:
        image = draw_plan(predicted(plan, **numbers), total, title=title, others=others, block_lists=block_lists)
    assert image.mode == "RGB"
    assert image.width == picture.WIDTH
    check_boxes(boxes, image.size)


def check_boxes(boxes, size):
    """All inside the margins, none over another."""
    boxes = [(box, text) for box, text in boxes if text]
    for (left, top, right, bottom), text in boxes:
        assert left >= picture.LEFT - 3, text  # a letter may reach a little beyond where it stands
        assert top >= 0, text
        assert right <= picture.RIGHT + 3, text
        assert bottom <= size[1], text
    for (a, one), (b, other) in combinations(boxes, 2):
        apart = a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]
        assert apart, (one, other)


@pytest.mark.parametrize("count", [1, 2, 9, 10, 11, 39, 40, 41, 99, 100, 101, 120, 1001])
def test_numbers_of_blocks_are_readable_for_any_count(texts, count):
    image = draw_plan(predicted(stream_all(units(count), 2)), 16 * GIB, title="Title " * 60)
    check_boxes(texts, image.size)
    heights = [box[3] - box[1] for box, text in texts if text.isdigit()]
    assert min(heights) >= 12
    assert image.height < 1600


@pytest.mark.parametrize("reason", ["", "No room.", "word " * 300, "x" * 3000])
def test_the_reason_why_there_is_no_plan_is_all_there(texts, reason):
    image = blank_plan("Title " * 60, reason)
    check_boxes(texts, image.size)
    if " " in reason:
        assert " ".join(text for _, text in texts[1:]).split() == reason.split()
