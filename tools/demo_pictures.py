"""Cut the picture of ``asyncdiff demo`` into two, one device's and all devices', for the top of the README.

asyncdiff demo --json docs/data/demo.json && python tools/demo_pictures.py

An argument names another picture than out/demo.png.
"""

import json
import shutil
import sys
from pathlib import Path

from PIL import Image

DOCS = Path(__file__).resolve().parents[1] / "docs"
ROWS = {"demo-one": 0, "demo-all": 1}  # of the sheet; the third one shows the difference
HEAD, GAP, ACROSS = 24, 8, 4  # pixels above the first row and behind every tile; tiles beside each other


def tiles(sheet: Image.Image, row: int, columns: int) -> list[Image.Image]:
    """Those of one row of the sheet, without its label."""
    size = (sheet.height - HEAD) // 3 - GAP
    left, top = sheet.width - columns * (size + GAP), HEAD + row * (size + GAP)
    corners = ((left + column * (size + GAP), top) for column in range(columns))
    return [sheet.crop((x, y, x + size, y + size)) for x, y in corners]


def grid(pictures: list[Image.Image]) -> Image.Image:
    """The pictures in lines of ``ACROSS``, on white."""
    step = pictures[0].width + GAP
    found = Image.new("RGB", (ACROSS * step - GAP, -(-len(pictures) // ACROSS) * step - GAP), "white")
    for index, picture in enumerate(pictures):
        found.paste(picture, (index % ACROSS * step, index // ACROSS * step))
    return found


def main() -> None:
    """Write docs/images/demo.png, demo-one.png and demo-all.png."""
    given = Path(sys.argv[1] if len(sys.argv) > 1 else "out/demo.png")
    kept = DOCS / "images" / "demo.png"
    if given.resolve() != kept:
        shutil.copyfile(given, kept)
    prompts = json.loads((DOCS / "data" / "demo.json").read_text(encoding="utf-8"))["prompts"]
    with Image.open(kept) as sheet:
        for name, row in ROWS.items():
            grid(tiles(sheet.convert("RGB"), row, len(prompts))).save(DOCS / "images" / f"{name}.png", optimize=True)


if __name__ == "__main__":
    main()
