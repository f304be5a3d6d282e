"""Which entries of a layer's input belong to which sample of a batch, for masks that differ from sample to sample."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from lycoris.errors import ConfigError, unknown

Layout = Literal["first", "second", "repeated", "tiled"]
BatchLayout = Layout | Tensor
"""How B samples lie in an input.

first: axis 0 has one entry for each sample. second: axis 1 has, as in sequence-first models. repeated: axis 0 has n
consecutive entries for each sample, as video models fold frames into the batch. tiled: axis 0 has the batch n times, as
[uncond, cond] batches do. A tensor of integers: the sample of every entry of axis 0 (of axis 1 where axis 0 has one
entry), as for packed sequences.
"""


def check_layout(layout: object) -> None:
    """Check that a value is a `BatchLayout`: one of the names, or a 1-d tensor of integers.

    Raises:
        ConfigError: it is anything else. Whether it fits an input is only known in a pass.
    """
    names = get_args(Layout)
    integers = isinstance(layout, Tensor) and layout.dim() == 1 and not layout.is_floating_point()
    if not integers and not (isinstance(layout, str) and layout in names):
        what = f"a tensor of shape {tuple(layout.shape)}" if isinstance(layout, Tensor) else layout
        raise ConfigError(unknown("batch layout", str(what), names) + ", or a tensor with the sample of every entry")


def place_rows(rows: Tensor, lengths: Sequence[int], layout: BatchLayout | None) -> tuple[int, Tensor]:
    """The axis on which samples lie, and the rows (B, ...) for its entries.

    `lengths` are those of the axes that can hold samples: of the input without its channels. None takes the first axis
    where it has B entries, unless the second of two has B entries too. Raises `ConfigError` where it does not fit.
    """
    samples, first = len(rows), lengths[0] if lengths else 0
    second = lengths[1] if len(lengths) > 1 else 0
    if isinstance(layout, Tensor):
        axis = 1 if first == 1 and second == len(layout) else 0
        if lengths and lengths[axis] == len(layout):
            return axis, rows[layout.to(rows.device)]
    elif layout == "second":
        if second == samples:
            return 1, rows
    elif first == samples and (layout is not None or second != samples or len(lengths) > 2):
        return 0, rows
    elif layout in ("repeated", "tiled") and first and first % samples == 0:
        times = first // samples
        return 0, rows.repeat_interleave(times, dim=0) if layout == "repeated" else torch.cat([rows] * times)
    raise ConfigError(_explain_mismatch(samples, lengths, layout))


def _explain_mismatch(samples: int, lengths: Sequence[int], layout: BatchLayout | None) -> str:
    shape = f"({', '.join(map(str, [*lengths, 'channels']))})"
    if layout is not None:
        given = f"a tensor for {len(layout)} entries" if isinstance(layout, Tensor) else repr(layout)
        return f"the rank masks of {samples} samples do not fit an input {shape} with the batch layout {given}"
    batch = lengths[0] if lengths else 1
    return (
        f"rank masks (timesteps) for {samples} samples do not fit a batch of {batch}: which entries of an input "
        f"{shape} belong to which sample is not known. Set `adapters.rank_masks.batch_layout` to 'first' or "
        "'second' (the axis that holds the samples), 'repeated' (frames folded into the batch), 'tiled' ([uncond, "
        "cond] batches), a tensor with the sample of every entry (packed sequences), or a dict of these by layer path"
    )
