"""How many bytes a conversion makes of a file's, told before tensors that large are made."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from lycoris.adapters.bundle import Bundle
from lycoris.algorithms import DoRA, LoHa, LoRA
from lycoris.algorithms.base import Entry
from lycoris.algorithms.dora import unwrap_dora
from lycoris.algorithms.tensors import RANK_TENSORS, match_algorithms
from lycoris.errors import FileError
from lycoris.files.container.kinds import CONFIG, WEIGHTS
from lycoris.files.dialects.base import Dialect
from lycoris.files.layout import Layout
from lycoris.models.families.naming import Span

LET_BY = 1.1
"""A file that becomes more than so many times as large is not written unasked."""
ALLOW = "Nothing was written; to write it all the same: --allow-growth (in Python allow_growth=True)"
NAMES = 2**16
"""Bytes by which names and header may be longer besides: in files of a few layers they are most of it."""
FIXED = 512
"""Bytes of a header beside its entries."""

Stack = tuple[Entry, ...]
_PAIRS: Mapping[type, Mapping[str, str]] = {LoRA: {"up": "down"}, LoHa: {"w1_a": "w1_b", "w2_a": "w2_b"}}
"""Factors of outputs, (O, r, ...) → of inputs, (r, ...)."""


class GrowthError(FileError):
    """A file would grow by more than is let by unasked."""


@dataclass(frozen=True)
class Bytes:
    """How large a file is."""

    file: int
    tensors: int
    """What of it the tensors take."""

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], file: int, dtype: torch.dtype | None = None) -> Bytes:
        """Of a file with these tensors, or if they had that precision, where it is a wider one."""
        own = sum(tensor.nbytes for tensor in tensors.values())
        if dtype is None:
            return cls(file, own)
        wide = sum(
            tensor.numel() * max(tensor.itemsize, dtype.itemsize) if tensor.is_floating_point() else tensor.nbytes
            for tensor in tensors.values()
        )
        return cls(file + wide - own, wide)

    def lets(self, after: Bytes) -> bool:
        """Whether a file may become that large unasked."""
        return after.tensors <= LET_BY * self.tensors and after.file <= LET_BY * self.file + NAMES


def size_of(source: str | os.PathLike[str]) -> int:
    """Bytes of a file, or of a folder of PEFT's."""
    path = Path(source)
    if path.is_dir():
        return sum((path / name).stat().st_size for name in (WEIGHTS, CONFIG) if (path / name).is_file())
    return path.stat().st_size


