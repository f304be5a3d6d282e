"""Exports: a layer's adapter in a form that a program evaluates as trained.

All are exact. Which one a program needs says its table in `lycoris.files.programs`. Those that depend on the weight
below are tied to it, and need it as `base`.

Legend: O out features, I in features per group, K kernel dimensions; LoKr's w1 is (ol, im), its w2 (ok, in, *K).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from lycoris.algorithms import OFT, DoRA, Full, LoKr, LoRA, Norm
from lycoris.algorithms.additive import Additive
from lycoris.algorithms.base import Algorithm, Entry
from lycoris.algorithms.conversion import dense, low_rank
from lycoris.algorithms.dora import unwrap_dora
from lycoris.algorithms.lokr import FactorSizes
from lycoris.errors import FileError, unknown
from lycoris.files.placing import Stack
from lycoris.files.programs import PROGRAMS, LayerPlace, Remedy
from lycoris.layers.geometry import Affine
from lycoris.ops.rotation import limit_norm
from lycoris.ops.rounding import widen
from lycoris.ops.tucker import tucker

RankedAlgorithm = TypeVar("RankedAlgorithm", LoRA, LoKr)


def make_portable(
    entry: Entry,
    program: str,
    base: Affine | None = None,
    *,
    dialect: str | None = None,
    architecture: str | None = None,
) -> tuple[Entry, str]:
    """The adapter as a program evaluates it as trained, and what was done to it ("nothing" where it is so already).

    `dialect` and `architecture` are what it is written as and for; see `Program.verdict`.

    Raises `FileError` for an unknown program and where no export is known, `PlanError` where one needs `base`.
    """
    (made, *_), what = make_stack_portable((entry,), program, base, dialect=dialect, architecture=architecture)
    return made, what


def make_stack_portable(
    stack: Stack,
    program: str,
    base: Affine | None = None,
    *,
    dialect: str | None = None,
    architecture: str | None = None,
    key: str = "",
    place: LayerPlace = "",
    model: str = "",
) -> tuple[Stack, str]:
    """The same of all that a file has for a layer: an algorithm, and changes of its bias or of single places beside it.

    `key` is what the file calls the layer, `place` how the program's model holds it, `model` the known model that it is
    taken to be of.
    """
    if program not in PROGRAMS:
        raise FileError(unknown("program", program, PROGRAMS))
    done: dict[Remedy, str] = {}
    # Nothing but this library reads places of the weight that are beside another algorithm.
    if any(isinstance(each.algorithm, Full) and each.algorithm.weight for each in stack[1:]):
        stack, done["joined"] = join_changes(stack, base), EXPORTS["joined"].description
    while True:
        first, *beside = stack
        verdict = PROGRAMS[program].judge(
            *(first, base),
            beside=tuple(beside),
            dialect=dialect,
            architecture=architecture,
            key=key,
            place=place,
            model=model,
        )
        if verdict.reads == "as trained":
            return stack, ", then ".join(done.values()) or "nothing"
        if verdict.remedy is None or verdict.remedy in done:
            name, g = first.algorithm.name, first.geometry
            raise FileError(f"{verdict.why}; no export of {name} on a {g} is known that it reads as trained")
        export = EXPORTS[verdict.remedy]
        done[verdict.remedy] = export.description
        stack = join_changes(stack, base) if verdict.remedy == "joined" else (export.convert(first, base), *beside)


def join_changes(stack: Stack, base: Affine | None = None) -> Stack:
    """An algorithm and the changes beside it as one difference of the weight and the bias."""
    g, tensors = stack[0].geometry, dict[str, Tensor]()
    parts = [dense(entry, base) for entry in stack]
    norms = {"diff": "w", "diff_b": "b"} if any(isinstance(part.algorithm, Norm) for part in parts) else {}
    for part in parts:
        for own, tensor in part.tensors.items():
            name = norms.get(own, own)
            tensors[name] = (
                widen(tensors[name]) + widen(tensor.reshape(tensors[name].shape)) if name in tensors else tensor
            )
    if norms:
        return (Entry(Norm(), g, tensors),)
    return (Entry(Full(weight="diff" in tensors, bias="diff_b" in tensors), g, tensors),)


def convert_to_smaller(entry: Entry, base: Affine | None = None) -> Entry:
    """LoRA where that holds fewer numbers, else the difference stored whole."""
    return low_rank(entry, base) or dense(entry, base)


def convert_to_lora(entry: Entry, base: Affine | None = None) -> Entry:
    """LoRA, if need be of the weight's full rank: ΔW times an identity.

    Raises `FileError` when the adapter changes the bias.
    """
    g = entry.geometry
    full = min(g.out_features, g.fan_in)
    thin = low_rank(entry, base, always=True)
    if thin is not None and isinstance(thin.algorithm, LoRA) and thin.algorithm.rank <= full:
        return thin
    whole = dense(entry, base)
    if whole.tensors.keys() != {"diff"}:
        raise FileError(f"{entry.algorithm.name} on a {g} changes more than the weight, and LoRA cannot")
    diff = g.transpose_stored(whole.tensors["diff"])
    ones = (1,) * len(g.kernel)
    eye = torch.eye(full, dtype=diff.dtype, device=diff.device)
    eye = eye.expand(g.stacked_shape((full, full)))
    if g.out_features <= g.fan_in:
        up, down = eye.reshape(*g.stacked_shape((full, full)), *ones), diff
    else:
        up = diff.reshape(*g.stacked_shape((g.out_features, full)), *ones)
        down = eye.reshape(g.stacked_shape((full, *g.shape[1:])))
    return Entry(LoRA(rank=full), g, {"up": up, "down": down})


def multiply_out_core(entry: Entry, base: Affine | None = None) -> Entry:
    """LoRA with its Tucker core multiplied into `down`; under DoRA too."""
    lora, p = _unwrap_dora(entry, LoRA)
    if "mid" not in p:
        return entry
    p["down"] = tucker(widen(p.pop("mid")), None, widen(p["down"]).flatten(1))
    return _rewrap_dora(entry, replace(lora, tucker=False), p)


def flatten_w2(entry: Entry, base: Affine | None = None) -> Entry:
    """LoKr with w2 as a product of two matrices (ok, r)·(r, in·ΠK), which every program lays out alike; under DoRA too.

    A core is multiplied into its second factor, at the same rank; a whole w2 is an identity and itself.
    """
    lokr, p = _unwrap_dora(entry, LoKr)
    g = entry.geometry
    layout, scale = lokr.layout_for(g), lokr.scale(g)
    if "t2" in p:
        p["w2_b"] = tucker(widen(p.pop("t2")), None, widen(p["w2_b"])).flatten(1)
        p["w2_a"] = p["w2_a"].mT.contiguous()
        return _rewrap_dora(entry, replace(lokr, tucker=False), p)
    if "w2" not in p:
        return entry
    if "w1_a" in p:
        p["w1"] = widen(p.pop("w1_a")) @ widen(p.pop("w1_b"))
    w2 = p.pop("w2").flatten(2 if g.stack else 1)
    rows, columns = w2.shape[-2:]
    rank = min(rows, columns)
    eye = torch.eye(rank, dtype=w2.dtype, device=w2.device).expand(g.stacked_shape((rank, rank))).contiguous()
    p["w2_a"], p["w2_b"] = (eye, w2) if rows <= columns else (w2, eye)
    flat = replace(
        lokr, rank=rank, alpha=scale * rank, rs_lora=False, layout=FactorSizes(layout.ol, layout.im, False, True)
    )
    return _rewrap_dora(entry, flat, p)


def multiply_out_w1(entry: Entry, base: Affine | None = None) -> Entry:
    """LoKr with w1 multiplied out, and with it the scale where w2 is whole too; under DoRA too."""
    lokr, p = _unwrap_dora(entry, LoKr)
    g = entry.geometry
    layout, scale = lokr.layout_for(g), lokr.scale(g)
    if "w1_a" not in p:
        return entry
    p["w1"] = widen(p.pop("w1_a")) @ widen(p.pop("w1_b"))
    if not layout.w2_split:
        p["w1"] = p["w1"] * scale
    return _rewrap_dora(entry, replace(lokr, layout=layout._replace(w1_split=False)), p)


def apply_limit(entry: Entry, base: Affine | None = None) -> Entry:
    """Rotations with their limit applied to the blocks, all of them together."""
    oft, p = entry.algorithm, dict(entry.tensors)
    if not isinstance(oft, OFT):
        raise FileError(f"{oft.name} has no limit; only rotations have one")
    bound = oft.constraint * entry.geometry.out_features
    blocks = widen(p["blocks"])
    stacked = entry.geometry.stack > 0
    p["blocks"] = torch.stack([limit_norm(each, bound) for each in blocks]) if stacked else limit_norm(blocks, bound)
    return entry._replace(algorithm=replace(oft, constraint=0.0), tensors=p)


def complete_norm(entry: Entry, base: Affine | None = None) -> Entry:
    """A norm's scale with a shift of zeros beside it. Reading it again needs no shift in the layer."""
    p = dict(entry.tensors)
    p.setdefault("b", torch.zeros_like(p["w"]))
    return entry._replace(geometry=replace(entry.geometry, has_bias=True), tensors=p)


