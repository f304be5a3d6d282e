"""Images and captions: read from a folder or a sheet, checked, and split into training and held-out."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from lycoris.errors import ConfigError
from lycoris.json_io import read_json, read_text

if TYPE_CHECKING:
    from PIL.Image import Image

IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".webp")
MAX_SHOWN_PROBLEMS = 10
"""Number of bad files that an error lists; the others are only counted."""


@dataclass(frozen=True)
class Example:
    """One image and its caption.

    `name` identifies it in messages and fingerprints; `open()` decodes the image each time it is called.
    """

    name: str
    caption: str
    open: Callable[[], Image]


@dataclass(frozen=True)
class Examples:
    """The usable examples, and one line about each that is not."""

    usable: list[Example]
    problems: list[str] = field(default_factory=list)
    unused: str | None = None
    """One line about files that are neither an image nor its caption; None when there are none."""


def read_examples(source: Path, *, skip_unreadable: bool = False) -> Examples:
    """Find and check all examples of a folder or a sheet.

    A folder has images with a caption in a text file of the same name; a sheet is a JSON file that cuts one image into
    tiles. Every image is decoded once, so that a damaged one is found now and not in the middle of a run.

    Raises `ConfigError`, which names and counts the problems, when there is no usable example or, unless
    `skip_unreadable`, when any image or caption cannot be used.
    """
    if source.is_dir():
        found = _read_folder(source)
    elif source.suffix == ".json" and source.is_file():
        found = _read_sheet(source)
    else:
        raise ConfigError(f"instance_data_dir = {str(source)!r} is neither a folder of images nor a sheet (.json)")
    broken = {example.name: why for example in found.usable if (why := _explain_unreadable(example))}
    usable = [example for example in found.usable if example.name not in broken]
    problems = [*found.problems, *(f"{name}: not a readable image ({why})" for name, why in broken.items())]
    if problems and not (skip_unreadable and usable):
        raise ConfigError(_describe_problems(source, usable, problems))
    if not usable:
        others = f"; {found.unused}" if found.unused else ""
        raise ConfigError(f"{source} holds no images; expected files ending in {', '.join(IMAGE_SUFFIXES)}{others}")
    return Examples(usable, problems, found.unused)


def split_examples(
    examples: Sequence[Example], *, count: int, seed: int, inside: Iterable[str] = (), outside: Iterable[str] = ()
) -> tuple[list[Example], list[Example]]:
    """Split examples into (training, held out), both in the given order.

    Args:
        count: Number of images drawn at random for the held-out part, in addition to those of `outside`.
        seed: Decides which ones are drawn.
        inside: Captions that are never held out.
        outside: Captions that are always held out.

    Raises `ConfigError` when fewer than `count` images may be held out, or when none is left to train on.
    """
    inside, outside = set(inside), set(outside)
    free = [i for i, example in enumerate(examples) if example.caption not in inside | outside]
    if count > len(free):
        raise ConfigError(f"num_eval_images = {count}, but only {len(free)} images may be held out")
    drawn = set(random.Random(seed).sample(free, count))
    held = [i in drawn or example.caption in outside for i, example in enumerate(examples)]
    training = [example for example, out in zip(examples, held, strict=True) if not out]
    if not training:
        raise ConfigError(f"all {len(examples)} images are held out; lower num_eval_images or add images")
    return training, [example for example, out in zip(examples, held, strict=True) if out]


def load_pixels(example: Example, resolution: int) -> torch.Tensor:
    """Return the image as (3, resolution, resolution) in [-1, 1], the range of the VAE.

    The EXIF orientation is applied, transparent parts are put on white, and the largest central square is resized with
    Lanczos.
    """
    from PIL import Image, ImageOps

    image = ImageOps.exif_transpose(example.open()).convert("RGBA")
    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    image = ImageOps.fit(image, (resolution, resolution), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1


def _read_folder(folder: Path) -> Examples:
    examples, problems = [], []
    images = sorted(each for each in folder.iterdir() if _is_image(each))
    for path in images:
        caption = path.with_suffix(".txt")
        try:
            text = read_text(caption).strip() if caption.exists() else None
        except ConfigError as error:
            problems.append(f"{path.name}: {error}")
        else:
            if text is None:
                problems.append(f"{path.name}: no caption, expected {caption.name}")
            elif text:
                examples.append(Example(path.name, text, partial(_open_image, path)))
            else:
                problems.append(f"{path.name}: its caption {caption.name} is empty")
    return Examples(examples, problems, _describe_unused(folder, images))


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in IMAGE_SUFFIXES and path.is_file() and not path.name.startswith(".")


def _describe_unused(folder: Path, images: Sequence[Path]) -> str | None:
    used = {*images, *(path.with_suffix(".txt") for path in images)}
    other = [path for path in folder.iterdir() if path.is_file() and path not in used]
    below = [path for path in folder.glob("*/**/*") if _is_image(path)]
    names = sorted(str(path.relative_to(folder)) for path in (*other, *below) if not path.name.startswith("."))
    if not names:
        return None
    count = f"{len(names)} file{'s' if len(names) > 1 else ''} in {folder} not used"
    return f"{count} (neither an image nor its caption, or in a subfolder): {_shorten_names(names)}"


def _shorten_names(names: Sequence[str], limit: int = 3) -> str:
    return ", ".join(names[:limit]) + (", ..." if len(names) > limit else "")


def _read_sheet(path: Path) -> Examples:
    """Read tiles of one image: `{"image": "x.png", "pixels": 64, "columns": 20, "items": [{"caption": "a"}]}`."""
    sheet = read_json(path)
    try:
        name, size, columns = str(sheet["image"]), int(sheet["pixels"]), int(sheet["columns"])
        captions = [str(item["caption"]) for item in sheet["items"]]
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{path} is not a sheet; expected image, pixels, columns, items[].caption: {error}") from None
    if Path(name).name != name:
        raise ConfigError(f"{path}: image = {name!r} must be the name of a file in the folder of the sheet")
    try:
        grid = _open_image(path.parent / name)
    except Exception as error:  # as in _explain_unreadable
        raise ConfigError(f"{path}: {name} is not a readable image ({error})") from None
    if size < 1 or columns < 1 or grid.width < columns * size or grid.height < -(-len(captions) // columns) * size:
        raise ConfigError(
            f"{path}: {len(captions)} tiles of {size} pixels in {columns} columns need a larger image than "
            f"{grid.width}x{grid.height}"
        )

    def tile(index: int) -> Image:
        row, column = divmod(index, columns)
        return grid.crop((column * size, row * size, (column + 1) * size, (row + 1) * size))

    tiles = [Example(f"{name}[{i}]", text.strip(), partial(tile, i)) for i, text in enumerate(captions)]
    problems = [f"{each.name}: its caption is empty" for each in tiles if not each.caption]
    return Examples([each for each in tiles if each.caption], problems)


def _explain_unreadable(example: Example) -> str | None:
    try:
        example.open()
    except Exception as error:  # PIL's decoders raise any type, and their own for an image that is too large
        return str(error) or type(error).__name__
    return None


def _open_image(path: Path) -> Image:
    from PIL import Image

    with Image.open(path) as image:
        image.load()
        return _convert_to_eight_bits(image)


def _convert_to_eight_bits(image: Image) -> Image:
    """Scale 16-bit gray levels to 8 bits, which PIL would clip. Raises `ValueError` when their range is unknown."""
    from PIL import Image

    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):  # "I": older Pillow
        scaled = Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8))
        scaled.info = {key: value for key, value in image.info.items() if key == "exif"}
        return scaled
    if image.mode in ("I", "F"):
        raise ValueError(f"mode {image.mode}, 32 bits a pixel, has no known white; save it with 8 or 16 bits")
    return image


def _describe_problems(source: Path, usable: list[Example], problems: list[str]) -> str:
    shown = "".join(f"\n  {line}" for line in problems[:MAX_SHOWN_PROBLEMS])
    more = f"\n  and {len(problems) - MAX_SHOWN_PROBLEMS} more" if len(problems) > MAX_SHOWN_PROBLEMS else ""
    cure = "fix them, or set skip_unreadable_images to true to train on the rest" if usable else "none is left"
    return f"{source}: {len(problems)} of {len(usable) + len(problems)} images cannot be used; {cure}:{shown}{more}"