def size_written(tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> int:
    """Bytes of the safetensors file that holds these, to within some for each name."""
    names = sum(len(key) + 70 for key in tensors) + sum(len(key) + len(value) for key, value in header.items())
    return sum(tensor.nbytes for tensor in tensors.values()) + names + FIXED


def format_bytes(size: float) -> str:
    """Bytes in words."""
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if size >= unit:
            return f"{size / unit:.3g} {name}"
    return f"{size:.0f} bytes"


def change(before: float, after: float) -> str:
    """By how much a file grows, in words."""
    if after > 3 * before:
        return f"{after / before:,.0f} times as large"
    return f"{after / before - 1:+.0%}" if before else "from nothing"


def check_growth(before: Bytes, after: Bytes, why: Iterable[str], about: str = "") -> None:
    """Raise `GrowthError` where a file would become larger than is let by.

    `why` is what became of its layers; `about` how sure its size is.
    """
    if before.lets(after):
        return
    one, other, what = before.tensors, after.tensors, "tensors"
    if other <= LET_BY * one:
        one, other, what = before.file, after.file, "file"
    became = "; ".join(dict.fromkeys(why))
    raise GrowthError(
        f"its {what} would grow from {format_bytes(one)} to {about}{format_bytes(other)} ({change(one, other)})"
        + (f": {became:.300}" if became else "")
    )


def widened_by(tensors: Mapping[str, Tensor], before: Mapping[str, Tensor]) -> str:
    """What is to be said of tensors that have a wider precision than any of a file had; "" where none do."""
    widest = max((t.itemsize for t in before.values() if t.is_floating_point() and t.dim()), default=8)
    wide = sum(t.is_floating_point() and t.dim() > 0 and t.itemsize > widest for t in tensors.values())
    if not wide:
        return ""
    return f"{wide} tensors need float32 to hold the scale or what was multiplied in exactly; --dtype rounds them"


class Sample(NamedTuple):
    """Layers that become layers of another naming together."""

    alike: int
    """How many such groups there are."""
    bundle: Bundle


def samples(bundle: Bundle, layout: Layout, naming: str) -> Iterator[Sample]:
    """One group of layers of each kind, which together stand for all of a bundle."""
    groups: dict[str, dict[str, Stack]] = {}
    holder = _holders(layout, naming)
    spans = layout.spans(layout.naming)
    for layer, stack in bundle.entries.items():
        first = spans.get(layer, Span((layer,))).parts[0]
        groups.setdefault(holder.get(first, first), {})[layer] = stack
    counts = Counter(map(_signature, groups.values()))
    for entries in {_signature(own): own for own in groups.values()}.values():
        yield Sample(counts[_signature(entries)], Bundle(entries, bundle.metadata, bundle.base, bundle.report))


def _holders(layout: Layout, naming: str) -> dict[str, str]:
    """Layer of diffusers → what holds it in a naming."""
    if layout.architecture is None:
        return {}
    return {part: name for name, span in layout.spans(naming).items() for part in span.parts}


def _signature(entries: Mapping[str, Stack]) -> tuple[object, ...]:
    """What groups have in common that become as large."""
    return tuple(
        (re.sub(r"\d+", "*", layer), *((e.algorithm.name, e.geometry.shape, _shapes(e)) for e in stack))
        for layer, stack in entries.items()
    )


def _shapes(entry: Entry) -> tuple[object, ...]:
    return tuple((name, tuple(tensor.shape), tensor.dtype) for name, tensor in entry.tensors.items())


def stacks_bytes(entries: Mapping[str, Stack], dtype: torch.dtype | None = None) -> int:
    """Bytes of the tensors of some layers, in a precision."""
    tensors = (tensor for stack in entries.values() for entry in stack for tensor in entry.tensors.values())
    return sum(t.nbytes if dtype is None else t.numel() * dtype.itemsize for t in tensors)


def forms(shapes: Mapping[str, tuple[int, ...]], dialect: Dialect) -> Counter[str]:
    """What layers of a file have: "lora of rank 4" → layers."""
    layers: dict[tuple[str, str], dict[str, tuple[int, ...]]] = {}
    for name, shape in shapes.items():
        key = dialect.split(name)
        if key is not None:
            layers.setdefault((key.prefix, key.layer), {})[key.suffix] = shape
    return Counter(map(_form, layers.values()))


def _form(tensors: Mapping[str, tuple[int, ...]]) -> str:
    plain = tensors.keys() - {"alpha", "dora_scale", "lora_magnitude_vector"}
    # A change of the bias beside another algorithm.
    main = plain - {"diff_b", "lora_up.bias"} or plain
    kind = next((each.name for each in match_algorithms({name: tensors[name] for name in main})), "other")
    lengths = "dora over " if plain != tensors.keys() - {"alpha"} else ""
    rank = next((tensors[name][0] for name in RANK_TENSORS if tensors.get(name)), None)
    return f"{lengths}{kind}" + ("" if rank is None else f" of rank {rank}")


def compact(entry: Entry) -> Entry:
    """The same without ranks that do nothing, as one part of a joined layer has them for the others; exact.

    A layer that does nothing at all stays as it is.
    """
    own = unwrap_dora(entry.algorithm)
    pairs = _PAIRS.get(type(own), {})
    if not pairs or not all(name in entry.tensors and name_in in entry.tensors for name, name_in in pairs.items()):
        return entry
    assert isinstance(own, LoRA | LoHa)
    if entry.geometry.stack or own.use_scalar or entry.tensors.keys() & {"mid", "t1", "t2"}:
        return entry
    outs = [entry.tensors[name].flatten(1) for name in pairs]
    used = torch.stack([out.ne(0).any(dim=0) for out in outs]).all(dim=0)
    rank = int(used.sum())
    if not 0 < rank < len(used):
        return entry
    tensors = dict(entry.tensors)
    for name, name_in in pairs.items():
        tensors[name], tensors[name_in] = tensors[name][:, used].contiguous(), tensors[name_in][used].contiguous()
    smaller = replace(own, rank=rank, alpha=own.scale(entry.geometry) * rank, rs_lora=False)
    whole = replace(entry.algorithm, inner=smaller) if isinstance(entry.algorithm, DoRA) else smaller
    return Entry(whole, entry.geometry, tensors)
