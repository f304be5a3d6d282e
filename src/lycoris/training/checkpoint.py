"""Checkpoints: the adapter and the complete state of a run, so that a resumed run equals one without interruption."""

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

WEIGHTS_FILE = "pytorch_lora_weights.safetensors"
CONFIG_FILE = "lycoris_config.json"
STATE_FILE = "training_state.pt"
INTERRUPTED_FILE = "interrupted"
"""Name of the file that marks a checkpoint as saved only because training was interrupted."""
STATE_KEYS = (
    *("step", "optimizer", "rates", "scaler", "history", "settings", "images", "best"),
    *("adapter", "recipe", "random"),
)
"""Keys of a saved state: the first row comes from the run, the second is added by `save_checkpoint`."""


def write_adapter(adapters: AdapterSet, recipe: Recipe, folder: Path) -> Path:
    """Write the adapter file and lycoris_config.json into a folder, and return the path of the adapter file.

    The recipe is also in the file's header. The folder is created if needed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / WEIGHTS_FILE
    files.write(adapters.bundle(), path, dialect="lycoris", metadata={"lycoris_config": json.dumps(recipe.as_dict())})
    write_object(recipe.as_dict(), folder / CONFIG_FILE)
    return path


def save_checkpoint(
    folder: Path, state: dict[str, Any], adapters: AdapterSet, recipe: Recipe, *, interrupted: bool = False
) -> None:
    """Write a checkpoint folder: a usable adapter file and the training state.

    It is written under a temporary name and renamed, so the folder is complete or absent. A folder of the same name is
    replaced.

    Args:
        state: State of the run, the first row of `STATE_KEYS`.
        interrupted: Whether the checkpoint is written only because training was interrupted;
            `remove_interrupted_checkpoints` deletes such ones after a finished run.
    """
    temporary = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(temporary, ignore_errors=True)
    write_adapter(adapters, recipe, temporary)
    state = {**state, "adapter": adapters.state_dict(), "recipe": recipe.as_dict(), "random": _capture_random_state()}
    torch.save(state, temporary / STATE_FILE)
    if interrupted:
        (temporary / INTERRUPTED_FILE).touch()
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)


def load_checkpoint(folder: Path, adapters: AdapterSet, recipe: Recipe) -> dict[str, Any]:
    """Load a checkpoint into `adapters`, restore the random state, and return the state of the run.

    Raises `FileError` for a damaged checkpoint, and `ConfigError` for one of another lycoris_config or of another base
    model.
    """
    state = read_state(folder)
    if state["recipe"] != recipe.as_dict():
        raise ConfigError(f"{folder} was saved with another lycoris_config: {json.dumps(state['recipe'])}")
    try:
        adapters.load_state_dict(state["adapter"])
    except (RuntimeError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{folder} does not match the adapters of this base model; was it saved with another one? {error}"
        ) from None
    random.setstate(state["random"]["python"])
    torch.set_rng_state(state["random"]["torch"])
    if torch.cuda.is_available() and state["random"]["cuda"]:
        torch.cuda.set_rng_state_all(state["random"]["cuda"])
    return state


def read_state(folder: Path) -> dict[str, Any]:
    """Return the state stored in a checkpoint folder.

    Raises `FileError` when it is damaged, or is not the state of a run of this version.
    """
    try:
        state: dict[str, Any] = torch.load(folder / STATE_FILE, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises half a dozen types for a damaged file
        raise FileError(f"{folder / STATE_FILE} cannot be read; choose another checkpoint: {error}") from error
    missing = [key for key in STATE_KEYS if key not in state] if isinstance(state, dict) else list(STATE_KEYS)
    if missing:
        raise FileError(
            f"{folder / STATE_FILE} is not the training state of this version; it lacks {', '.join(missing)}; "
            "choose another checkpoint"
        )
    return state


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Return the complete checkpoint folders in `output_dir`, the oldest step first.

    These are the folders named `checkpoint-<step>` that hold a training state. An `output_dir` that does not exist has
    none.
    """
    found = {
        int(match[1]): path
        for path in (output_dir.iterdir() if output_dir.is_dir() else ())
        if (match := re.fullmatch(r"checkpoint-(\d+)", path.name)) and (path / STATE_FILE).is_file()
    }
    return [found[step] for step in sorted(found)]


def find_checkpoint_to_resume(output_dir: Path, wanted: str | None, *, overwrite: bool = False) -> Path | None:
    """Return the checkpoint folder that `resume_from_checkpoint` refers to, or None for a new run.

    Args:
        wanted: "latest", a path, the name of a folder in `output_dir`, or None for a new run.
        overwrite: Whether a new run may replace an earlier one in `output_dir`.

    Raises `ConfigError` when there is no such checkpoint and, unless `overwrite`, when a new run would overwrite an
    earlier adapter or mix with its checkpoints.
    """
    found = list_checkpoints(output_dir)
    if wanted is None:
        if overwrite:
            return None
        if found:
            raise ConfigError(
                f"output_dir {output_dir} has {found[-1].name} of an earlier run; resume it with "
                f"resume_from_checkpoint = {LATEST!r} (--resume {LATEST}), replace it with --force, or choose another "
                "output_dir"
            )
        if (output_dir / WEIGHTS_FILE).exists():
            raise ConfigError(
                f"output_dir {output_dir} has {WEIGHTS_FILE} of an earlier run; choose another "
                "output_dir, or replace it with --force"
            )
        return None
    if wanted == LATEST:
        if not found:
            raise ConfigError(f"resume_from_checkpoint = {LATEST!r}, but {output_dir} has no checkpoint-* folder")
        return found[-1]
    for folder in (Path(wanted), output_dir / wanted):
        if (folder / STATE_FILE).is_file():
            return folder
    names = ", ".join(path.name for path in found) or "none"
    raise ConfigError(f"resume_from_checkpoint = {wanted!r} is not a checkpoint folder; {output_dir} has {names}")


def prune_checkpoints(output_dir: Path, limit: int | None) -> None:
    """Delete the oldest checkpoints in `output_dir`, so that at most `limit` remain.

    None deletes nothing.
    """
    if limit is not None:
        for path in list_checkpoints(output_dir)[:-limit]:
            shutil.rmtree(path)


def remove_checkpoints(output_dir: Path) -> None:
    """Delete every complete checkpoint in `output_dir`."""
    for path in list_checkpoints(output_dir):
        shutil.rmtree(path)


def remove_interrupted_checkpoints(output_dir: Path) -> None:
    """Delete the checkpoints that exist only because training was interrupted.

    See `interrupted` of `save_checkpoint`.
    """
    for path in list_checkpoints(output_dir):
        if (path / INTERRUPTED_FILE).is_file():
            shutil.rmtree(path)


def _capture_random_state() -> dict[str, Any]:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"python": random.getstate(), "torch": torch.get_rng_state(), "cuda": cuda}
