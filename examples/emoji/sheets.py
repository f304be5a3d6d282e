"""Read the emoji sheets that `prepare.py` draws: one PNG grid and one JSON list of captions per style."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

PIXELS = 64
GROUPS = ("Smileys", "Animals", "Food", "Activities")
"""What a caption pins down and 64 pixels can show. People come in hundreds of near-identical variants, symbols are
mostly letters, and objects and places would double the training time."""

SHOWN = (
    "grinning face", "smiling face with heart-eyes", "loudly crying face", "red heart", "rocket", "cat face",
    "dog face", "red apple", "pizza", "sunflower", "soccer ball", "guitar", "automobile", "house", "crescent moon",
    "star", "fire", "mushroom", "butterfly", "thumbs up", "crown", "birthday cake", "umbrella", "octopus",
)  # fmt: skip
"""Concepts that the progress pictures show."""


@dataclass(frozen=True)
class Emoji:
    name: str
    style: str
    keywords: tuple[str, ...]

    def caption(self, rng: random.Random | None = None) -> str:
        """`name, style`; with `rng`, sometimes with keywords added or in place of the name, as people write prompts."""
        words = [self.name]
        spare = [word.replace("_", " ") for word in self.keywords if word.replace("_", " ") != self.name]
        if rng is not None and spare:
            draw = rng.random()
            if draw < 0.15:
                words += rng.sample(spare, min(2, len(spare)))
            elif draw < 0.20 and len(spare) > 1:
                words = rng.sample(spare, 2)
        return ", ".join([*words, self.style])


def load(folder: Path, style: str, *, groups: tuple[str, ...] = GROUPS) -> tuple[torch.Tensor, list[Emoji]]:
    """Images (N, 3, 64, 64) uint8 and their emoji. `groups` empty: every image of the sheet."""
    sheet = json.loads((folder / f"{style}.json").read_text())
    columns, rows = sheet["columns"], sheet["items"]
    grid = np.asarray(Image.open(folder / f"{style}_{PIXELS}.png").convert("RGB"))
    tiles = grid.reshape(-1, PIXELS, columns, PIXELS, 3).swapaxes(1, 2).reshape(-1, PIXELS, PIXELS, 3)
    keep = [i for i, row in enumerate(rows) if not groups or _usable(row, groups)]
    emoji = [Emoji(rows[i]["name"], style.split("-")[-1], tuple(rows[i]["keywords"])) for i in keep]
    return torch.from_numpy(tiles[keep].copy()).permute(0, 3, 1, 2).contiguous(), emoji


def _usable(row: dict[str, str], groups: tuple[str, ...]) -> bool:
    gendered = "\u2640" in row["char"] or "\u2642" in row["char"]
    return row["name"] in SHOWN or (row["group"].startswith(groups) and not gendered)


def to_unit(images: torch.Tensor) -> torch.Tensor:
    """uint8 to float in [-1, 1], the range of the VAE."""
    return images.float() / 127.5 - 1


def save_grid(images: torch.Tensor, columns: int, path: Path) -> None:
    """Images (N, 3, H, W) in [-1, 1] as one PNG, row by row."""
    pixels = ((images.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    count, height, width, _ = pixels.shape
    pad, rows = 2, -(-count // columns)
    grid = np.full((rows * (height + pad) + pad, columns * (width + pad) + pad, 3), 200, np.uint8)
    for i, tile in enumerate(pixels):
        y, x = (pad + at * (size + pad) for at, size in zip(divmod(i, columns), (height, width), strict=True))
        grid[y : y + height, x : x + width] = tile
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(grid).save(path)
