"""Make the sheet that the demo ships: the flat emoji as a silkscreen of three inks, with captions.

    python make_demo_sheet.py data ../../src/lycoris/demo/assets/images --count 500

Only concepts that the base model was trained on are taken, since a style can only be taught on shapes that it can
draw; those that its progress pictures show come first.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

import sheets
import train_base

SOURCE, STYLE = "fluent-flat", "silkscreen"
COLUMNS, COLORS = 20, 64
ENLARGED = 4
"""Outlines are found in a picture so many times as large, where they come out smooth."""
DARK, MIDDLE, LIGHT, PAPER = (
    torch.tensor(ink).view(1, 3, 1, 1)
    for ink in ((0.1, 0.13, 0.35), (0.05, 0.55, 0.6), (1.0, 0.82, 0.68), (1.0, 1.0, 1.0))
)


def silkscreen(x: torch.Tensor) -> torch.Tensor:
    """Pictures (N, 3, H, W) in [0, 1] on white, in dark blue, teal and peach, by how bright a place is."""
    x = F.interpolate(x, scale_factor=ENLARGED, mode="bicubic", align_corners=False).clamp(0, 1)
    grey = (x * torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)).sum(1, keepdim=True)
    thing = silhouette(x)
    mean = (grey * thing).sum((2, 3), keepdim=True) / thing.sum((2, 3), keepdim=True).clamp(min=1)
    light, dark = ((0.5 + (grey - mean) * 8).clamp(0, 1), (0.5 + (mean - 0.22 - grey) * 8).clamp(0, 1))
    inks = torch.lerp(torch.lerp(MIDDLE, LIGHT, light), DARK, dark)
    return F.avg_pool2d(torch.lerp(PAPER, inks, thing), ENLARGED)


def silhouette(x: torch.Tensor) -> torch.Tensor:
    """1 on the thing, 0 on the white around it: white that is reached from the border of the picture."""
    white = (x.amin(1, keepdim=True) > 0.85).float()
    border = F.pad(torch.zeros_like(white)[..., 1:-1, 1:-1], (1, 1, 1, 1), value=1.0)
    outside = border * white
    while True:
        wider = outside
        for _ in range(16):
            wider = grow(wider) * white
        if torch.equal(wider, outside):
            return 1 - outside
        outside = wider


def grow(mask: torch.Tensor) -> torch.Tensor:
    """The largest value in 3x3 pixels: `max_pool2d`, which is slow on CPU, by shifts."""
    for dim in (-1, -2):
        size, wide = mask.shape[dim] - 1, mask.clone()
        for at, other in ((0, 1), (1, 0)):
            here = wide.narrow(dim, at, size)
            here.copy_(torch.maximum(here, mask.narrow(dim, other, size)))
        mask = wide
    return mask


def choose(data: Path, count: int) -> tuple[torch.Tensor, list[sheets.Emoji]]:
    """The shown concepts, then others in random order."""
    images, emoji = sheets.load(data, SOURCE)
    kept = train_base.kept_out(data)
    places = [i for i, each in enumerate(emoji) if each.name not in kept]
    random.Random(0).shuffle(places)
    places.sort(key=lambda i: emoji[i].name not in sheets.SHOWN)
    return images[places[:count]], [emoji[i] for i in places[:count]]


def to_picture(images: torch.Tensor) -> Image.Image:
    """(N, 3, H, W) in [0, 1] as one grid on white, with a palette."""
    tiles = (images * 255).round().byte().permute(0, 2, 3, 1).numpy()
    rows, size = -(-len(tiles) // COLUMNS), tiles.shape[1]
    grid = np.full((rows * COLUMNS, *tiles.shape[1:]), 255, np.uint8)
    grid[: len(tiles)] = tiles
    grid = grid.reshape(rows, COLUMNS, size, size, 3).swapaxes(1, 2).reshape(rows * size, COLUMNS * size, 3)
    return Image.fromarray(grid).quantize(COLORS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--caption", default="{name}, flat silkscreen")
    args = parser.parse_args()

    images, emoji = choose(args.data, args.count)
    made = torch.cat([silkscreen(part.float() / 255) for part in images.split(50)])
    args.out.mkdir(parents=True, exist_ok=True)
    picture = args.out / f"{STYLE}.png"
    to_picture(made).save(picture, optimize=True)
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
