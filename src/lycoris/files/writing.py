"""A bundle as tensors by name, and as a file."""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch
from torch import Tensor

from lycoris.algorithms import write_tensors
from lycoris.bundle import Bundle
from lycoris.errors import FileError, unknown
from lycoris.files.dialects import DIALECTS
from lycoris.files.storage import save_tensors


def encode(
    bundle: Bundle, dialect: str = "lycoris", *, component: str = "", prefix: str | None = None
) -> dict[str, Tensor]:
    """The tensors of a bundle as a dialect names them. Raises `FileError` when two layers get one name or a
    layer has several algorithms.
    """
    if dialect not in DIALECTS:
        raise FileError(unknown("dialect", dialect, DIALECTS))
    tensors: dict[str, Tensor] = {}
    owner: dict[str, str] = {}
    for path, stack in bundle.entries.items():
        if len(stack) > 1:
            names = " and ".join(entry.algorithm.name for entry in stack)
            raise FileError(
                f"{path} has {names}, and {dialect} files hold one algorithm per layer; put each on a set of its own, "
                "and write those one by one"
            )
        for entry in stack:
            for suffix, tensor in write_tensors(entry.algorithm, entry.tensors, entry.geometry).items():
                key = DIALECTS[dialect].join(path, suffix, component, prefix)
                if key in tensors:
                    raise FileError(
                        f"{owner[key]} and {path} would both be written as {key}; this format cannot hold both"
                    )
                tensors[key], owner[key] = tensor, path
    return tensors


def write(
    bundle: Bundle,
    path: str | os.PathLike[str],
    dialect: str = "lycoris",
    *,
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
    component: str = "",
    prefix: str | None = None,
) -> None:
    """Write an adapter file, whole or not at all.

    `dtype` is that of the stored tensors (None: as they are); `alpha` stays float32, since half precision would round
    or overflow it. `metadata` goes into the header beside the bundle's own.
    """
    tensors = encode(bundle, dialect, component=component, prefix=prefix)
    if dtype is not None:
        whole = {key for key, t in tensors.items() if key.endswith(".alpha") or not t.is_floating_point()}
        tensors = {key: t if key in whole else t.to(dtype) for key, t in tensors.items()}
    bad = next((key for key, tensor in tensors.items() if not torch.isfinite(tensor).all()), None)
    if bad is not None:
        raise FileError(f"{bad} is not finite{'' if dtype is None else f' as {dtype}'}; nothing was written")
    save_tensors(tensors, path, {**bundle.metadata, **(metadata or {})})
