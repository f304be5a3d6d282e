"""Predict how large a conversion makes a file, before tensors of that size are built."""

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
from lycoris.files.layout import NamedLayout
from lycoris.files.placing import Stack
from lycoris.models.families.naming import Span

MAX_GROWTH = 1.1
"""A file that becomes more than so many times as large is not written unasked."""
GROWTH_ADVICE = "Nothing was written; to write it all the same: --allow-growth (in Python allow_growth=True)"
NAMES_ALLOWANCE = 2**16
"""Bytes by which names and header may be longer besides: in files of a few layers they are most of it."""
HEADER_ALLOWANCE = 512
"""Bytes of a header next to its entries."""

_FACTOR_PAIRS: Mapping[type, Mapping[str, str]] = {LoRA: {"up": "down"}, LoHa: {"w1_a": "w1_b", "w2_a": "w2_b"}}
"""Factors of outputs, (O, r, ...) → of inputs, (r, ...)."""


class GrowthError(FileError):
    """A file would grow by more than is allowed without asking.

    `convert` raises it unless `allow_growth`; the message gives both sizes.
    """


@dataclass(frozen=True)
class FileSize:
    """The size of a file and of the tensors in it, in bytes.

    Make it with `measure`, which says what counts.
    """

    file: int
    tensors: int
    """What of it the tensors take."""

    @classmethod
    def measure(cls, tensors: Mapping[str, Tensor], file: int, dtype: torch.dtype | None = None) -> FileSize:
        """Measure a file of `file` bytes with these tensors.

        With `dtype`, as if tensors of a narrower precision had that one, so that an upcast the user asked for does not
        count as growth.
        """
        own = sum(tensor.nbytes for tensor in tensors.values())
        if dtype is None:
            return cls(file, own)
        wide = sum(
            tensor.numel() * max(tensor.itemsize, dtype.itemsize) if tensor.is_floating_point() else tensor.nbytes
            for tensor in tensors.values()
        )
        return cls(file + wide - own, wide)

    def allows(self, after: FileSize) -> bool:
        """Return whether a file may become that large without asking.

        `MAX_GROWTH` times the tensors, and as much of the whole file plus `NAMES_ALLOWANCE` for names.
        """
        return after.tensors <= MAX_GROWTH * self.tensors and after.file <= MAX_GROWTH * self.file + NAMES_ALLOWANCE


def measure_file(source: str | os.PathLike[str]) -> int:
    """Return the bytes of a file, or of the weights and the config of a PEFT folder.

    A folder without either counts as 0. A file that is not there raises `FileNotFoundError`.
    """
    path = Path(source)
    if path.is_dir():
        return sum((path / name).stat().st_size for name in (WEIGHTS, CONFIG) if (path / name).is_file())
    return path.stat().st_size


