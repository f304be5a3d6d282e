"""An adapter file as the tools take it: read whole, changed layer by layer, and written back as what it was."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from lycoris.algorithms.base import Entry
from lycoris.errors import FileError
from lycoris.files.container.storage import save_tensors
from lycoris.files.dialects import DIALECTS
from lycoris.files.opening import Opened, open_file
from lycoris.files.peft import write_peft
from lycoris.files.placing import Stack
from lycoris.files.writing import compose, keep_header, store_tensors


class LayerLocation(NamedTuple):
    """Where an adapter is."""

    component: str
    """Of a pipeline, as diffusers names it; "" is the denoiser."""
    path: str
    """As the file calls it."""

    def __str__(self) -> str:
        return f"{self.component}: {self.path}" if self.component else self.path


@dataclass(frozen=True)
class AdapterFile:
    """An adapter file, or a folder of PEFT's, and where it is."""

    path: Path
    opened: Opened

    @classmethod
    def open(cls, path: str | os.PathLike[str], base: nn.Module | None = None, *, strict: bool = True) -> AdapterFile:
        """Read it. `base` is the denoiser that it is for, on the meta device; None: a known one.

        Raises `FileError`, unless `strict` is False also for layers that cannot be read.
        """
        return cls(Path(path), open_file(path, base, strict=strict))

    def iterate_stacks(self) -> Iterator[tuple[LayerLocation, Stack]]:
        """Every layer with its adapters, lowest first."""
        for component, bundle in self.opened.bundles.items():
            for path, stack in bundle.entries.items():
                yield LayerLocation(component, path), stack

    @property
    def size(self) -> int:
        """Bytes on disk."""
        return measure_on_disk(self.path)

    def write(
        self, target: str | os.PathLike[str], stacks: Mapping[LayerLocation, Stack], dtype: torch.dtype | None = None
    ) -> None:
        """Write other adapters of these layers in the format of this file, with what stays true of its header.

        Layers that are not in `stacks` are left out. Raises `FileError` for what the format cannot hold.
        """
        bundles = {}
        for component, bundle in self.opened.bundles.items():
            own = {path: stack for (where, path), stack in stacks.items() if where == component}
            if own:
                bundles[component] = replace(bundle, entries=own)
        if not bundles:
            raise FileError(f"nothing of {self.path} is left to write")
        dialect = self.opened.detection.dialect
        if DIALECTS[dialect].is_folder:
            if set(bundles) != {""}:
                names = ", ".join(name or "the denoiser" for name in bundles)
                raise FileError(f"a folder of PEFT's holds the adapters of one model, and these are of {names}")
            write_peft(bundles[""], target, dtype=dtype)
            return
        encoded = compose(bundles, dialect, model=self.opened.layouts, family=self.opened.family)
        made = store_tensors(encoded, dtype, {**keep_header(self.opened.header), **encoded.header})
        save_tensors(made.tensors, target, made.header)


def measure_on_disk(path: Path) -> int:
    """Bytes of a file, or of the files in a folder."""
    files = [each for each in path.iterdir() if each.is_file()] if path.is_dir() else [path]
    return sum(each.stat().st_size for each in files)


def count_bytes(*entries: Entry) -> int:
    """Of their tensors."""
    return sum(tensor.numel() * tensor.itemsize for entry in entries for tensor in entry.tensors.values())
