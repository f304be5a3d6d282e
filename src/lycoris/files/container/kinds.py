"""Detect what a file is by its first bytes: its name may say something else, and failed downloads leave anything."""

from __future__ import annotations

import stat
from pathlib import Path
from typing import Literal, NamedTuple

from lycoris.errors import FileError

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
"""Files of a PEFT folder."""
PICKLES = (".pt", ".pth", ".bin", ".ckpt")
HEAD_BYTES = 512
HEADER_LIMIT = 100_000_000
"""The most bytes that a safetensors header may have; the limit is safetensors' own."""


class Examined(NamedTuple):
    """What is known about a file before it is read.

    `head` is its first `HEAD_BYTES` bytes, or all of a shorter one.
    """

    kind: Literal["safetensors", "zip", "pickle", "unknown"]
    """By the first bytes: "zip" is what `torch.save` writes, "pickle" what it wrote before."""
    size: int
    """Bytes."""
    head: bytes


def examine(path: Path) -> Examined:
    """Return the kind, the size and the first bytes of a file.

    Raises:
        FileError: The file is missing, unreadable, empty, or of a kind known to have no tensors, such as a web page or
            a Git LFS pointer.
    """
    try:
        status = path.stat()
    except (OSError, ValueError) as error:
        raise FileError(_explain_missing(path, error)) from error
    if not stat.S_ISREG(status.st_mode):
        raise FileError(
            f"{path} is a folder, no file{_list_safetensors(path)}; name a file in it"
            if stat.S_ISDIR(status.st_mode)
            else f"{path} is a device or a pipe, no file; copy what it holds to a file"
        )
    try:
        with path.open("rb") as file:
            head = file.read(HEAD_BYTES)
    except OSError as error:
        raise FileError(f"{path} cannot be opened: {error.strerror}. Check its rights and its disk") from error
    if not head:
        raise FileError(f"{path} cannot be read: it is empty; it is truncated or never written; download it again")
    kind = _detect_container(head)
    if kind == "unknown" and (what := _explain_kind(head, pickles=path.suffix.lower() in PICKLES)):
        raise FileError(f"{path} cannot be read: {what}")
    return Examined(kind, status.st_size, head)


def _detect_container(head: bytes) -> Literal["safetensors", "zip", "pickle", "unknown"]:
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= HEADER_LIMIT:
        return "safetensors"
    if head.startswith(b"PK\x03\x04"):
        return "zip"
    # A length of a safetensors header may begin so, and goes on with zeros.
    if head[0] == 0x80 and head[1:2] in (b"\2", b"\3", b"\4", b"\5") and any(head[2:8]):
        return "pickle"
    return "unknown"


def _explain_kind(head: bytes, *, pickles: bool) -> str:
    """What a file that holds no tensors is, and what to do; "" where that is not known."""
    if head.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer, not the file itself; run `git lfs pull`, or download the file"
    if head.lstrip().lower().startswith((b"<!doctype html", b"<html", b"<head", b"<?xml")):
        return "it is a web page, not the file itself; the download failed or needs a login. Download it again"
    if head.startswith(b"GGUF"):
        return "it is a GGUF file, and adapters are read from safetensors; convert it"
    # Older pickles are text too, so under their names text may be one.
    if not pickles and len(head) > 8 and head.isascii() and head.decode().replace("\n", " ").isprintable():
        return f"it is text that begins {head[:40].decode()!r}, maybe a server's answer; download it again"
    return ""


def _explain_missing(path: Path, error: Exception) -> str:
    if not isinstance(error, FileNotFoundError | NotADirectoryError | ValueError):
        return f"{path} cannot be opened: {getattr(error, 'strerror', error)}"
    try:
        there = _list_safetensors(path.parent)
    except (OSError, ValueError):
        there = ""
    return f"there is no file {path}{there}"


def _list_safetensors(folder: Path) -> str:
    names = sorted(p.name for p in folder.glob("*.safetensors"))[:5] if folder.is_dir() else []
    return f"; in that folder: {', '.join(names)}" if names else ""
