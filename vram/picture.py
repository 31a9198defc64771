"""A picture of a plan before it runs: which blocks are resident or streamed, VRAM by use against the card, and the
predicted time of a forward against its floor.

>>> draw_plan(prediction, 16 << 30, title="Wan 2.1 14B on a card of 16 GiB", block_lists={"blocks": 40}).save("plan.png")

Resident and streamed differ in lightness as much as in colour, and nothing is said by colour alone: every size and
time is there in words. Text is large enough to be read at half the size.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
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
    format_time,
    shorten,
    swatch_box,
    text_width,
    wrap,
)
from .hardware import format_rate
from .picture_parts import OUTSIDE, Cell, Use, block_cells, join_cells, memory_by_use, times
from .predict import Prediction
from .units import format_bytes

WIDTH = 1400
LEFT, RIGHT = 40, 1360  # x of the plots' left edge and of the first column beyond them
TITLE, HEADING, TEXT, NUMBER = 32, 28, 22, 20  # sizes of text
TITLE_Y, BLOCKS_Y = 48, 112  # y of the middle of the title and of the first heading

LIST_HEIGHT, ROW_HEIGHT = 42, 84  # of the name of a list, and of a row of cells with their numbers
CELL_HEIGHT, CELL_GAP = 46, 4
NARROWEST_CELL, WIDEST_CELL = 33, 110  # with the gap
MOST_CELLS = 240  # of more blocks several share a cell

LINE_HEIGHT = 34
BAR_HEIGHT = 64
LEGEND_COLUMNS, LEGEND_HEIGHT = 3, 36
TIME_LEFT, TIME_RIGHT = 210, 900  # x of the bars of time; behind them there is room for words
TIME_HEIGHT, TIME_BAR = 44, 28

RESIDENT, STREAMED = MEMORY, COPY_SHADES[1]
STATES = {"resident": (RESIDENT,), "streamed": (STREAMED,), "partly": (RESIDENT, STREAMED), "not in the plan": (LANE,)}
USES = {
    "CUDA context": FAINT_INK,
    "beside the blocks": "#BBA9DD",
    "resident": RESIDENT,
    "slots": STREAMED,
    "activations": "#F0C94A",
    "free within the limit": BACKGROUND,
    "rest of the card": GRID,
    "other programs": "#9AA5B1",
}
LIGHT_INK_ON = (FAINT_INK, RESIDENT)
EXCESS_HEIGHT = 12


def draw_plan(
    prediction: Prediction,
    device_total: int,
    *,
    title: str,
    others: int | None = None,
    block_lists: Mapping[str, int] | None = None,
) -> Image:
    """An RGB picture 1400 pixels wide, as high as the blocks need.

    device_total: bytes of the card, 0 where that is not known; others: bytes of it that other programs hold, None where
    that is not known. block_lists: names of the lists of blocks, each with its number of blocks, in order of definition,
    as in ModelFacts. What cannot be told (a time that is no number) is said to be unknown, nothing raises.
    """
    return PlanPicture(prediction, device_total, others, block_lists).draw(title)


def blank_plan(title: str, reason: str) -> Image:
    """A picture like draw_plan's for what has no plan: in place of it ``reason``, in as many lines as it needs."""
    lines = wrap(reason[:2000], TEXT, RIGHT - LEFT)
    sheet = Sheet(WIDTH, BLOCKS_Y + LINE_HEIGHT * max(1, len(lines)) + 24)
    sheet.text(LEFT, TITLE_Y, title[:500], TITLE, limit=RIGHT - LEFT)
    for number, line in enumerate(lines):
        sheet.text(LEFT, BLOCKS_Y + number * LINE_HEIGHT, line, TEXT, limit=RIGHT - LEFT)
    return sheet.image


