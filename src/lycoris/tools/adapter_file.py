"""An adapter file as the tools use it: read in full, changed layer by layer, and written in the same format."""

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
    """Where an adapter is: a component, and a path in it.

    `str` is the path, after the component unless that is the denoiser.
    """

    component: str
    """Of a pipeline, as diffusers names it; "" is the denoiser."""
    path: str
    """As the file calls it."""

    def __str__(self) -> str:
        return f"{self.component}: {self.path}" if self.component else self.path


@dataclass(frozen=True)
class AdapterFile:
    """An opened adapter file, or PEFT folder, with its path.

    Files are read completely when opened; `write` needs the source no more.
    """

    path: Path
    opened: Opened

    @classmethod
    def open(cls, path: str | os.PathLike[str], base: nn.Module | None = None, *, strict: bool = True) -> AdapterFile:
        """Read a file.

        Args:
            base: The denoiser it is for, on the meta device; None: a known model.
            strict: Whether to refuse a file with layers that cannot be read.

        Raises:
            FileError: The file is damaged or fits no model, or, with `strict`, something in it cannot be read.
        """
        return cls(Path(path), open_file(path, base, strict=strict))

    def iterate_stacks(self) -> Iterator[tuple[LayerLocation, Stack]]:
        """Yield every layer with its adapters, lowest first.

        In the order of the file, component by component.
        """
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
        """Write other adapters for these layers in the format of this file.

        The header keeps what is still true. Layers that are not in `stacks` are left out. `dtype` is that of the
        tensors; None: unchanged.

        Raises:
            FileError: `stacks` is empty, or the format cannot store it.
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
                raise FileError(f"a PEFT folder holds the adapters of one model, and these are of {names}")
            write_peft(bundles[""], target, dtype=dtype)
            return
        encoded = compose(bundles, dialect, model=self.opened.layouts, family=self.opened.family)
        made = store_tensors(encoded, dtype, {**keep_header(self.opened.header), **encoded.header})
        save_tensors(made.tensors, target, made.header)


def measure_on_disk(path: Path) -> int:
    """Return the bytes of a file, or of the files in a folder.

    Subfolders are not counted.
    """
    files = [each for each in path.iterdir() if each.is_file()] if path.is_dir() else [path]
    return sum(each.stat().st_size for each in files)


def count_bytes(*entries: Entry) -> int:
    """Return the bytes of the tensors of some entries."""
    return sum(tensor.numel() * tensor.itemsize for entry in entries for tensor in entry.tensors.values())
