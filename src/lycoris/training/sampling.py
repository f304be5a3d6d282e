"""Pictures from an unmodified pipeline with fixed seeds, and labeled grids of them."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

if TYPE_CHECKING:
    from PIL import Image

Pixels = npt.NDArray[np.float32]
"""(N, H, W, 3) in [0, 1]."""

CELL = 128
FONT = 12
PAD = 6
LABEL = 150


@dataclass(frozen=True)
class Sampling:
    """How pictures are drawn.

    Picture i starts from seed + i, whatever else is in its batch, so the batch size does not change the start noise.
    """

    size: int
    steps: int
    guidance: float
    seed: int
    negative_prompt: str = ""
    batch_size: int = 16


@dataclass(frozen=True)
class PictureTable:
    """One titled table of pictures: a label and N pictures per row, a caption per column."""

    title: str
    captions: Sequence[str]
    rows: Sequence[tuple[str, Pixels]]


@torch.no_grad()
def draw_pictures(pipe: Any, prompts: Sequence[str], how: Sampling) -> Pixels:
    """Draw one picture per prompt with any text-to-image pipeline of diffusers.

    Returns (N, H, W, 3) in [0, 1].
    """
    parts = []
    for start in range(0, len(prompts), how.batch_size):
        part = list(prompts[start : start + how.batch_size])
        seeds = range(how.seed + start, how.seed + start + len(part))
        made = pipe(
            part,
            negative_prompt=[how.negative_prompt] * len(part),
            height=how.size,
            width=how.size,
            num_inference_steps=how.steps,
            guidance_scale=how.guidance,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            output_type="np",
        )
        parts.append(made.images)
    return np.concatenate(parts)


def draw_grid(blocks: Sequence[PictureTable]) -> Image.Image:
    """Return one image with all tables below each other, row labels on the left, prompts on top.

    Each picture is at least `CELL` pixels wide; smaller ones are enlarged without interpolation.
    """
    from PIL import Image

    drawn = [_draw_table(block) for block in blocks]
    sheet = Image.new("RGB", (max(each.width for each in drawn), sum(each.height for each in drawn)), "white")
    top = 0
    for each in drawn:
        sheet.paste(each, (0, top))
        top += each.height
    return sheet


def _draw_table(block: PictureTable) -> Image.Image:
    from PIL import Image, ImageDraw, ImageFont

    side = max(CELL, block.rows[0][1].shape[1])
    captions = [textwrap.fill(caption, side // 7) for caption in block.captions]
    head = PAD + 2 * FONT + (FONT + 4) * max(caption.count("\n") + 1 for caption in captions)
    size = (LABEL + len(captions) * (side + PAD) + PAD, head + len(block.rows) * (side + PAD) + 2 * PAD)
    sheet = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(sheet)
    font, bold = ImageFont.load_default(FONT), ImageFont.load_default(FONT + 4)
    pen.text((PAD, PAD), block.title, "black", bold)
    left = [LABEL + column * (side + PAD) for column in range(len(captions))]
    for x, caption in zip(left, captions, strict=True):
        pen.multiline_text((x, PAD + 2 * FONT), caption, "black", font)
    for row, (label, pictures) in enumerate(block.rows):
        y = head + PAD + row * (side + PAD)
        pen.multiline_text((PAD, y + side // 3), textwrap.fill(label, LABEL // 8), "black", font)
        for x, picture in zip(left, pictures, strict=True):
            tile = Image.fromarray((picture.clip(0, 1) * 255).round().astype(np.uint8))
            sheet.paste(tile.resize((side, side), Image.Resampling.NEAREST), (x, y))
    return sheet
