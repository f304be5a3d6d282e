"""Tensors to and from disk."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lycoris.errors import FileError

PICKLES = (".pt", ".pth", ".bin", ".ckpt")


def load_tensors(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and header metadata of a file. Raises `FileError` if it is missing, cut short or not such a file.

    Pickles are read only as far as `torch.load(weights_only=True)` does: tensors, no code.
    """
    path = Path(path)
    if not path.is_file():
        near = sorted(p.name for p in path.parent.glob("*.safetensors"))[:5] if path.parent.is_dir() else []
        there = f"; in that folder: {', '.join(near)}" if near else ""
        raise FileError(f"there is no file {path}{there}")
    if path.suffix in PICKLES:
        return _load_pickle(path), {}
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118 -- no mapping
    except (SafetensorError, OSError) as error:
        raise FileError(
            f"{path} cannot be read as safetensors: {error}. It may be cut short; fetch it again"
        ) from error


def _load_pickle(path: Path) -> dict[str, Tensor]:
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler raises whatever the damage happens to be
        raise FileError(f"{path} cannot be read safely: {error}. Save it as safetensors") from error
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise FileError(f"{path} holds something other than tensors by name")
    return found


def save_tensors(tensors: Mapping[str, Tensor], path: str | os.PathLike[str], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file under a temporary name, then move it into place."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = {key: tensor.detach().cpu().contiguous().clone() for key, tensor in tensors.items()}
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    os.close(handle)
    try:
        save_file(whole, temporary, metadata={"format": "pt"} | dict(metadata))
        # mkstemp makes files that only their owner can read; others expect the usual mode.
        mask = os.umask(0)
        os.umask(mask)
        Path(temporary).chmod(0o666 & ~mask)
        Path(temporary).replace(path)
    finally:
        Path(temporary).unlink(missing_ok=True)