class PlanPicture(Sheet):
    """The canvas of one picture."""

    def __init__(
        self, prediction: Prediction, device_total: int, others: int | None, block_lists: Mapping[str, int] | None
    ) -> None:
        self.prediction = prediction
        self.memory = memory_by_use(prediction, device_total, others)
        self.blocks = block_cells(prediction.plan, block_lists)
        self.blocks_a_cell = ceil(sum(map(len, self.blocks.values())) / MOST_CELLS)
        self.lists = {name: join_cells(cells, self.blocks_a_cell) for name, cells in self.blocks.items()}
        self.columns = self._columns()
        rows = sum(self._rows(cells) for cells in self.lists.values())
        self.memory_y = BLOCKS_Y + 100 + LIST_HEIGHT * len(self.lists) + ROW_HEIGHT * rows
        legend_rows = ceil(len(self._legend()) / LEGEND_COLUMNS)
        self.times_y = self.memory_y + 222 + LEGEND_HEIGHT * legend_rows
        super().__init__(WIDTH, self.times_y + 4 * TIME_HEIGHT + 56)

    def draw(self, title: str) -> Image:
        """The finished picture."""
        self.text(LEFT, TITLE_Y, title[:500], TITLE, limit=RIGHT - LEFT)
        self.draw_blocks(BLOCKS_Y)
        self.draw_memory(self.memory_y)
        self.draw_times(self.times_y)
        return self.image

    def heading(self, y: int, heading: str, caption: str) -> None:
        """A heading with what it says in numbers beside it."""
        self.text(LEFT, y, heading, HEADING)
        x = LEFT + ceil(text_width(heading, HEADING)) + 24
        self.text(x, y + 1, caption, TEXT, FAINT_INK, limit=RIGHT - x)

    def _columns(self) -> int:
        """Cells in a row: as many as leave room for their numbers, a round number where there are several rows."""
        longest = max((len(cells) for cells in self.lists.values()), default=1)
        highest = max((cell.first for cells in self.lists.values() for cell in cells), default=0)
        widest = ceil(text_width("0" * len(str(highest)), NUMBER))
        most = (RIGHT - LEFT + CELL_GAP) // max(NARROWEST_CELL, widest + 6)
        if longest <= most:
            return longest
        even = ceil(longest / ceil(longest / most))
        return min(most, ceil(even / 10) * 10)

    def _rows(self, cells: list[Cell]) -> int:
        return ceil(len(cells) / self.columns)

    def draw_blocks(self, y: int) -> None:
        """The legend, and a strip of cells for each list."""
        plan = self.prediction.plan
        self.heading(y, "Blocks", plan.describe() if plan.units else "the plan has no units")
        states = [(cell.state, name != OUTSIDE) for name, cells in self.blocks.items() for cell in cells]
        x = LEFT
        for state, colours in STATES.items():
            if {(state, True), (state, False)} & {*states} or state in ("resident", "streamed"):
                text = f"{state}: {states.count((state, True))}"
                self.swatch(x, y + 44, *colours)
                self.text(x + 48, y + 44, text, TEXT)
                x += 48 + ceil(text_width(text, TEXT)) + 44
        y += 88
        for name, cells in self.lists.items():
            shared = f", {self.blocks_a_cell} in each cell" if self.blocks_a_cell > 1 else ""
            blocks = "" if name == OUTSIDE else f": {len(self.blocks[name])}{shared}"
            room = RIGHT - LEFT - ceil(text_width(blocks, TEXT))
            self.text(LEFT, y, shorten(name, TEXT, room) + blocks, TEXT)
            y += LIST_HEIGHT
            pitch = min(WIDEST_CELL, (RIGHT - LEFT + CELL_GAP) / self.columns)
            for index, cell in enumerate(cells):
                row, column = divmod(index, self.columns)
                left, right = (LEFT + round(edge * pitch) for edge in (column, column + 1))
                top = y - 20 + row * ROW_HEIGHT
                self.draw_cell(cell, left, right - CELL_GAP, top)
                if blocks:
                    middle = (left + right - CELL_GAP) // 2
                    self.text(middle, top + CELL_HEIGHT + 15, str(cell.first), NUMBER, anchor="mm")
            y += self._rows(cells) * ROW_HEIGHT

    def draw_cell(self, cell: Cell, left: int, right: int, top: int) -> None:
        """A cell up to column ``right`` (exclusive), divided among its units by their bytes."""
        bottom = top + CELL_HEIGHT - 1
        self.canvas.rectangle((left, top, right - 1, bottom), LANE, GRID)
        total = sum(max(1, nbytes) for nbytes, _ in cell.parts)
        begun = 0
        for nbytes, streamed in cell.parts:
            ended = begun + max(1, nbytes)
            first, end = (left + round((right - left) * edge / total) for edge in (begun, ended))
            if end > first:
                self.canvas.rectangle((first, top, end - 1, bottom), STREAMED if streamed else RESIDENT)
            begun = ended

    def _legend(self) -> list[tuple[str, str | None]]:
        """Words and colour of each use that has bytes; no colour for the excess, which is hatched."""
        entries: list[tuple[str, str | None]] = [
            (f"{use.label}: {format_bytes(use.nbytes)}", USES[use.label]) for use in self.memory.uses if use.nbytes > 0
        ]
        if self.memory.excess:
            label, nbytes = self.memory.excess
            entries.append((f"{label}: {format_bytes(nbytes)}", None))
        return entries

    def draw_memory(self, y: int) -> None:
        """The bar of the card, its limit, and a legend with all sizes."""
        memory = self.memory
        sizes = {"peak": memory.peak, "limit": memory.limit, "card": memory.total}
        self.heading(
            y,
            "VRAM",
            ", ".join(f"{name} {format_bytes(size)}" for name, size in sizes.items() if size or name == "peak"),
        )
        top = y + 66
        bottom = top + BAR_HEIGHT - 1
        begun = 0
        for use in memory.uses:
            first, end = self.memory_x(begun), self.memory_x(begun + use.nbytes)
            begun += use.nbytes
            if end > first:
                self.canvas.rectangle((first, top, end - 1, bottom), USES[use.label])
                if first > LEFT:
                    self.canvas.line((first, top, first, bottom), BACKGROUND)
                self.draw_size(use, first, end, (top + bottom) // 2)
        self.canvas.rectangle((LEFT, top, max(LEFT, self.memory_x(begun) - 1), bottom), outline=FAINT_INK)
        if memory.excess:
            first, end = self.memory_x(memory.peak - memory.excess[1]), self.memory_x(memory.peak)
            if end > first:
                self.hatched((first, bottom + 4, end - 1, bottom + 3 + EXCESS_HEIGHT), STALL, STALL_GROUND)
        if memory.limit:
            self.mark(memory.limit, top, bottom, "limit", top - 22)
        if 0 < memory.total < memory.span:
            self.mark(memory.total, top, bottom, "end of the card", bottom + 32)
        y = bottom + 70
        for index, (text, colour) in enumerate(self._legend()):
            row, column = divmod(index, LEGEND_COLUMNS)
            x, middle = LEFT + column * (RIGHT - LEFT) // LEGEND_COLUMNS, y + row * LEGEND_HEIGHT
            if colour is None:
                self.hatched(swatch_box(x, middle), STALL, STALL_GROUND)
            else:
                self.swatch(x, middle, colour)
            self.text(x + 48, middle, text, TEXT, limit=(RIGHT - LEFT) // LEGEND_COLUMNS - 60)

    def draw_size(self, use: Use, first: int, end: int, y: int) -> None:
        """The size of a use between two columns of the bar, if it fits; beside the marks that cross it."""
        marks = (self.memory_x(self.memory.limit), self.memory_x(self.memory.total))
        edges = sorted({first, end, *(x for x in marks if first < x < end)})
        first, end = max(pairwise(edges), key=lambda piece: piece[1] - piece[0])
        size = format_bytes(use.nbytes)
        if text_width(size, TEXT) + 20 <= end - first:
            ink = BACKGROUND if USES[use.label] in LIGHT_INK_ON else INK
            self.text((first + end) // 2, y, size, TEXT, ink, "mm")

    def memory_x(self, nbytes: int) -> int:
        """The column of a byte of the card."""
        return LEFT + round(nbytes / self.memory.span * (RIGHT - LEFT))

    def mark(self, nbytes: int, top: int, bottom: int, label: str, label_y: int) -> None:
        """A line across the bar with its name."""
        x = self.memory_x(nbytes)
        self.canvas.line((x, top - 8, x, bottom + 8), BACKGROUND, 7)
        self.canvas.line((x, top - 8, x, bottom + 8), INK, 3)
        half = ceil(text_width(label, TEXT) / 2)
        self.text(min(max(x, LEFT + half), RIGHT - half), label_y, label, TEXT, anchor="mm")

    def draw_times(self, y: int) -> None:
        """A bar for each time, with its number behind it."""
        self.heading(
            y, "Time of a forward", "the floor is the longer of compute and copies alone; no schedule beats it"
        )
        found = times(self.prediction)
        colours = {"predicted": INK, "compute alone": COMPUTE_SHADES[0], "copies alone": STREAMED}
        longest = max((seconds for seconds in found.values() if seconds), default=1.0)
        y += 48
        for name, seconds in found.items():
            self.text(LEFT, y, name, TEXT)
            end = TIME_LEFT + round((seconds or 0.0) / longest * (TIME_RIGHT - TIME_LEFT))
            if end > TIME_LEFT:
                box = (TIME_LEFT, y - TIME_BAR // 2, end - 1, y + TIME_BAR // 2 - 1)
                if name in colours:
                    self.canvas.rectangle(box, colours[name])
                else:
                    self.hatched(box, INK, GRID)
            self.text(end + 14, y, self._time_words(name, seconds, found["floor"]), TEXT, limit=RIGHT - end - 14)
            y += TIME_HEIGHT

    def _time_words(self, name: str, seconds: float | None, floor: float | None) -> str:
        streamed = self.prediction.plan.streamed_bytes
        if seconds is None:
            return "not known"
        if name == "predicted" and floor:
            return f"{format_time(seconds)}, {seconds / floor:.2f} times the floor"
        if name == "copies alone":
            rate = format_rate(self.prediction.link, "B/s") if streamed else ""
            return f"{format_time(seconds)}, {format_bytes(streamed)} at {rate}" if streamed else "nothing is copied"
        return format_time(seconds)
