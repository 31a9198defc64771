"""A picture of a growth watch: each counter over the marks, and what grew, by bytes.

>>> draw_growth(watch.growth(), title="Memory over 10 runs").save("growth.png")

Its size does not depend on what it shows, so that a program that keeps the last picture does not grow by it.
"""

from __future__ import annotations

from math import ceil

from PIL.Image import Image

from .drawing import (
    BACKGROUND,
    COMPUTE_SHADES,
    COPY_SHADES,
    FAINT_INK,
    GRID,
    INK,
    LANE,
    MEMORY,
    STALL,
    STALL_GROUND,
    Sheet,
    text_width,
)
from .growth import ALLOCATED, LIVE, RAM, RESERVED, Counter, Growth, Mark, signed
from .picture import HEADING, LEFT, RIGHT, TEXT, TITLE, TITLE_Y, WIDTH
from .units import MIB, format_bytes

COLOURS = {ALLOCATED: MEMORY, RESERVED: COPY_SHADES[0], LIVE: COMPUTE_SHADES[0], RAM: FAINT_INK}
VERDICT_Y = 96
LANES_Y, LANE_HEIGHT, LANE_PITCH = 176, 96, 152  # top of the first lane, and from lane to lane
PLOT_LEFT = 200  # x of the curves; left of it what their edges stand for
DOT = 4
MOST_DOTS = 120  # of more marks only the line is drawn
KIND_HEIGHT, KIND_BAR = 104, 18
MOST_KINDS = 5
KINDS_HEIGHT = 40 + MOST_KINDS * KIND_HEIGHT + 20


def draw_growth(growth: Growth, *, title: str) -> Image:
    """The picture, 1400 pixels wide and for one device of one height, whatever grew. A title that is too long is shortened."""
    return GrowthPicture(growth).draw(title)


class GrowthPicture(Sheet):
    """The canvas of one picture."""

    def __init__(self, growth: Growth) -> None:
        self.growth = growth
        self.kinds_y = LANES_Y + len(growth.counters) * LANE_PITCH + 10
        super().__init__(WIDTH, self.kinds_y + KINDS_HEIGHT)

    def draw(self, title: str) -> Image:
        """The finished picture."""
        growth = self.growth
        self.text(LEFT, TITLE_Y, title[:500], TITLE, limit=RIGHT - LEFT)
        self.text(LEFT, VERDICT_Y, growth.verdict(), HEADING, STALL if growth.grows else INK, limit=RIGHT - LEFT)
        columns = {
            ALLOCATED: lambda mark: mark.allocated,
            RESERVED: lambda mark: mark.reserved,
            LIVE: lambda mark: mark.live,
            RAM: lambda mark: mark.rss,
        }
        for lane, counter in enumerate(growth.counters):
            values = [columns[counter.name](mark) for mark in growth.marks]
            self.draw_counter(LANES_Y + lane * LANE_PITCH, counter, growth.marks, values)
        self.draw_kinds(self.kinds_y)
        return self.image

    def draw_counter(self, top: int, counter: Counter, marks: tuple[Mark, ...], values: list[int]) -> None:
        """One counter's curve from its least to its greatest value, the marks to warm up on a hatched ground."""
        bottom = top + LANE_HEIGHT - 1
        verdict = "grows" if counter.grows else "does not grow" if counter.grows is False else "too few marks"
        change = f"{signed(counter.last - counter.first)}, {signed(counter.per_mark)} a {self.growth.unit}: {verdict}"
        self.text(LEFT, top - 22, f"{counter.name}: {format_bytes(counter.last)}, {change}", TEXT, limit=RIGHT - LEFT)
        self.canvas.rectangle((PLOT_LEFT, top, RIGHT - 1, bottom), LANE, GRID)
        low, high = min(values), max(values)
        if high - low < MIB:  # what is flat should look flat
            low, high = low - MIB // 2, low + MIB // 2
        span = max(1, marks[-1].number - marks[0].number)

        def place(mark: Mark, value: int) -> tuple[int, int]:
            x = PLOT_LEFT + 12 + round((mark.number - marks[0].number) / span * (RIGHT - PLOT_LEFT - 25))
            return x, bottom - 10 - round((value - low) / (high - low) * (LANE_HEIGHT - 20))

        points = [place(mark, value) for mark, value in zip(marks, values, strict=True)]
        if 0 < self.growth.warm_up < len(points):
            edge = (points[self.growth.warm_up - 1][0] + points[self.growth.warm_up][0]) // 2
            self.hatched((PLOT_LEFT + 1, top + 1, edge, bottom - 1), GRID, LANE)
        colour = COLOURS[counter.name]
        if len(points) > 1:
            self.canvas.line(points, colour, 3, joint="curve")
        for x, y in points if len(points) <= MOST_DOTS else ():
            self.canvas.ellipse((x - DOT, y - DOT, x + DOT, y + DOT), colour, BACKGROUND)
        for value, y in ((high, top + 12), (low, bottom - 12)):
            self.text(PLOT_LEFT - 12, y, format_bytes(max(0, value)), TEXT - 2, FAINT_INK, "rm")

    def draw_kinds(self, y: int) -> None:
        """A bar for each kind of tensor that grew, with its words in two lines above it."""
        self.text(LEFT, y, "What grew", HEADING)
        if not self.growth.kinds:
            self.text(LEFT + ceil(text_width("What grew", HEADING)) + 24, y + 1, "no tensors", TEXT, FAINT_INK)
        longest = max((kind.nbytes for kind in self.growth.kinds), default=1)
        for number, kind in enumerate(self.growth.kinds[:MOST_KINDS]):
            middle = y + 48 + number * KIND_HEIGHT
            what, why = kind.describe()
            self.text(LEFT, middle, what, TEXT, limit=RIGHT - LEFT)
            self.text(LEFT, middle + 30, why, TEXT, FAINT_INK, limit=RIGHT - LEFT)
            end = LEFT + max(2, round(kind.nbytes / longest * (RIGHT - LEFT)))
            top = middle + 48
            self.hatched((LEFT, top, end - 1, top + KIND_BAR - 1), STALL, STALL_GROUND)
