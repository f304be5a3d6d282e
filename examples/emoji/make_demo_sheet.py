"""Cut the sheet that the demo ships: black-and-white emoji with captions, as a 16-grey PNG and a JSON list.

    python make_demo_sheet.py data ../../src/lycoris/demo/assets/images --count 180

Concepts that the base model was trained on come first, since a style can only be taught on shapes that it can draw.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import sheets

STYLE = "fluent-hc"
GREYS = 16
COLUMNS = 20


def choose(data: Path, known: str, count: int) -> tuple[torch.Tensor, list[sheets.Emoji]]:
    """The shown concepts, then others in random order, only such as the sheet `known` has too."""
    images, emoji = sheets.load(data, STYLE)
    names = {each.name for each in sheets.load(data, known)[1]}
    places = [i for i, each in enumerate(emoji) if each.name in names]
    random.Random(0).shuffle(places)
    places.sort(key=lambda i: emoji[i].name not in sheets.SHOWN)
    return images[places[:count]], [emoji[i] for i in places[:count]]


def to_greys(images: torch.Tensor) -> Image.Image:
    """(N, 3, H, W) as one grid of few greys: a palette image, 4 bits a pixel."""
    levels = (images.float().mean(1) / 255 * (GREYS - 1)).round().byte().numpy()
    rows = -(-len(levels) // COLUMNS)
    grid = np.full((rows * COLUMNS, *levels.shape[1:]), GREYS - 1, np.uint8)
    grid[: len(levels)] = levels
    size = levels.shape[1]
    picture = Image.fromarray(grid.reshape(rows, COLUMNS, size, size).swapaxes(1, 2).reshape(rows * size, -1))
    picture = Image.frombytes("P", picture.size, picture.tobytes())
    picture.putpalette([round(level * 255 / (GREYS - 1)) for level in range(GREYS) for _ in range(3)])
    return picture


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--count", type=int, default=180)
    parser.add_argument("--known", default="fluent-flat", help="sheet whose concepts the base model knows")
    parser.add_argument("--caption", default="{name}, flat black and white")
    args = parser.parse_args()

    images, emoji = choose(args.data, args.known, args.count)
    args.out.mkdir(parents=True, exist_ok=True)
    picture = args.out / f"{STYLE}.png"
    to_greys(images).save(picture, optimize=True, bits=4)
    sheet = {
        "image": picture.name,
        "pixels": sheets.PIXELS,
        "columns": COLUMNS,
        "items": [{"caption": args.caption.format(name=each.name)} for each in emoji],
    }
    picture.with_suffix(".json").write_text(json.dumps(sheet, indent=1, ensure_ascii=False) + "\n")
    print(f"{len(emoji)} images, {picture.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
