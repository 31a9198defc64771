"""A picture of one forward: when units were copied to the device, when they computed, and where compute waited.

>>> copies = [Interval("block 0", 0.000, 0.013), Interval("block 1", 0.013, 0.026)]
>>> computes = [Interval("block 0", 0.013, 0.025), Interval("block 1", 0.026, 0.038)]
>>> draw_timeline(copies, computes, "timeline.png", title="Two blocks, both streamed")

Colours are those of all pictures (drawing.py); stalls are hatched as well.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, floor, log10

from PIL import Image, ImageDraw

from ..vram.drawing import (
    BACKGROUND,
    COMPUTE_SHADES,
    COPY_SHADES,
    FAINT_INK,
    GRID,
    INK,
    LANE,
    MEMORY,
    MEMORY_GROUND,
    STALL,
    STALL_GROUND,
    Sheet,
    milliseconds,
    swatch_box,
    text_width,
)
from ..vram.units import GIB

WIDTH = 1600
LEFT, RIGHT = 160, 1560  # x of the plot's left edge and of the first column beyond it
TITLE_Y, LEGEND_Y, LANES_Y = 38, 82, 114  # y of the middle of title and legend, of the top of the first lane
LANE_HEIGHT, LANE_GAP = 78, 26
MEMORY_HEIGHT = 110
AXIS_GAP, FOOTER_GAP = 14, 72  # from the last lane to the axis, from the axis to the middle of the footer
BOTTOM = 38

TICKS = 14  # at most so many tick marks
FINE = 8  # columns drawn for one pixel, so that intervals narrower than a pixel blend instead of hiding each other
HATCHED_WIDTH = 3  # pixels; narrower stalls are too small for a hatch and get its colour
SHORTEST_STALL = 20e-6  # seconds; what is shorter is the time between two kernel launches


@dataclass(frozen=True)
class Interval:
    """What ran from start to end, in seconds from any common origin."""

    label: str
    start: float
    end: float


@dataclass(frozen=True)
class Axis:
    """Maps seconds from start to end to pixels from LEFT to RIGHT."""

    start: float
    end: float

    def column(self, seconds: float, width: int = RIGHT - LEFT) -> int:
        """The column of a moment when the axis is width columns wide, from 0."""
        return round((seconds - self.start) / (self.end - self.start) * width)

    def x(self, seconds: float) -> int:
        """The pixel column of a moment in the picture."""
        return LEFT + self.column(seconds)


def find_stalls(computes: Sequence[Interval], origin: float) -> list[Interval]:
    """Gaps between computes, from origin (seconds) on, that are not shorter than SHORTEST_STALL, in order of time.

    Computes may be in any order and may overlap.
    """
    stalls = []
    reached = origin
    for compute in sorted(computes, key=lambda interval: interval.start):
        if compute.start - reached >= SHORTEST_STALL:
            stalls.append(Interval("stall", reached, compute.start))
        reached = max(reached, compute.end)
    return stalls


def nice_step(span: float, most: int) -> float:
    """The smallest of 1, 2, 5 times a power of ten that divides span into at most ``most`` steps."""
    magnitude = 10.0 ** floor(log10(span / most))
    return next(factor * magnitude for factor in (1, 2, 5, 10) if span / (factor * magnitude) <= most * (1 + 1e-9))


def draw_timeline(
    copies: Sequence[Interval],
    computes: Sequence[Interval],
    path: str | os.PathLike[str],
    *,
    title: str,
    footer: str = "",
    limit_bytes: int | None = None,
    memory: Sequence[tuple[float, int]] | None = None,
) -> None:
    """Write a PNG of 1600 x 420 pixels, or 1600 x 556 when there is memory to draw.

    copies and computes: any number of intervals, none included; a label that doesn't fit its interval is left out.
    memory: (seconds, bytes of device memory in use from then on), drawn as a third lane, in order of time.
    limit_bytes: the memory limit, a dashed line in that lane; without memory it is not drawn.
    """
    Timeline(copies, computes, memory or (), limit_bytes).draw(title, footer).save(path, format="PNG")


class Timeline(Sheet):
    """The canvas of one picture."""

    def __init__(
        self,
        copies: Sequence[Interval],
        computes: Sequence[Interval],
        memory: Sequence[tuple[float, int]],
        limit_bytes: int | None,
    ) -> None:
        self.copies = sorted(copies, key=lambda interval: interval.start)
        self.computes = sorted(computes, key=lambda interval: interval.start)
        self.memory = memory
        self.limit_bytes = limit_bytes

        intervals = [*copies, *computes]
        moments = [i.start for i in intervals] + [i.end for i in intervals] + [seconds for seconds, _ in memory]
        start, end = (min(moments), max(moments)) if moments else (0.0, 1e-3)
        self.axis = Axis(start, end if end > start else start + 1e-3)
        self.stalls = find_stalls(computes, min((i.start for i in intervals), default=start))

        lanes_end = LANES_Y + 2 * LANE_HEIGHT + LANE_GAP
        self.plot_bottom = (lanes_end + LANE_GAP + MEMORY_HEIGHT if memory else lanes_end) + AXIS_GAP
        super().__init__(WIDTH, self.plot_bottom + FOOTER_GAP + BOTTOM)

    def draw(self, title: str, footer: str) -> Image.Image:
        """The finished picture."""
        compute_y = LANES_Y + LANE_HEIGHT + LANE_GAP
        memory_y = compute_y + LANE_HEIGHT + LANE_GAP
        self.text(LEFT, TITLE_Y, title, 26, limit=RIGHT - LEFT)
        self.legend()
        self.lane(LANES_Y, LANE_HEIGHT, "host to", "device")
        self.lane(compute_y, LANE_HEIGHT, "compute")
        if self.memory:
            self.lane(memory_y, MEMORY_HEIGHT, "device", "memory")
        self.time_axis()
        self.intervals(self.copies, LANES_Y, COPY_SHADES)
        self.intervals(self.computes, compute_y, COMPUTE_SHADES, self.stalls)
        if self.memory:
            self.memory_curve(memory_y)
        self.text(LEFT, self.plot_bottom + FOOTER_GAP, footer, 16, FAINT_INK, limit=RIGHT - LEFT)
        return self.image

    def legend(self) -> None:
        """What the colours mean, and the sum of all stalls."""
        stalled = sum(stall.end - stall.start for stall in self.stalls)
        span = self.axis.end - self.axis.start
        waits = f"stall: compute waits, {milliseconds(stalled)} of {milliseconds(span)} ({stalled / span:.1%})"
        entries = [
            (COPY_SHADES, f"copy to the device ({len(self.copies)})"),
            (COMPUTE_SHADES, f"compute ({len(self.computes)})"),
            (None, waits if self.computes else "stall: compute waits"),
        ]
        x = LEFT
        for shades, text in entries:
            if shades is None:
                self.hatched(swatch_box(x, LEGEND_Y), STALL, STALL_GROUND)
            else:
                self.swatch(x, LEGEND_Y, *shades)
            self.text(x + 46, LEGEND_Y, text, 16)
            x += 46 + ceil(text_width(text, 16)) + 40

    def lane(self, y: int, height: int, *name: str) -> None:
        """An empty lane with its name, one or two lines, at the left."""
        self.canvas.rectangle((LEFT, y, RIGHT - 1, y + height - 1), LANE)
        for line, text in enumerate(name):
            self.text(LEFT - 16, y + height // 2 + round(22 * (line - (len(name) - 1) / 2)), text, 18, anchor="rm")

    def time_axis(self) -> None:
        """Tick marks in milliseconds from the start, with faint lines through the lanes."""
        bottom = self.plot_bottom
        span = (self.axis.end - self.axis.start) * 1e3
        step = nice_step(span, TICKS)
        decimals = max(0, -floor(log10(step) + 1e-9))
        for tick in range(floor(span / step + 1e-9) + 1):
            x = self.axis.x(self.axis.start + tick * step / 1e3)
            self.canvas.line((x, LANES_Y - 4, x, bottom), GRID)
            self.canvas.line((x, bottom, x, bottom + 6), FAINT_INK)
            self.text(x, bottom + 18, f"{tick * step:.{decimals}f}", 16, FAINT_INK, "mm")
        self.canvas.line((LEFT, bottom, RIGHT, bottom), FAINT_INK)
        self.text(LEFT - 24, bottom + 18, "ms", 16, FAINT_INK, "rm")

    def intervals(
        self, intervals: Sequence[Interval], y: int, shades: tuple[str, str], stalls: Sequence[Interval] = ()
    ) -> None:
        """A lane's boxes in alternating shades, with those labels that fit, and its stalls."""
        strip = Image.new("RGBA", ((RIGHT - LEFT) * FINE, 1))
        pen = ImageDraw.Draw(strip)
        colours = [(stall, STALL) for stall in stalls]
        colours += [(interval, shades[number % 2]) for number, interval in enumerate(intervals)]
        for interval, colour in colours:
            first, end = (self.axis.column(moment, strip.width) for moment in (interval.start, interval.end))
            pen.line((first, 0, max(first, end - 1), 0), colour)
        lane = strip.resize((RIGHT - LEFT, LANE_HEIGHT), Image.Resampling.BOX)
        self.image.paste(lane, (LEFT, y), lane)
        for stall in stalls:
            first, end = self.axis.x(stall.start), self.axis.x(stall.end)
            if end - first >= HATCHED_WIDTH:
                self.hatched((first, y, end - 1, y + LANE_HEIGHT - 1), STALL, STALL_GROUND)
        for number, interval in enumerate(intervals):
            first, end = self.axis.x(interval.start), self.axis.x(interval.end)
            ink = BACKGROUND if number % 2 == 0 else INK
            self.label(interval.label, (first + end) // 2, y + LANE_HEIGHT // 2, end - first - 6, ink)

    def label(self, label: str, x: int, y: int, room: int, ink: str) -> None:
        """A label around (x, y) if it fits into room pixels, else its last word, else nothing."""
        for text in (label, label.split(" ")[-1]):
            for size in (16, 14):
                if text_width(text, size) <= room:
                    self.text(x, y, text, size, ink, "mm")
                    return

    def memory_curve(self, y: int) -> None:
        """Bytes in use over time as a filled staircase from zero, with its peak and, dashed, the limit."""
        peak = max(amount for _, amount in self.memory)
        top = max(peak, self.limit_bytes or 0, 1) * 1.3
        floor_y = y + MEMORY_HEIGHT - 1

        def level(amount: float) -> int:
            return floor_y - round(amount / top * MEMORY_HEIGHT)

        ends = [seconds for seconds, _ in self.memory[1:]] + [self.axis.end]
        steps: list[tuple[int, int]] = []
        for (seconds, amount), end in zip(self.memory, ends, strict=True):
            steps += [(self.axis.x(seconds), level(amount)), (self.axis.x(end), level(amount))]
        self.canvas.polygon([(steps[0][0], floor_y), *steps, (steps[-1][0], floor_y)], MEMORY_GROUND)
        self.canvas.line(steps, MEMORY, 2)
        caption = f"peak {peak / GIB:.2f} GiB"
        if self.limit_bytes is not None:
            limit_y = level(self.limit_bytes)
            for x in range(LEFT, RIGHT, 14):
                self.canvas.line((x, limit_y, min(x + 8, RIGHT), limit_y), INK, 2)
            caption += f", limit {self.limit_bytes / GIB:.2f} GiB"
        self.text(RIGHT - 8, y + 11, caption, 16, anchor="rm")
