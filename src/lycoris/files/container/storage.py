"""Load tensors from disk and save them."""

from __future__ import annotations

import json
import logging
import os
import stat
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lycoris.errors import FileError
from lycoris.files.container.format_version import check_format
from lycoris.files.container.headers import DTYPES, LONE_SURROGATE, SHOWN_CHARS, read_header
from lycoris.files.container.kinds import HEADER_LIMIT, PICKLES, examine
from lycoris.files.container.pickles import load_pickle

logger = logging.getLogger("LyCORIS")

ENTRY_BYTES = 300
"""Bytes that an entry of a header takes at most next to its name."""


def load_tensors(
    path: str | os.PathLike[str], only: Callable[[str], bool] | None = None
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return tensors and header metadata of a file.

    The tensors of a safetensors file are memory-mapped: they take memory as they are accessed, and the file must not be
    modified in place while they are in use. (Replacing it, as `save_tensors` does, is fine.) Pickles are loaded with
    `weights_only=True`: tensors, no code.

    Args:
        only: Called with each name; tensors for which it returns False are left out. None: all.

    Raises:
        FileError: The file is missing, truncated, or not such a file in any part.
    """
    path = Path(path)
    kind, size, _ = examine(path)
    if path.suffix.lower() in PICKLES:
        if kind == "safetensors":
            right = path.with_suffix(".safetensors").name
            raise FileError(f"{path} is a safetensors file under the name of a pickle; rename it to {right}")
        found = load_pickle(path, size, zipped=kind == "zip")
        return {key: tensor for key, tensor in found.items() if only is None or only(key)}, {}
    if kind in ("zip", "pickle"):
        raise FileError(
            f"{path} cannot be read as safetensors: it is a pickle under another name; rename it to "
            f"{path.with_suffix('.pt').name}, or better save its tensors as safetensors"
        )
    head = read_header(path)
    check_format(head.metadata, path)
    try:
        with safe_open(path, framework="pt") as file:
            names = [key for key in head.tensors if only is None or only(key)]
            return {key: _align(file.get_tensor(key)) for key in names}, dict(head.metadata)
    except (SafetensorError, OSError) as error:
        raise FileError(f"{path} cannot be read as safetensors: {error}") from error


def load_shapes(path: str | os.PathLike[str]) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """Return shapes and header metadata of a file, without its tensors.

    Only a pickle is loaded in full, since it has no header. Raises `FileError` as `load_tensors` does.
    """
    if Path(path).suffix.lower() in PICKLES:
        tensors, metadata = load_tensors(path)
        return get_shapes(tensors), metadata
    found = read_header(path)
    check_format(found.metadata, path)
    return {name: info.shape for name, info in found.tensors.items()}, dict(found.metadata)


def get_shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Return the shape of each tensor, by name."""
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _align(tensor: Tensor) -> Tensor:
    """A copy of a tensor that lies where the processor cannot be trusted to reach it: not at a multiple of its size."""
    return tensor.clone() if tensor.data_ptr() % tensor.element_size() else tensor


def save_tensors(tensors: Mapping[str, Tensor], path: str | os.PathLike[str], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file under a temporary name, then move it into place.

    Metadata for which the header has no room are dropped with a warning; see `trim_metadata`.

    Raises:
        FileError: A tensor cannot be stored, metadata are not strings, or the path cannot be a safetensors file; in
            these cases nothing is written. Also if writing fails.
    """
    path = Path(path)
    _check_file_name(path)
    for key, value in metadata.items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise FileError(
                f"metadata {key!r} is {value!r}, a {type(value).__name__}: headers hold text by text; give str(value) "
                f"or json.dumps(value). {path} was not written"
            )
        if LONE_SURROGATE.search(key + value):
            raise FileError(f"metadata {key!r} holds half a character, which is no text; {path} was not written")
    metadata = trim_metadata(metadata, tensors, path)
    try:
        stored = make_storable(tensors)
    except FileError as error:
        raise FileError(f"{error}; {path} was not written") from error
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem[:100]}.", suffix=".part")
    except OSError as error:
        raise FileError(f"{path} cannot be written: {error.strerror}") from error
    os.close(handle)
    try:
        save_file(stored, temporary, metadata={"format": "pt"} | dict(metadata))
        # mkstemp makes files that only their owner can read; others expect the usual mode.
        mask = os.umask(0)
        os.umask(mask)
        Path(temporary).chmod(0o666 & ~mask)
        Path(temporary).replace(path)
    except SafetensorError as error:
        raise FileError(f"{path} cannot be written: {error}; is its disk full?") from error
    except OSError as error:
        raise FileError(f"{path} cannot be written: {error.strerror}") from error
    finally:
        Path(temporary).unlink(missing_ok=True)


def trim_metadata(metadata: Mapping[str, str], tensors: Iterable[str], path: str | os.PathLike[str]) -> dict[str, str]:
    """Return the metadata that a header has room for, dropping the largest first.

    The limit is `HEADER_LIMIT` bytes, names of tensors included. Each entry that is dropped is logged as a warning,
    since the tensors of a run are worth more than its metadata.
    """
    sizes = {key: _stored_size(key) + _stored_size(value) for key, value in metadata.items()}
    room = HEADER_LIMIT - sum(_stored_size(name) + ENTRY_BYTES for name in tensors)
    left_out: set[str] = set()
    while sum(size for key, size in sizes.items() if key not in left_out) > room and len(left_out) < len(sizes):
        largest = max(sizes.keys() - left_out, key=lambda key: sizes[key])
        left_out.add(largest)
        logger.warning(
            "metadata %r of %.1f MB was left out of %s: the header of a safetensors file holds %d MB in all",
            *(largest[:SHOWN_CHARS], sizes[largest] / 1e6, path, HEADER_LIMIT // 10**6),
        )
    return {key: value for key, value in metadata.items() if key not in left_out}


def _stored_size(given: object) -> int:
    """Bytes of a text in a header; only a long one is worth counting exactly. What is no text is refused later."""
    text = str(given)
    return 6 * len(text) + 8 if len(text) < 10**5 else len(json.dumps(text, ensure_ascii=False).encode()) + 8


def _check_file_name(path: Path) -> None:
    if path.suffix.lower() in PICKLES:
        right = path.with_suffix(".safetensors").name
        raise FileError(f"{path} has the name of a pickle, and what is written is safetensors; name it {right}")
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return
    except (OSError, ValueError) as error:
        raise FileError(f"{str(path)!r:.200} cannot be the name of a file: {error}") from error
    if not stat.S_ISREG(mode):
        what = "is a folder; name a file in it" if stat.S_ISDIR(mode) else "is a device or a pipe; name a file"
        raise FileError(f"{path} {what}")


def make_storable(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return each tensor as a file stores it: contiguous, on the CPU, and with memory of its own.

    Raises:
        FileError: Something is not a tensor with a name, or has no dense data: sparse, nested, on the meta device, or
            of a dtype safetensors does not have.
    """
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for key, tensor in tensors.items():
        _check_storable(key, tensor)
        dense = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
        memory = dense.untyped_storage().data_ptr()
        # Two names for one memory are two tensors in a file; safetensors refuses to choose.
        found[key] = dense.clone() if memory in seen else dense
        seen.add(memory)
    return found


def _check_storable(key: str, tensor: Tensor) -> None:
    if not isinstance(key, str) or key == "__metadata__" or LONE_SURROGATE.search(key):
        raise FileError(f"{key!r} cannot be the name of a tensor: names are text, and __metadata__ is the header's own")
    if not isinstance(tensor, Tensor):
        raise FileError(f"{key} is a {type(tensor).__name__}, no tensor")
    if tensor.layout is not torch.strided or tensor.is_nested:
        raise FileError(f"{key} is {tensor.layout}, and files hold dense tensors; give .to_dense()")
    if tensor.device.type == "meta":
        raise FileError(f"{key} is on the meta device and has no data; load or fill it first")
    if tensor.dtype not in DTYPES.values():
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES.values())
        raise FileError(f"{key} is of {tensor.dtype}, which safetensors files cannot hold; known are {known}")