def complete_diff(entry: Entry, base: Affine | None = None) -> Entry:
    """A change of the bias with a change of the weight by zeros beside it."""
    g, p = entry.geometry, dict(entry.tensors)
    p.setdefault("diff", p["diff_b"].new_zeros(g.stacked_shape(g.stored_shape)))
    return entry._replace(algorithm=Full(), tensors=p)


class Export(NamedTuple):
    """A way to write an adapter otherwise."""

    description: str
    convert: Callable[[Entry, Affine | None], Entry]


EXPORTS: Mapping[Remedy, Export] = MappingProxyType(
    {
        "plain": Export(
            "written as a LoRA where that is smaller, else as the difference stored whole", convert_to_smaller
        ),
        "dense": Export("written as the difference stored whole", dense),
        "lora": Export("written as a LoRA", convert_to_lora),
        "no core": Export("its core multiplied into lora_down", multiply_out_core),
        "flat w2": Export("its w2 written as a product of two matrices", flatten_w2),
        "whole w1": Export("its w1 multiplied out", multiply_out_w1),
        "unlimited": Export("its constraint applied to the rotations", apply_limit),
        "both norms": Export("w_norm and b_norm both written, zeros for the one that was not there", complete_norm),
        "both diffs": Export("a diff of zeros put beside diff_b", complete_diff),
        "joined": Export("written with what is beside it as one difference stored whole", dense),
        # Reading a file has these already.
        "anew": Export("written as such adapters are today", lambda entry, base: entry),
        "scale": Export("written with the scale that was trained", lambda entry, base: entry),
        "format": Export("written in a format whose names it knows", lambda entry, base: entry),
    }
)


def _unwrap_dora(entry: Entry, kind: type[RankedAlgorithm]) -> tuple[RankedAlgorithm, dict[str, Tensor]]:
    """The algorithm itself, or what DoRA is over, with its scalar folded in."""
    algorithm = unwrap_dora(entry.algorithm)
    if not isinstance(algorithm, kind):
        raise FileError(f"this export is for {kind.name}, not for {algorithm.name}")
    p = dict(entry.tensors)
    if "scalar" in p:
        p = algorithm.export_tensors({name: widen(tensor) for name, tensor in p.items()}, entry.geometry)
    return replace(algorithm, use_scalar=False), p


def _rewrap_dora(entry: Entry, algorithm: Additive, p: dict[str, Tensor]) -> Entry:
    """The same entry with other tensors, under its lengths again if it had them."""
    whole: Algorithm = replace(entry.algorithm, inner=algorithm) if isinstance(entry.algorithm, DoRA) else algorithm
    return Entry(whole, entry.geometry, p)
