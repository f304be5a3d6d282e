"""The inputs of a run, checked before the base model is loaded and before anything is written."""

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
class CheckedInputs:
    """The checked inputs of a run.

    `skipped` has one line per image that cannot be used, and `resume` is the checkpoint to restore, or None for a new
    run.
    """

    settings: Settings
    recipe: Recipe
    training: list[data.Example]
    held_out: list[data.Example]
    skipped: list[str]
    unused: str | None
    """One line about files in the image folder that are not used; None when there are none."""
    resume: Path | None


def is_bfloat16_fast() -> bool:
    """Return whether training in bfloat16 is no slower than in float32.

    True on a GPU, and on a CPU for which oneDNN has bfloat16 kernels.
    """
    if torch.cuda.is_available() or torch.backends.mps.is_available():
        return True
    # Torch asks itself this before every convolution, and tells it nowhere in public.
    return has_bfloat16_on_cpu()


def check_inputs(settings: Settings, *, overwrite: bool = False) -> CheckedInputs:
    """Check everything that can be checked without loading the base model.

    Local checks run before the hub is asked for anything. `overwrite` allows a run to replace the one in `output_dir`.
    Logs a warning for bfloat16 on a CPU without instructions for it.

    Raises `ConfigError`, `PlanError` or `FileError`.
    """
    recipe = load_recipe(settings.lycoris_config)
    base_model.check_packages()
    _check_output_dir(settings)
    resume = checkpoint.find_checkpoint_to_resume(
        settings.output_dir, settings.resume_from_checkpoint, overwrite=overwrite
    )
    if settings.report_to == "tensorboard" and importlib.util.find_spec("tensorboard") is None:
        raise ConfigError('report_to = "tensorboard" needs tensorboard; pip install "lycoris-lora[train]" or "none"')
    if settings.mixed_precision == "fp16" and not torch.cuda.is_available():
        raise ConfigError('mixed_precision = "fp16" needs a GPU; use "bf16" or "no"')
    if settings.mixed_precision == "bf16" and not is_bfloat16_fast():
        logger.warning(
            'mixed_precision = "bf16" is many times slower than "no" on this CPU, which has no bfloat16 instructions'
        )
    found = data.read_examples(settings.instance_data_dir, skip_unreadable=settings.skip_unreadable_images)
    training, held_out = data.split_examples(
        found.usable,
        count=settings.num_eval_images,
        seed=settings.seed,
        inside=settings.validation_prompts,
        outside=settings.validation_prompts_outside,
    )
    if settings.keep_best and not held_out:
        raise ConfigError("keep_best needs a held-out loss, but no image is held out; set num_eval_images above 0")
    base_model.check_base_model(settings)
    return CheckedInputs(settings, recipe, training, held_out, found.problems, found.unused, resume)


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
    copy = folder / checkpoint.CONFIG_FILE
    if copy.exists() and copy.samefile(settings.lycoris_config):
        raise ConfigError(
            f"output_dir = {str(folder)!r} contains the lycoris_config of this run, which would be overwritten; choose "
            "another output_dir"
        )
