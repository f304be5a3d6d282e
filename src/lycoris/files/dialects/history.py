"""Correct the scale of files whose writer is known to have stored another one than was trained."""

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

SCALES_KEY = "lycoris_scale"
"""Header key under which this library writes the scale of every adapter: such a file means what it says."""

DYLORA_BLOCK = 4
"""The block size of lycoris-lora where its settings name none."""


def restore_trained_scale(
    stack: tuple[Entry, ...], layer: str, parts: int, dialect: Dialect, header: Mapping[str, str]
) -> tuple[tuple[Entry, ...], str]:
    """Return a layer's stack at the scale that was trained, and a note on what was changed.

    Two cases, both recognized by the settings in the header: DyLoRA of lycoris-lora, trained at `block_size` times the
    stored scale, and `split_qkv` of sd-scripts, whose parts were trained as separate adapters. Files with `SCALES_KEY`
    in the header are right already.

    Args:
        layer: The name of the layer, for messages.
        parts: How many layers of diffusers the one in the file holds.

    Returns:
        The stack, and the note, "" if nothing was changed.
    """
    entry = stack[0]
    if SCALES_KEY in header or not isinstance(entry.algorithm, LoRA):
        return stack, ""
    alpha, rank = entry.algorithm.export_alpha(entry.geometry), entry.algorithm.rank
    assert alpha is not None
    settings = settings_of(header)
    if _normalize_setting(settings.get("algo")) == "dylora":
        block = _parse_block_size(settings.get("block_size"), rank, layer)
        note = f"its DyLoRA was trained at {block} times the stored scale, and is read at that"
        return _set_alpha(stack, alpha * block), note
    apart = parts > 1 and rank % parts == 0 and _is_block_diagonal(entry.tensors["up"], parts)
    if apart and _normalize_setting(settings.get("split_qkv")) == "true":
        note = f"its rows were trained as {parts} adapters of rank {rank // parts}, and are read that way"
        return _set_alpha(stack, alpha * parts), note
    return stack, ""


def _set_alpha(stack: tuple[Entry, ...], alpha: float) -> tuple[Entry, ...]:
    first = stack[0]
    assert isinstance(first.algorithm, LoRA)
    return (first._replace(algorithm=replace(first.algorithm, alpha=alpha, rs_lora=False)), *stack[1:])


def _is_block_diagonal(up: Tensor, parts: int) -> bool:
    """Whether each part of the rows has ranks of its own, all with something in them."""
    rank = up.shape[1] // parts
    used = up.flatten(1).ne(0)
    columns = [used[:, at * rank : (at + 1) * rank].any(dim=1).nonzero().flatten() for at in range(parts)]
    if any(not len(rows) for rows in columns):
        return False
    return all(int(a.max()) < int(b.min()) for a, b in pairwise(columns))


def _parse_block_size(value: Any, rank: int, layer: str) -> int:
    """Raises `FileError` for what is no number of ranks: the scale hangs on it."""
    text = _normalize_setting(DYLORA_BLOCK if value is None else value)
    if not text.isdecimal() or not 1 <= int(text[:9]) <= rank:
        raise FileError(
            f"{layer} is a DyLoRA of rank {rank} and block_size {text:.40}, as its header says; 1 to {rank} is expected"
        )
    return int(text)


def _normalize_setting(value: Any) -> str:
    return str(value).strip().lower()
