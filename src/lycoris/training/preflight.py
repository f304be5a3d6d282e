"""The inputs of a run, checked before the base is loaded and before anything is written."""

from __future__ import annotations

import importlib.util
import logging
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from lycoris.errors import ConfigError
from lycoris.ops.torch_private import has_bfloat16_on_cpu
from lycoris.targeting.recipe import Recipe
from lycoris.training import base_model, checkpoint, data
from lycoris.training.settings import Settings, load_recipe

logger = logging.getLogger("LyCORIS")


@dataclass(frozen=True)
class Checked:
    """What a run works on."""

    settings: Settings
    recipe: Recipe
    training: list[data.Example]
    held_out: list[data.Example]
    skipped: list[str]
    unused: str | None
    """One line on files in the image folder that are no part of the run; None when there are none."""
    resume: Path | None


def fast_in_bfloat16() -> bool:
    """Whether training in bfloat16 is no slower than in float32: on a GPU, or on a CPU for which oneDNN has it."""
    if torch.cuda.is_available() or torch.backends.mps.is_available():
        return True
    # Torch asks itself this before every convolution, and tells it nowhere in public.
    return has_bfloat16_on_cpu()


def check(settings: Settings, *, overwrite: bool = False) -> Checked:
    """Everything that can be checked without loading the base; raises ConfigError, PlanError or FileError.

    What this machine can tell comes before what a hub is asked for.
    """
    recipe = load_recipe(settings.lycoris_config)
    base_model.check_packages()
    _check_output_dir(settings)
    resume = checkpoint.to_resume(settings.output_dir, settings.resume_from_checkpoint, overwrite=overwrite)
    if settings.report_to == "tensorboard" and importlib.util.find_spec("tensorboard") is None:
        raise ConfigError('report_to = "tensorboard" needs tensorboard; pip install "lycoris-lora[train]" or "none"')
    if settings.mixed_precision == "fp16" and not torch.cuda.is_available():
        raise ConfigError('mixed_precision = "fp16" needs a GPU; use "bf16" or "no"')
    if settings.mixed_precision == "bf16" and not fast_in_bfloat16():
        logger.warning(
            'mixed_precision = "bf16" is many times slower than "no" here: this CPU has no instructions for it'
        )
    found = data.read(settings.instance_data_dir, skip_unreadable=settings.skip_unreadable_images)
    training, held_out = data.split(
        found.usable,
        count=settings.num_eval_images,
        seed=settings.seed,
        inside=settings.validation_prompts,
        outside=settings.validation_prompts_outside,
    )
    if settings.keep_best and not held_out:
        raise ConfigError("keep_best goes by the held-out loss, and no image is held out; set num_eval_images above 0")
    base_model.check(settings)
    return Checked(settings, recipe, training, held_out, found.problems, found.unused, resume)


def _check_output_dir(settings: Settings) -> None:
    folder = settings.output_dir
    try:
        nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    except OSError as error:
        raise ConfigError(f"output_dir = {str(folder)!r} cannot be used: {error}") from None
    if not nearest.is_dir():
        raise ConfigError(f"output_dir = {str(folder)!r} cannot be a folder: {nearest} is a file")
    if not os.access(nearest, os.W_OK):
        raise ConfigError(f"output_dir = {str(folder)!r} cannot be written: no permission to write in {nearest}")
    copy = folder / checkpoint.CONFIG
    if copy.exists() and copy.samefile(settings.lycoris_config):
        raise ConfigError(
            f"output_dir = {str(folder)!r} holds {checkpoint.CONFIG}, which is read here and would be written: choose "
            "another output_dir"
        )
