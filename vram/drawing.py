"""What the pack's pictures share: colours, and a sheet to write and hatch on.

Only Pillow is needed. The colours follow the palette of Okabe and Ito (https://jfly.uni-koeln.de/color/), which
people with any kind of colour vision can tell apart.
"""

from __future__ import annotations

from functools import cache
from itertools import pairwise

from PIL import Image, ImageDraw, ImageFont

BACKGROUND, LANE, INK, FAINT_INK, GRID = "#FFFFFF", "#F4F5F7", "#1F2933", "#5F6B7A", "#DDE1E6"
COPY_SHADES = ("#0072B2", "#56B4E9")
COMPUTE_SHADES = ("#00795A", "#3DB892")
STALL, STALL_GROUND = "#D55E00", "#FDEBDD"
MEMORY, MEMORY_GROUND = "#6B4E9B", "#E6DFF2"


@cache
def font(size: int) -> ImageFont.FreeTypeFont:
    """Pillow's own font in a size of pixels."""
    return ImageFont.load_default(size=size)


def text_width(text: str, size: int) -> float:
    """Pixels that one line of text takes from left to right."""
    return font(size).getlength(text)


def milliseconds(seconds: float) -> str:
    """Three digits, or more where the number is larger: 0.0213 -> '21.3 ms', 3.0931 -> '3093 ms'."""
    return f"{seconds * 1e3:.3g} ms" if seconds < 0.9995 else f"{seconds * 1e3:.0f} ms"


def format_time(seconds: float) -> str:
    """Three digits, or more where the number is larger: ``21.3 ms``, ``3.09 s``, ``1234 s``."""
    if seconds < 0.9995:
        return milliseconds(seconds)
    return f"{seconds:.3g} s" if seconds < 999.5 else f"{seconds:.0f} s"


def shorten(text: str, size: int, room: int) -> str:
    """``text`` in one line, its end replaced by dots where it is wider than ``room`` pixels."""
    text = " ".join(text.split())
    if text_width(text, size) > room:
        while text and text_width(text + "...", size) > room:
            text = text[:-1]
        text += "..."
    return text


def wrap(text: str, size: int, room: int) -> list[str]:
    """``text`` in lines of whole words that take up to ``room`` pixels; a longer word is a line of its own."""
    lines: list[str] = []
    for word in text.split():
        if lines and text_width(f"{lines[-1]} {word}", size) <= room:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines


def swatch_box(x: int, y: int) -> tuple[int, int, int, int]:
    """Where a legend shows a colour: left, top, right, bottom, from x on and around y."""
    return x, y - 10, x + 35, y + 9


class Sheet:
    """A picture of ``width`` x ``height`` pixels in the making."""

    def __init__(self, width: int, height: int) -> None:
        self.image = Image.new("RGB", (width, height), BACKGROUND)
        self.canvas = ImageDraw.Draw(self.image)

    def text(
        self, x: int, y: int, text: str, size: int, fill: str = INK, anchor: str = "lm", limit: int | None = None
    ) -> None:
        """One line of text whose vertical middle is y, shortened with dots where it is wider than limit pixels."""
        if limit is not None:
            text = shorten(text, size, limit)
        self.canvas.text((x, y), text, fill, font(size), anchor)

    def hatched(self, box: tuple[int, int, int, int], colour: str, ground: str) -> None:
        """A rectangle of smooth diagonal lines on ``ground``: left, top, right, bottom, all inside it."""
        left, top, right, bottom = box
        scale, gap, line = 4, 9, 3
        width, height = right - left + 1, bottom - top + 1
        mask = Image.new("L", (width * scale, height * scale))
        pen = ImageDraw.Draw(mask)
        for x in range(-height * scale, width * scale, gap * scale):
            pen.line((x, height * scale, x + height * scale, 0), 255, line * scale)
        self.canvas.rectangle(box, ground)
        self.image.paste(colour, (left, top), mask.resize((width, height), Image.Resampling.BOX))

    def swatch(self, x: int, y: int, *colours: str) -> None:
        """A colour of a legend, or several side by side, outlined."""
        left, top, right, bottom = swatch_box(x, y)
        edges = [left + (right + 1 - left) * index // len(colours) for index in range(len(colours) + 1)]
        for colour, (first, end) in zip(colours, pairwise(edges), strict=True):
            self.canvas.rectangle((first, top, end - 1, bottom), colour)
        self.canvas.rectangle((left, top, right, bottom), outline=FAINT_INK)