def estimate_file_size(tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> int:
    """Estimate the bytes of a safetensors file with these tensors and this header.

    Exact but for a few bytes per tensor, since the header's JSON is not built.
    """
    names = sum(len(key) + 70 for key in tensors) + sum(len(key) + len(value) for key, value in header.items())
    return sum(tensor.nbytes for tensor in tensors.values()) + names + HEADER_ALLOWANCE


def format_bytes(size: float) -> str:
    """Format a number of bytes with three digits: "1.23 GB", "45.6 MB", "7 kB", "89 bytes".

    Units are powers of 1000.
    """
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if size >= unit:
            return f"{size / unit:.3g} {name}"
    return f"{size:.0f} bytes"


def format_growth(before: float, after: float) -> str:
    """Format the change from one size to another: "+12%", or "5 times as large".

    "from nothing" where the first is 0.
    """
    if after > 3 * before:
        return f"{after / before:,.0f} times as large"
    return f"{after / before - 1:+.0%}" if before else "from nothing"


def check_growth(before: FileSize, after: FileSize, why: Iterable[str], about: str = "") -> None:
    """Raise `GrowthError` if a file would grow by more than `before` allows.

    Args:
        why: What happened to its layers, for the message.
        about: What to put before the size, such as "more than " for an estimate.
    """
    if before.allows(after):
        return
    one, other, what = before.tensors, after.tensors, "tensors"
    if other <= MAX_GROWTH * one:
        one, other, what = before.file, after.file, "file"
    became = "; ".join(dict.fromkeys(why))
    raise GrowthError(
        f"its {what} would grow from {format_bytes(one)} to {about}{format_bytes(other)} ({format_growth(one, other)})"
        + (f": {became:.300}" if became else "")
    )


def describe_widening(tensors: Mapping[str, Tensor], before: Mapping[str, Tensor]) -> str:
    """Return what to say about tensors with a wider precision than any in the source.

    "" if there are none. Conversions widen tensors only where the values would not be exact otherwise.
    """
    widest = max((t.itemsize for t in before.values() if t.is_floating_point() and t.dim()), default=8)
    wide = sum(t.is_floating_point() and t.dim() > 0 and t.itemsize > widest for t in tensors.values())
    if not wide:
        return ""
    return f"{wide} tensors need float32 to hold the scale or what was multiplied in exactly; --dtype rounds them"


class SampledGroup(NamedTuple):
    """Layers that become one or several layers of another naming together, standing for all groups like it."""

    alike: int
    """How many such groups there are."""
    bundle: Bundle


def sample_groups(bundle: Bundle, layout: NamedLayout, naming: str) -> Iterator[SampledGroup]:
    """Yield one group of layers of each kind, which together represent all of a bundle.

    Groups are of the same kind if their names differ only in numbers and their adapters have the same shapes.
    Converting the samples is enough to predict the size of the whole.
    """
    groups: dict[str, dict[str, Stack]] = {}
    holder = _map_holders(layout, naming)
    spans = layout.find_spans(layout.naming)
    for layer, stack in bundle.entries.items():
        first = spans.get(layer, Span((layer,))).parts[0]
        groups.setdefault(holder.get(first, first), {})[layer] = stack
    counts = Counter(map(_make_signature, groups.values()))
    for entries in {_make_signature(own): own for own in groups.values()}.values():
        yield SampledGroup(
            counts[_make_signature(entries)], Bundle(entries, bundle.metadata, bundle.base, bundle.report)
        )


def _map_holders(layout: NamedLayout, naming: str) -> dict[str, str]:
    """Layer of diffusers → what holds it in a naming."""
    if layout.architecture is None:
        return {}
    return {part: name for name, span in layout.find_spans(naming).items() for part in span.parts}


def _make_signature(entries: Mapping[str, Stack]) -> tuple[object, ...]:
    """What groups have in common that become as large."""
    return tuple(
        (re.sub(r"\d+", "*", layer), *((e.algorithm.name, e.geometry.shape, _describe_tensors(e)) for e in stack))
        for layer, stack in entries.items()
    )


def _describe_tensors(entry: Entry) -> tuple[object, ...]:
    return tuple((name, tuple(tensor.shape), tensor.dtype) for name, tensor in entry.tensors.items())


def count_stack_bytes(entries: Mapping[str, Stack], dtype: torch.dtype | None = None) -> int:
    """Return the bytes of the tensors of some layers.

    With `dtype`, as if all tensors had that one.
    """
    tensors = (tensor for stack in entries.values() for entry in stack for tensor in entry.tensors.values())
    return sum(t.nbytes if dtype is None else t.numel() * dtype.itemsize for t in tensors)


def count_forms(shapes: Mapping[str, tuple[int, ...]], dialect: Dialect) -> Counter[str]:
    """Count the layers of a file by form, such as "lora of rank 4".

    `shapes` are by name in the file, which is of that dialect. Names of other dialects are ignored.
    """
    layers: dict[tuple[str, str], dict[str, tuple[int, ...]]] = {}
    for name, shape in shapes.items():
        key = dialect.split(name)
        if key is not None:
            layers.setdefault((key.prefix, key.layer), {})[key.suffix] = shape
    return Counter(map(_name_form, layers.values()))


def _name_form(tensors: Mapping[str, tuple[int, ...]]) -> str:
    plain = tensors.keys() - {"alpha", "dora_scale", "lora_magnitude_vector"}
    # A change of the bias next to another algorithm.
    main = plain - {"diff_b", "lora_up.bias"} or plain
    kind = next((each.name for each in match_algorithms({name: tensors[name] for name in main})), "other")
    magnitude = "dora over " if plain != tensors.keys() - {"alpha"} else ""
    rank = next((tensors[name][0] for name in RANK_TENSORS if tensors.get(name)), None)
    return f"{magnitude}{kind}" + ("" if rank is None else f" of rank {rank}")


def drop_unused_ranks(entry: Entry) -> Entry:
    """Return an adapter without ranks whose factors are zero; exact.

    Splitting a fused layer leaves such ranks behind: those that only other parts of it used. LoRA and LoHa only;
    anything else, and an adapter without any rank in use, is returned as it is.
    """
    own = unwrap_dora(entry.algorithm)
    pairs = _FACTOR_PAIRS.get(type(own), {})
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
