"""Draw the registry's icon and banner: segments that compute one after the other, and then side by side.

python tools/icon.py
"""

from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

IMAGES = Path(__file__).resolve().parents[1] / "docs" / "images"
BACKGROUND, WAITING, PALE, WHITE = "#12212b", "#1f3541", "#9aa5b1", "#f4f7f8"
LANES = ("#2f9e8f", "#53b9a0", "#8fd3a8")
FINE = 4  # drawn this much larger, so that edges come out smooth


def blank(width: int, height: int) -> Image.Image:
    """A transparent picture, ``FINE`` times larger."""
    return Image.new("RGBA", (width * FINE, height * FINE), (0, 0, 0, 0))


def bar(picture: Image.Image, x: int, y: int, width: int, height: int, colour: str, radius: int) -> None:
    """A bar with round corners."""
    box = [FINE * x, FINE * y, FINE * (x + width), FINE * (y + height)]
    ImageDraw.Draw(picture).rounded_rectangle(box, FINE * radius, fill=colour)


def save(picture: Image.Image, name: str) -> None:
    """Write the picture in its true size."""
    small = picture.resize((picture.width // FINE, picture.height // FINE), Image.Resampling.LANCZOS)
    small.save(IMAGES / name, optimize=True)


def icon() -> None:
    """400 x 400: one warm-up step, then all lanes."""
    picture = blank(400, 400)
    bar(picture, 0, 0, 400, 400, BACKGROUND, 80)
    for lane, colour in enumerate(LANES):
        y = 74 + 92 * lane
        bar(picture, 48 + 50 * lane, y, 44, 68, PALE, 14)
        bar(picture, 204, y, 148, 68, colour, 14)
    save(picture, "icon.png")


def banner() -> None:
    """1470 x 630 (21:9): the name, and lanes of three devices over time."""
    picture = blank(1470, 630)
    bar(picture, 0, 0, 1470, 630, BACKGROUND, 0)
    left, unit, gap = 91, 59, 10
    for text, size, y, colour in (
        ("AsyncDiff", 112, 66, WHITE),
        ("All of your GPUs denoise one image together", 46, 206, PALE),
    ):
        ImageDraw.Draw(picture).text((FINE * left, FINE * y), text, fill=colour, font=ImageFont.load_default(FINE * size))
    for lane, colour in enumerate(LANES):
        y = 330 + 80 * lane
        for step in range(2):  # warm-up: one device at a time
            for turn in range(3):
                x = left + (3 * step + turn) * unit
                bar(picture, x, y, unit - gap, 62, PALE if turn == lane else WAITING, 12)
        for step in range(16):
            bar(picture, left + (6 + step) * unit, y, unit - gap, 62, colour, 12)
    save(picture, "banner.png")


if __name__ == "__main__":
    icon()
    banner()
