"""Load tensors from a pickle without running any code in it."""

from __future__ import annotations

import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lycoris.errors import FileError

PICKLE_ADVICE = "Save its tensors as safetensors"


def load_pickle(path: Path, size: int, *, zipped: bool) -> dict[str, Tensor]:
    """Load tensors by name, from the top of the file or below "state_dict", as in checkpoints.

    Args:
        size: Bytes of the file. Tensors may not take more than that in memory.
        zipped: Whether it is the zip format of `torch.save`; otherwise the older one.

    Raises:
        FileError: The file contains anything but tensors by name, is damaged, or is compressed.
    """
    try:
        if zipped:
            _check_zip(path, size)
        # Mapped storages cannot grow, so a tensor that claims more than the file has is refused before it takes memory.
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:  # the unpickler raises whatever the damage happens to be
        raise FileError(f"{path} cannot be read safely: {_explain_pickle_error(error)}. {PICKLE_ADVICE}") from error
    if isinstance(found, dict) and isinstance(found.get("state_dict"), dict):
        found = found["state_dict"]
    if what := _explain_pickle(found):
        raise FileError(f"{path}: {what}")
    if not isinstance(found, dict):
        raise FileError(f"{path} holds something other than tensors by name: a {type(found).__name__}. {PICKLE_ADVICE}")
    memory: dict[int, int] = {}
    for key, tensor in found.items():
        if not isinstance(key, str) or not isinstance(tensor, Tensor):
            raise FileError(
                f"{path} holds something other than tensors by name: under {str(key)[:60]!r} a "
                f"{type(tensor).__name__}. {PICKLE_ADVICE}"
            )
        if (problem := _explain_unsafe_tensor(tensor)) is not None:
            raise FileError(f"{path} cannot be read safely: {key[:60]} {problem}. {PICKLE_ADVICE}")
        storage = tensor.untyped_storage()
        memory[storage.data_ptr()] = storage.nbytes()
    if sum(memory.values()) > size:
        raise FileError(f"{path} has {size} bytes and describes {sum(memory.values())}: it is damaged. {PICKLE_ADVICE}")
    return {key: tensor.detach() for key, tensor in found.items()}


def _explain_pickle(found: Any) -> str:
    """What a pickle is whose tensors have no names of layers, and what to do with it; "" for all others."""
    if isinstance(found, list) and found and all(isinstance(each, Tensor) for each in found):
        return (
            f"it holds something other than tensors by name: a list of {len(found)} tensors, as cloneofsimo's lora "
            "saves its LoRA; save it from that program as safetensors, named as diffusers or kohya do"
        )
    if isinstance(found, dict) and "string_to_param" in found:
        return (
            "it is a textual inversion, the embeddings of new words, not an adapter of layers; load it as an embedding"
        )
    return ""


def _explain_pickle_error(error: Exception) -> str:
    """Why, without torch's advice to switch the safety off."""
    text = str(error)
    if code := re.search(r"GLOBAL (\S+)", text):
        return f"it asks for {code[1]}, which is code and not tensors"
    if text.startswith("Weights only load failed"):
        detail = re.search(r"\n\n+(.+)", text)
        text = "it is damaged or holds more than tensors" + (f" ({detail[1]})" if detail else "")
    return " ".join(text.split())[:200] or type(error).__name__


def _check_zip(path: Path, size: int) -> None:
    """`torch.save` compresses nothing: what is compressed could unpack to any size, or be read as if it were not."""
    with zipfile.ZipFile(path) as archive:
        parts = archive.infolist()
    if any(part.compress_type != zipfile.ZIP_STORED for part in parts):
        raise FileError("it is a compressed archive, which torch.save never writes")
    if (total := sum(part.file_size for part in parts)) > size:
        raise FileError(f"it has {size} bytes and its parts {total}: it is damaged")


def _explain_unsafe_tensor(tensor: Any) -> str | None:
    if type(tensor) not in (Tensor, torch.nn.Parameter) or tensor.is_quantized:
        return f"is a {type(tensor).__name__} of {tensor.dtype}, not a dense tensor"
    if tensor.layout is not torch.strided or tensor.device.type != "cpu":
        return f"is {tensor.layout} on {tensor.device}, not a dense tensor"
    if (there := tensor.untyped_storage().nbytes()) < tensor.nbytes:
        return f"of shape {tuple(tensor.shape)} needs {tensor.nbytes} bytes and has {there}"
    return None
