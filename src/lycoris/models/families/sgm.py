"""The names that Stable Diffusion's own code gives to the parts of its UNet.

There the blocks of all levels are numbered through: a level is R residual blocks and one place for what changes the
resolution, so input block n is level (n - 1) // (R + 1), output block n is level n // (R + 1).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from lycoris.models.families.naming import Rename, Span, Table

RESIDUAL_NAMES: Mapping[str, str] = MappingProxyType(
    {
        "in_layers.0": "norm1",
        "in_layers.2": "conv1",
        "emb_layers.1": "time_emb_proj",
        "out_layers.0": "norm2",
        "out_layers.3": "conv2",
        "skip_connection": "conv_shortcut",
    }
)
"""Inside a residual block, there → in diffusers. Attention blocks have the same names in both."""
RESIDUAL_NAMES_BACK: Mapping[str, str] = MappingProxyType({here: there for there, here in RESIDUAL_NAMES.items()})

OUTER_LAYERS = Table(
    (
        Rename("input_blocks.0.0", "conv_in"),
        Rename("time_embed.0", "time_embedding.linear_1"),
        Rename("time_embed.2", "time_embedding.linear_2"),
        Rename("label_emb.0.0", "add_embedding.linear_1"),
        Rename("label_emb.0.2", "add_embedding.linear_2"),
        Rename("middle_block.1", "mid_block.attentions.0"),
        Rename("out.0", "conv_norm_out"),
        Rename("out.2", "conv_out"),
    )
)

_SGM_BLOCK = re.compile(r"(input_blocks|output_blocks)\.(\d+)\.(\d+)(?:\.(.+))?")
_SGM_MIDDLE = re.compile(r"middle_block\.([02])(?:\.(.+))?")
_DIFFUSERS_LEVEL = re.compile(
    r"(down_blocks|up_blocks)\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)(?:\.(.+))?"
)
_DIFFUSERS_MIDDLE = re.compile(r"mid_block\.resnets\.([01])(?:\.(.+))?")


@dataclass(frozen=True)
class UNet:
    """The naming of a UNet in Stable Diffusion's own code, where blocks of all levels are numbered consecutively."""

    levels_without_attention: frozenset[int] = frozenset()
    """Up levels of diffusers without attention: their upsampler has the place that attention has in others."""
    residuals: int = 2
    """R, residual blocks in a level."""

    def find_span(self, name: str) -> Span | None:
        around = OUTER_LAYERS.find_span(name)
        if around is not None:
            return around
        if found := _SGM_MIDDLE.fullmatch(name):
            at, rest = found.groups()
            return _name_residual(f"mid_block.resnets.{int(at) // 2}", RESIDUAL_NAMES, rest)
        found = _SGM_BLOCK.fullmatch(name)
        if found is None:
            return None
        side, number, place, rest = found[1], int(found[2]), int(found[3]), found[4]
        down = side == "input_blocks"
        level, i = divmod(number - 1 if down else number, self.residuals + 1)
        if down and i == self.residuals:
            return Span((f"down_blocks.{level}.downsamplers.0.conv",)) if (place, rest) == (0, "op") else None
        if not down and place and rest == "conv":
            return Span((f"up_blocks.{level}.upsamplers.0.conv",))
        where = f"{'down' if down else 'up'}_blocks.{level}"
        if place == 0:
            return _name_residual(f"{where}.resnets.{i}", RESIDUAL_NAMES, rest)
        return Span((_join_path(f"{where}.attentions.{i}", rest),)) if place == 1 else None

    def find_module(self, path: str) -> str | None:
        around = OUTER_LAYERS.find_module(path)
        if around is not None:
            return around
        if found := _DIFFUSERS_MIDDLE.fullmatch(path):
            at, rest = found.groups()
            return _only_part(_name_residual(f"middle_block.{int(at) * 2}", RESIDUAL_NAMES_BACK, rest))
        found = _DIFFUSERS_LEVEL.fullmatch(path)
        if found is None:
            return None
        side, level, what, i, rest = found[1], int(found[2]), found[3], int(found[4]), found[5]
        start = level * (self.residuals + 1) + (side == "down_blocks")
        side = "input_blocks" if side == "down_blocks" else "output_blocks"
        if what == "downsamplers":
            return f"{side}.{start + self.residuals}.0.op" if rest == "conv" else None
        if what == "upsamplers":
            place = 1 if level in self.levels_without_attention else 2
            return f"{side}.{start + self.residuals}.{place}.conv" if rest == "conv" else None
        if what == "resnets":
            return _only_part(_name_residual(f"{side}.{start + i}.0", RESIDUAL_NAMES_BACK, rest))
        return _join_path(f"{side}.{start + i}.1", rest)

    def split_rows(self, name: str, rows: int, columns: int) -> tuple[int, ...]:
        return (rows,)


def _name_residual(where: str, names: Mapping[str, str], rest: str | None) -> Span | None:
    """A residual block, or a part of it by its other name."""
    if rest is not None and rest not in names:
        return None
    return Span((_join_path(where, None if rest is None else names[rest]),))


def _join_path(where: str, rest: str | None) -> str:
    return where if rest is None else f"{where}.{rest}"


def _only_part(span: Span | None) -> str | None:
    return None if span is None else span.parts[0]
