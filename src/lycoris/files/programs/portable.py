"""Rewrite a layer's adapter in a form that a program evaluates as trained.

All rewrites are exact. Which one a program needs is in its table in `lycoris.files.programs`. Those that depend on the
base weight need it as `base`.

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
    """Return an adapter in a form that a program evaluates as trained, and what was done to it.

    Args:
        program: A name in `PROGRAMS`.
        base: The weight below, for rewrites that depend on it.
        dialect: What it is written as; None: the program's preferred dialect.
        architecture: What it is for; None: not known.

    Returns:
        The adapter, and a description: "nothing" if it is in such a form already.

    Raises:
        FileError: The program is unknown, or no such form is known.
        PlanError: The rewrite needs `base`.
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
    """Return all that a file has for a layer in a form that a program evaluates as trained.

    That is an algorithm with changes of its bias, or sparse changes of the weight, next to it. Arguments, result and
    exceptions as for `make_portable`, and:

    Args:
        key: What the file calls the layer; "" for unknown.
        place: How the program's model stores the layer.
        model: The known model that it is taken to belong to; "" for unknown.
    """
    if program not in PROGRAMS:
        raise FileError(unknown("program", program, PROGRAMS))
    done: dict[Remedy, str] = {}
    # Only this library reads sparse changes of the weight next to another algorithm.
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
    """Return an algorithm and the changes next to it as one difference of weight and bias.

    Raises `PlanError` if it depends on the base weight and `base` is None.
    """
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
    """Return an adapter as a LoRA if that has fewer parameters, else as a dense difference.

    Raises `PlanError` if it depends on the base weight and `base` is None.
    """
    return low_rank(entry, base) or dense(entry, base)


def convert_to_lora(entry: Entry, base: Affine | None = None) -> Entry:
    """Return an adapter as a LoRA, if need be of the weight's full rank: ΔW times an identity.

    Raises `FileError` if the adapter changes the bias.
    """
    g = entry.geometry
    full = min(g.out_features, g.fan_in)
    thin = low_rank(entry, base, always=True)
    if thin is not None and isinstance(thin.algorithm, LoRA) and thin.algorithm.rank <= full:
        return thin
    dense_entry = dense(entry, base)
    if dense_entry.tensors.keys() != {"diff"}:
        raise FileError(f"{entry.algorithm.name} on a {g} changes more than the weight, and LoRA cannot")
    diff = g.transpose_stored(dense_entry.tensors["diff"])
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
    """Return a LoRA with its Tucker core multiplied into `down`, under DoRA as well.

    An adapter without a core is returned as it is.
    """
    lora, p = _unwrap_dora(entry, LoRA)
    if "mid" not in p:
        return entry
    p["down"] = tucker(widen(p.pop("mid")), None, widen(p["down"]).flatten(1))
    return _rewrap_dora(entry, replace(lora, tucker=False), p)


def flatten_w2(entry: Entry, base: Affine | None = None) -> Entry:
    """Return a LoKr with w2 as a product (ok, r)·(r, in·ΠK), which every program lays out alike, under DoRA as well.

    A core is multiplied into the second factor at the same rank; an unsplit w2 becomes the product of an identity and
    itself.
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
    """Return a LoKr with w1 multiplied out, under DoRA as well.

    If w2 is unsplit too, the scale goes into w1, since there is no rank left that alpha would be divided by.
    """
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
    """Return a rotation with its limit applied to the blocks and removed.

    Raises `FileError` for other algorithms.
    """
    oft, p = entry.algorithm, dict(entry.tensors)
    if not isinstance(oft, OFT):
        raise FileError(f"{oft.name} has no limit; only rotations have one")
    bound = oft.constraint * entry.geometry.out_features
    blocks = widen(p["blocks"])
    stacked = entry.geometry.stack > 0
    p["blocks"] = torch.stack([limit_norm(each, bound) for each in blocks]) if stacked else limit_norm(blocks, bound)
    return entry._replace(algorithm=replace(oft, constraint=0.0), tensors=p)


def complete_norm(entry: Entry, base: Affine | None = None) -> Entry:
    """Return a norm's scale with a shift of zeros next to it.

    Reading the result does not need a shift in the layer.
    """
    p = dict(entry.tensors)
    p.setdefault("b", torch.zeros_like(p["w"]))
    return entry._replace(geometry=replace(entry.geometry, has_bias=True), tensors=p)


def complete_diff(entry: Entry, base: Affine | None = None) -> Entry:
    """Return a change of the bias with a change of the weight by zeros next to it.

    The change of the weight has the dtype and the device of that of the bias. Nothing of `entry` is changed.

    Args:
        base: not used; exports take it.
    """
    g, p = entry.geometry, dict(entry.tensors)
    p.setdefault("diff", p["diff_b"].new_zeros(g.stacked_shape(g.stored_shape)))
    return entry._replace(algorithm=Full(), tensors=p)


class Export(NamedTuple):
    """A way to write an adapter in another form: what it does, in words, and the function that does it.

    `convert` takes the entry and the base weight, None where it is not known, and leaves both as they are.
    """

    description: str
    convert: Callable[[Entry, Affine | None], Entry]


EXPORTS: Mapping[Remedy, Export] = MappingProxyType(
    {
        "smaller": Export("written as a LoRA where that is smaller, else as the dense difference", convert_to_smaller),
        "dense": Export("written as the dense difference", dense),
        "lora": Export("written as a LoRA", convert_to_lora),
        "no core": Export("its core multiplied into lora_down", multiply_out_core),
        "flat w2": Export("its w2 written as a product of two matrices", flatten_w2),
        "unsplit w1": Export("its w1 multiplied out", multiply_out_w1),
        "unlimited": Export("its constraint applied to the rotations", apply_limit),
        "both norms": Export("w_norm and b_norm both written, zeros for the one that was not there", complete_norm),
        "both diffs": Export("a diff of zeros put next to diff_b", complete_diff),
        "joined": Export("written with what is next to it as one dense difference", dense),
        # Reading a file has these already.
        "rewritten": Export("written as such adapters are today", lambda entry, base: entry),
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
    """The entry with another algorithm and other tensors, under DoRA again if it was."""
    wrapped: Algorithm = replace(entry.algorithm, inner=algorithm) if isinstance(entry.algorithm, DoRA) else algorithm
    return Entry(wrapped, entry.geometry, p)
