"""Saving the adapter and the state of a run, so that going on equals never having stopped."""

from __future__ import annotations

import json
import random
import re
import shutil
from pathlib import Path
from typing import Any

import torch

from lycoris import files
from lycoris.adapters.adapter_set import AdapterSet
from lycoris.errors import ConfigError, FileError
from lycoris.targeting.recipe import Recipe
from lycoris.training.jsonfile import write_object
from lycoris.training.settings import LATEST

WEIGHTS = "pytorch_lora_weights.safetensors"
CONFIG = "lycoris_config.json"
STATE = "training_state.pt"
INTERRUPTED = "interrupted"
"""A file of this name says that the checkpoint was saved because training was interrupted."""
KEYS = (
    *("step", "optimizer", "rates", "scaler", "history", "settings", "images", "best"),
    *("adapter", "recipe", "random"),
)
"""What the state of a run is made of: the first row comes from the run, the second is added by `save`."""


def write_adapter(adapters: AdapterSet, recipe: Recipe, folder: Path) -> Path:
    """Write the adapter file, with its recipe in the header and as lycoris_config.json beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / WEIGHTS
    files.write(adapters.bundle(), path, dialect="lycoris", metadata={"lycoris_config": json.dumps(recipe.as_dict())})
    write_object(recipe.as_dict(), folder / CONFIG)
    return path


def save(
    folder: Path, state: dict[str, Any], adapters: AdapterSet, recipe: Recipe, *, interrupted: bool = False
) -> None:
    """Write one checkpoint folder: usable adapter and training state. It appears complete or not at all."""
    temporary = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(temporary, ignore_errors=True)
    write_adapter(adapters, recipe, temporary)
    state = {**state, "adapter": adapters.state_dict(), "recipe": recipe.as_dict(), "random": _random_state()}
    torch.save(state, temporary / STATE)
    if interrupted:
        (temporary / INTERRUPTED).touch()
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)


def load(folder: Path, adapters: AdapterSet, recipe: Recipe) -> dict[str, Any]:
    """Put a checkpoint's tensors into `adapters`, set the random state, and return the rest of the state."""
    state = read(folder)
    if state["recipe"] != recipe.as_dict():
        raise ConfigError(f"{folder} was made with another lycoris_config: {json.dumps(state['recipe'])}")
    try:
        adapters.load_state_dict(state["adapter"])
    except (RuntimeError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{folder} does not fit the adapters of this base; was it made with another? {error}"
        ) from None
    random.setstate(state["random"]["python"])
    torch.set_rng_state(state["random"]["torch"])
    if torch.cuda.is_available() and state["random"]["cuda"]:
        torch.cuda.set_rng_state_all(state["random"]["cuda"])
    return state


def read(folder: Path) -> dict[str, Any]:
    """The state in a checkpoint folder; FileError when it is damaged or something else."""
    try:
        state: dict[str, Any] = torch.load(folder / STATE, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises half a dozen types for a damaged file
        raise FileError(f"{folder / STATE} cannot be read; choose another checkpoint: {error}") from error
    missing = [key for key in KEYS if key not in state] if isinstance(state, dict) else list(KEYS)
    if missing:
        raise FileError(
            f"{folder / STATE} is not the state of a run, or of another version: it lacks {', '.join(missing)}; "
            "choose another checkpoint"
        )
    return state


def existing(output_dir: Path) -> list[Path]:
    """Complete checkpoints in `output_dir`, oldest step first."""
    found = {
        int(match[1]): path
        for path in (output_dir.iterdir() if output_dir.is_dir() else ())
        if (match := re.fullmatch(r"checkpoint-(\d+)", path.name)) and (path / STATE).is_file()
    }
    return [found[step] for step in sorted(found)]


def to_resume(output_dir: Path, wanted: str | None, *, overwrite: bool = False) -> Path | None:
    """The checkpoint folder that `resume_from_checkpoint` means; None starts a new run.

    Raises ConfigError when it does not exist and, unless `overwrite`, when a new run would replace an earlier one or
    mix with its checkpoints.
    """
    found = existing(output_dir)
    if wanted is None:
        if overwrite:
            return None
        if found:
            raise ConfigError(
                f"output_dir {output_dir} holds {found[-1].name} of an earlier run; go on from it with "
                f"resume_from_checkpoint = {LATEST!r} (--resume {LATEST}), replace it with --force, or choose another "
                "output_dir"
            )
        if (output_dir / WEIGHTS).exists():
            raise ConfigError(
                f"output_dir {output_dir} holds {WEIGHTS} of an earlier run; choose another output_dir, or replace it "
                "with --force"
            )
        return None
    if wanted == LATEST:
        if not found:
            raise ConfigError(f"resume_from_checkpoint = {LATEST!r}, but {output_dir} holds no checkpoint-* folder")
        return found[-1]
    for folder in (Path(wanted), output_dir / wanted):
        if (folder / STATE).is_file():
            return folder
    names = ", ".join(path.name for path in found) or "none"
    raise ConfigError(f"resume_from_checkpoint = {wanted!r} is no checkpoint folder; in {output_dir}: {names}")


def prune(output_dir: Path, limit: int | None) -> None:
    """Remove the oldest checkpoints beyond `limit`."""
    if limit is not None:
        for path in existing(output_dir)[:-limit]:
            shutil.rmtree(path)


def remove_all(output_dir: Path) -> None:
    """Remove every checkpoint."""
    for path in existing(output_dir):
        shutil.rmtree(path)


def remove_interrupted(output_dir: Path) -> None:
    """Remove the checkpoints that are there only because training was interrupted."""
    for path in existing(output_dir):
        if (path / INTERRUPTED).is_file():
            shutil.rmtree(path)


def _random_state() -> dict[str, Any]:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"python": random.getstate(), "torch": torch.get_rng_state(), "cuda": cuda}
