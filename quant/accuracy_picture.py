"""The picture of an accuracy report: a map of relative errors for each list of blocks, one row for each kind of layer and
one column for each block, then the layers outside the blocks.

Darker is worse, on a logarithmic scale; layers that suffer are framed as well. The median of a row, and every layer
outside the blocks, is there in words.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, isfinite, log, sqrt

from PIL import ImageColor
from PIL.Image import Image

from ..vram.drawing import FAINT_INK, GRID, INK, LANE, STALL, STALL_GROUND, Sheet, swatch_box, text_width, wrap
from .accuracy import Accuracy, LayerError, median, percent

WIDTH = 1400
LEFT, RIGHT = 40, 1360  # x of the left edge and of the first column beyond the plots
NAMES, WORDS = 400, 1230  # x of the first cell, and of the words behind the last one
TITLE, HEADING, TEXT, NUMBER = 32, 28, 22, 18  # sizes of text
TITLE_Y, CAPTION_Y, SCALE_Y, LISTS_Y = 48, 104, 160, 262  # y of the middle of a line
LINE_HEIGHT, HEADING_HEIGHT, ROW_HEIGHT, CELL_HEIGHT = 34, 50, 34, 28
WIDEST_CELL, CELL_GAP = 60, 2
MOST_COLUMNS = 160  # of more blocks several share a cell, which shows the worst
MOST_ROWS = 40  # of more kinds of layers the best are left out
SCALE_LEFT, SCALE_RIGHT = 400, 900
RAMP = ("#E3EFF8", "#7FC0EA", "#0072B2", "#08233D")  # the least error to the greatest
EQUAL = "#FFFFFF"
LEAST_SPAN = 4.0  # ratio of the ends of the scale, so that errors that hardly differ look so
OUTSIDE = "Outside the blocks"


@dataclass(frozen=True)
class Row:
    """A kind of layer: its cells by column, each with the layers in it, and words about all of them."""

    label: str
    cells: dict[int, tuple[LayerError, ...]]
    words: str


@dataclass(frozen=True)
class Map:
    """The rows of a list of blocks. ``blocks_a_cell``: how many share a column; ``columns`` 0: layers outside the blocks,
    one cell each. ``left_out``: how many rows there would be more."""

    name: str
    rows: tuple[Row, ...]
    columns: int
    blocks_a_cell: int
    left_out: int

    @property
    def height(self) -> int:
        """Pixels from heading to heading."""
        return HEADING_HEIGHT + ROW_HEIGHT * (len(self.rows) + bool(self.columns)) + 30


def draw_accuracy(accuracy: Accuracy, title: str) -> Image:
    """The picture; see Accuracy.picture. Nothing raises, whatever the errors are."""
    return AccuracyPicture(accuracy).draw(title)


def maps_of(layers: Sequence[LayerError]) -> list[Map]:
    """What the picture shows, by list of blocks; kinds in the order in which they came."""
    lists: dict[str | None, list[LayerError]] = {}
    for layer in layers:
        lists.setdefault(layer.list_name, []).append(layer)
    maps = []
    for name, found in sorted(lists.items(), key=lambda item: item[0] is None):
        count = max((layer.block + 1 for layer in found if layer.block is not None), default=0)
        shared = max(1, ceil(count / MOST_COLUMNS))
        kinds: dict[str, list[LayerError]] = {}
        for layer in found:
            kinds.setdefault(layer.kind, []).append(layer)
        if len(kinds) > MOST_ROWS:
            worst = sorted(kinds, key=lambda kind: -max(map(severity, kinds[kind])))[:MOST_ROWS]
            shown = {kind: kinds[kind] for kind in kinds if kind in worst}
        else:
            shown = kinds
        rows = tuple(_row(kind, members, shared) for kind, members in shown.items())
        maps.append(Map(OUTSIDE if name is None else name, rows, ceil(count / shared), shared, len(kinds) - len(shown)))
    return maps


def severity(layer: LayerError) -> float:
    """The relative error, infinite where it is no number."""
    return layer.error.relative if isfinite(layer.error.relative) else float("inf")


def _row(kind: str, layers: Sequence[LayerError], shared: int) -> Row:
    cells: dict[int, tuple[LayerError, ...]] = {}
    for layer in layers:
        column = (layer.block or 0) // shared
        cells[column] = (*cells.get(column, ()), layer)
    relative = median(layers).relative
    return Row(kind, cells, "equal" if relative == 0 else percent(relative))


class AccuracyPicture(Sheet):
    """The canvas of one picture."""

    def __init__(self, accuracy: Accuracy) -> None:
        self.forward = accuracy.forward
        self.maps = maps_of(accuracy.layers)
        self.suffering = {layer.name for layer in accuracy.suffering()}
        errors = [layer.error.relative for layer in accuracy.changed if isfinite(layer.error.relative)]
        low, high = min(errors, default=0.01), max(errors, default=0.01)
        widen = max(1.0, sqrt(LEAST_SPAN * low / high))
        self.low, self.high = low / widen, high * widen
        self.lines = [line for text in accuracy.summary() for line in wrap(text, TEXT, RIGHT - LEFT)]
        if self.forward is not None:
            self.lines.insert(0, f"Output of one forward: {self.forward.describe()}")
        self.shift = LINE_HEIGHT * (len(self.lines) - 1)
        super().__init__(WIDTH, LISTS_Y + self.shift + sum(each.height for each in self.maps) + 10)

    def draw(self, title: str) -> Image:
        """The finished picture."""
        self.text(LEFT, TITLE_Y, title[:500], TITLE, limit=RIGHT - LEFT)
        for number, line in enumerate(self.lines):
            self.text(LEFT, CAPTION_Y + LINE_HEIGHT * number, line, TEXT, limit=RIGHT - LEFT)
        self.draw_scale(SCALE_Y + self.shift)
        y = LISTS_Y + self.shift
        for each in self.maps:
            self.draw_map(each, y)
            y += each.height
        return self.image

    def draw_scale(self, y: int) -> None:
        """What the colours mean."""
        self.text(LEFT, y, "Relative error of a weight", TEXT)
        for x in range(SCALE_LEFT, SCALE_RIGHT):
            colour = shade((x - SCALE_LEFT) / (SCALE_RIGHT - 1 - SCALE_LEFT))
            self.canvas.line((x, y - 12, x, y + 11), colour)
        self.canvas.rectangle((SCALE_LEFT, y - 12, SCALE_RIGHT - 1, y + 11), outline=FAINT_INK)
        for part in (0.0, 0.5, 1.0):
            x = SCALE_LEFT + round(part * (SCALE_RIGHT - SCALE_LEFT))
            value = self.low * (self.high / self.low) ** part
            self.text(x, y + 30, percent(value), NUMBER, FAINT_INK, "mm")
        x = SCALE_RIGHT + 50
        for text, kind in (("equal", "equal"), ("suffers", "suffers"), ("NaN", "nan")):
            if kind == "nan":
                self.hatched(swatch_box(x, y), STALL, STALL_GROUND)
            else:
                self.swatch(x, y, EQUAL if kind == "equal" else RAMP[-2])
            if kind == "suffers":
                self.frame(*swatch_box(x, y))
            self.text(x + 46, y, text, TEXT)
            x += 46 + ceil(text_width(text, TEXT)) + 30

    def draw_map(self, each: Map, y: int) -> None:
        """A heading, a row of cells for each kind of layer, and the numbers of the blocks below."""
        self.text(LEFT, y, each.name, HEADING)
        x = LEFT + ceil(text_width(each.name, HEADING)) + 24
        about = []
        if each.columns:
            about.append("one column for each block, the median of each row behind it")
        if each.blocks_a_cell > 1:
            about.append(f"{each.blocks_a_cell} blocks in each cell, the worst of them counts")
        if each.left_out:
            about.append(f"the worst {len(each.rows)} kinds of layers; {each.left_out} more are not shown")
        self.text(x, y + 1, "; ".join(about), TEXT, FAINT_INK, limit=RIGHT - x)
        pitch = min(WIDEST_CELL, (WORDS - 20 - NAMES) / max(1, each.columns))
        y += HEADING_HEIGHT
        for row in each.rows:
            self.text(LEFT, y, row.label, TEXT, limit=NAMES - LEFT - 16)
            for column in range(max(1, each.columns)):
                left, right = (NAMES + round(edge * pitch) for edge in (column, column + 1))
                gap = CELL_GAP if right - left > 3 * CELL_GAP else 0
                self.draw_cell(
                    row.cells.get(column, ()),
                    (left, y - CELL_HEIGHT // 2, right - 1 - gap, y + CELL_HEIGHT // 2 - 1),
                )
            x = NAMES + ceil(pitch * max(1, each.columns)) + 14
            self.text(x, y, row.words, TEXT, limit=RIGHT - x)
            y += ROW_HEIGHT
        if each.columns:
            widest = text_width(str(each.columns * each.blocks_a_cell), NUMBER) + 10
            every = ceil(widest / pitch)
            for column in range(0, each.columns, every):
                x = NAMES + round((column + 0.5) * pitch) - 1
                self.text(x, y, str(column * each.blocks_a_cell), NUMBER, FAINT_INK, "mm")

    def draw_cell(self, layers: Sequence[LayerError], box: tuple[int, int, int, int]) -> None:
        """The worst of the layers in a cell; a pale ground where there is none."""
        if not layers:
            self.canvas.rectangle(box, LANE)
            return
        worst = max(layers, key=severity)
        relative = worst.error.relative
        if not isfinite(relative):
            self.hatched(box, STALL, STALL_GROUND)
        elif relative == 0:
            self.canvas.rectangle(box, EQUAL, GRID)
        else:
            self.canvas.rectangle(box, shade(log(relative / self.low) / log(self.high / self.low)))
        if self.suffering & {layer.name for layer in layers}:
            self.frame(*box)

    def frame(self, left: int, top: int, right: int, bottom: int) -> None:
        """The mark of a layer that suffers."""
        self.canvas.rectangle((left, top, right, bottom), outline=STALL, width=4)
        self.canvas.rectangle((left, top, right, bottom), outline=INK)


def shade(part: float) -> tuple[int, int, int]:
    """The colour at a part of the scale, 0 to 1."""
    place = max(0.0, min(1.0, part)) * (len(RAMP) - 1)
    index = min(int(place), len(RAMP) - 2)
    first, second = (ImageColor.getrgb(RAMP[number]) for number in (index, index + 1))
    red, green, blue = (round(a + (b - a) * (place - index)) for a, b in zip(first, second, strict=True))
    return red, green, blue
