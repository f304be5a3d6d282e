"""What programs have written that does not mean what was trained, put right where the file says who wrote it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from typing import Any

from torch import Tensor

from lycoris.algorithms import LoRA
from lycoris.algorithms.base import Entry
from lycoris.errors import FileError
from lycoris.files.dialects.base import Dialect
from lycoris.targeting.recipe import settings_of

SCALES = "lycoris_scale"
"""Header key under which this library writes the scale of every adapter: such a file means what it says."""

DYLORA_BLOCK = 4
"""The block size of lycoris-lora where its settings name none."""


def as_trained(
    stack: tuple[Entry, ...], layer: str, parts: int, dialect: Dialect, header: Mapping[str, str]
) -> tuple[tuple[Entry, ...], str]:
    """A layer's stack at the scale that was trained, and what was changed for it.

    `parts` is how many layers of diffusers the one in the file holds.
    """
    entry = stack[0]
    if SCALES in header or not isinstance(entry.algorithm, LoRA):
        return stack, ""
    alpha, rank = entry.algorithm.export_alpha(entry.geometry), entry.algorithm.rank
    assert alpha is not None
    settings = settings_of(header)
    if _text(settings.get("algo")) == "dylora":
        block = _block(settings.get("block_size"), rank, layer)
        told = f"its DyLoRA was trained at {block} times the scale that it says, and is read so"
        return _with_alpha(stack, alpha * block), told
    apart = parts > 1 and rank % parts == 0 and _block_diagonal(entry.tensors["up"], parts)
    if apart and _text(settings.get("split_qkv")) == "true":
        told = f"its rows were trained as {parts} adapters of rank {rank // parts}, and are read so"
        return _with_alpha(stack, alpha * parts), told
    return stack, ""


def _with_alpha(stack: tuple[Entry, ...], alpha: float) -> tuple[Entry, ...]:
    first = stack[0]
    assert isinstance(first.algorithm, LoRA)
    return (first._replace(algorithm=replace(first.algorithm, alpha=alpha, rs_lora=False)), *stack[1:])


def _block_diagonal(up: Tensor, parts: int) -> bool:
    """Whether each part of the rows has ranks of its own, all with something in them."""
    rank = up.shape[1] // parts
    used = up.flatten(1).ne(0)
    columns = [used[:, at * rank : (at + 1) * rank].any(dim=1).nonzero().flatten() for at in range(parts)]
    if any(not len(rows) for rows in columns):
        return False
    return all(int(a.max()) < int(b.min()) for a, b in pairwise(columns))


def _block(told: Any, rank: int, layer: str) -> int:
    """Raises `FileError` for what is no number of ranks: the scale hangs on it."""
    text = _text(DYLORA_BLOCK if told is None else told)
    if not text.isdecimal() or not 1 <= int(text[:9]) <= rank:
        raise FileError(
            f"{layer} is a DyLoRA of rank {rank} and block_size {text:.40}, as its header says; 1 to {rank} is expected"
        )
    return int(text)


def _text(value: Any) -> str:
    return str(value).strip().lower()
