"""Draws the icon (400 x 400) and the banner (1260 x 540, 21:9) of the Comfy Registry: python docs/images/draw.py"""

from __future__ import annotations

from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

HERE = Path(__file__).resolve().parent
SCALE = 4  # drawn larger, then reduced, which smooths edges
BACKGROUND, LINE, RESIDENT, STREAMED, WHITE = "#12181f", "#5b6b7b", "#2bb3a3", "#f0a63c", "#f2f5f8"


class Sheet:
    """A drawing in pixels of the finished picture."""

    def __init__(self, width: int, height: int) -> None:
        self.size = (width, height)
        self.image = Image.new("RGB", (width * SCALE, height * SCALE), BACKGROUND)
        self.draw = ImageDraw.Draw(self.image)

    def box(
        self, x: float, y: float, width: float, height: float, radius: float, fill: str, *, border: float = 0.0
    ) -> None:
        """A rectangle with round corners and, with `border`, a white line of that width around it."""
        corners = [value * SCALE for value in (x, y, x + width, y + height)]
        line = {"outline": WHITE, "width": int(border * SCALE)} if border else {}
        self.draw.rounded_rectangle(corners, radius * SCALE, fill, **line)

    def text(self, x: float, y: float, words: str, size: float, fill: str) -> None:
        self.draw.text((x * SCALE, y * SCALE), words, fill, ImageFont.load_default(size * SCALE))

    def save(self, name: str) -> None:
        self.image.resize(self.size, Image.Resampling.LANCZOS).save(HERE / name, optimize=True)


def faded(color: str, share: float) -> str:
    """`color` over the background, 1 opaque, 0 invisible."""
    over, under = (tuple(int(c[i : i + 2], 16) for i in (1, 3, 5)) for c in (color, BACKGROUND))
    return "#" + "".join(f"{round(share * a + (1 - share) * b):02x}" for a, b in zip(over, under, strict=True))


def chip(sheet: Sheet, x: float, y: float, size: float) -> None:
    """A chip with nine blocks in it: two rows that stay, and one that streams in from the left."""
    unit = size / 16
    for i in range(4):
        along = (3.1 + 3.1 * i) * unit
        for pin_x, pin_y, width, height in (
            (along, -1.3 * unit, 0.9 * unit, 2 * unit),
            (along, size - 0.7 * unit, 0.9 * unit, 2 * unit),
            (size - 0.7 * unit, along, 2 * unit, 0.9 * unit),
        ):
            sheet.box(x + pin_x, y + pin_y, width, height, 0.3 * unit, fill=LINE)
    sheet.box(x, y, size, size, 1.4 * unit, BACKGROUND, border=0.55 * unit)
    gap, block = 1.9 * unit, 3.4 * unit
    for row in range(3):
        for column in range(3):
            color = STREAMED if row == 1 else RESIDENT
            left, top = x + gap + column * (block + 0.9 * unit), y + gap + row * (block + 0.9 * unit)
            sheet.box(left, top, block, block, 0.7 * unit, fill=color)


def stream(sheet: Sheet, x: float, y: float, size: float, count: int, *, faintest: float) -> None:
    """Blocks on their way into the middle row of `chip`, fainter the further away."""
    unit = size / 16
    block, step = 3.4 * unit, 4.3 * unit
    for i in range(count):
        left = x - 1.0 * unit - block - i * step
        share = 1 - (1 - faintest) * (i + 1) / count
        sheet.box(left, y + 6.2 * unit, block, block, 0.7 * unit, fill=faded(STREAMED, share))


def icon() -> None:
    sheet = Sheet(400, 400)
    chip(sheet, 146, 90, 220)
    stream(sheet, 146, 90, 220, 2, faintest=0.3)
    sheet.save("icon.png")


def banner() -> None:
    sheet = Sheet(1260, 540)
    chip(sheet, 880, 130, 280)
    stream(sheet, 880, 130, 280, 10, faintest=0.04)
    sheet.text(78, 60, "Intelligent VRAM", 84, WHITE)
    sheet.text(82, 372, "Models larger than your card,", 36, WHITE)
    sheet.text(82, 422, "inside a VRAM limit that holds.", 36, WHITE)
    sheet.save("banner.png")


if __name__ == "__main__":
    icon()
    banner()
