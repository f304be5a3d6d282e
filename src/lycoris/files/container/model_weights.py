"""The weights of a base model on disk, read one layer at a time."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lycoris.errors import FileError
from lycoris.files.container.headers import read_header
from lycoris.files.layout import NamedLayout
from lycoris.layers.geometry import Affine, Geometry
from lycoris.ops.rounding import widen


@dataclass(frozen=True)
class BaseWeights:
    """The tensors of a base model in files, under diffusers' names.

    Nothing is kept in memory: each request reads from the file, in float32 or wider.
    """

    files: dict[str, Path]
    """Name of a tensor → file."""

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> BaseWeights:
        """Open a safetensors file, or all of them in a folder.

        Only headers are read. Raises `FileError` if there are none or one is damaged.
        """
        where = Path(path)
        found = sorted(where.glob("*.safetensors")) if where.is_dir() else [where]
        if not found:
            raise FileError(f"{where} has no .safetensors files, which the base model's weights are read from")
        return cls({name: file for file in found for name in read_header(file).tensors})

    def affine(self, name: str, layout: NamedLayout) -> Affine:
        """Return weight and bias of a layer, concatenated from the layers of diffusers that it holds.

        Parts without a bias get zeros if another part has one.

        Raises:
            FileError: A tensor is missing or cannot be read.
        """
        span = layout.find_spans(layout.naming)[name]
        weights = [self._weight(part, layout.diffusers_layers[part]) for part in span.parts]
        weight, bias = torch.cat(weights), None
        if any(f"{part}.bias" in self.files for part in span.parts):
            bias = torch.cat([self._bias(part, own) for part, own in zip(span.parts, weights, strict=True)])
        if span.swaps_halves(layout.layers[name]):
            half = len(weight) // 2
            weight, bias = weight.roll(half, 0), None if bias is None else bias.roll(half, 0)
        return Affine(weight, bias)

    def _weight(self, part: str, g: Geometry) -> Tensor:
        """(O, I, *K); a bare parameter has no module around it."""
        return g.transpose_stored(self._read(part if g.kind == "parameter" else f"{part}.weight"))

    def _bias(self, part: str, weight: Tensor) -> Tensor:
        """Of a part without one, zeros: another part of its module has one."""
        name = f"{part}.bias"
        return self._read(name) if name in self.files else weight.new_zeros(len(weight))

    def _read(self, name: str) -> Tensor:
        if name not in self.files:
            raise FileError(f"the base model's weights have no {name}; are they of another model or naming?")
        try:
            with safe_open(self.files[name], framework="pt") as file:
                tensor: Tensor = file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise FileError(f"{self.files[name]}: {name} cannot be read: {error}") from error
        return widen(tensor)
