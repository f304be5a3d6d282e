"""Predict the LoKr that diffusers (0.42) makes of a file from the shapes of all its tensors."""

from __future__ import annotations

from lycoris.adapters.bundle import Bundle
from lycoris.adapters.load_report import some
from lycoris.algorithms import LoKr
from lycoris.algorithms.base import Entry
from lycoris.algorithms.dora import unwrap_dora
from lycoris.files.peft.factors import factorize_like_peft


def explain_lokr_conflict(bundle: Bundle) -> str:
    """Return why diffusers rejects these LoKr as a whole, or "" if it does not.

    It looks for one decompose_factor for all layers (`_create_lokr_config`), and PEFT then makes factors that must have
    the file's shapes.
    """
    layers = {path: stack[0] for path, stack in bundle.entries.items() if _is_lokr(stack[0])}
    if not layers:
        return ""
    sizes = {path: _measure_factors(entry) for path, entry in layers.items()}
    tried = [*sorted({ol for ol, *_ in sizes.values()}), -1]
    if not any(all(_is_factored(size, factor) for size in sizes.values()) for factor in tried):
        return "diffusers rejects the file, for it finds no decompose_factor that makes the shapes of all LoKr in it"
    both = any("w1_a" in entry.tensors for entry in layers.values())
    other = [
        path
        for path, entry in layers.items()
        if _predict_unsplit(entry, sizes[path], both=both) != _find_unsplit(entry)
    ]
    return f"diffusers rejects the file, for PEFT makes LoKr of other shapes for {some(sorted(other))}" if other else ""


def _is_lokr(entry: Entry) -> bool:
    return isinstance(unwrap_dora(entry.algorithm), LoKr)


def _measure_factors(entry: Entry) -> tuple[int, int, int, int]:
    """Rows and columns of w1 and w2."""
    lokr, g = unwrap_dora(entry.algorithm), entry.geometry
    assert isinstance(lokr, LoKr)
    ol, im, *_ = lokr.layout_for(g)
    return ol, im, g.out_features // ol, g.in_features // im


def _is_factored(size: tuple[int, int, int, int], factor: int) -> bool:
    ol, im, ok, inner = size
    return (factorize_like_peft(ol * ok, factor), factorize_like_peft(im * inner, factor)) == ((ol, ok), (im, inner))


def _find_unsplit(entry: Entry) -> tuple[bool, bool]:
    """Whether w1 and w2 are whole."""
    return "w1" in entry.tensors, "w2" in entry.tensors


def _predict_unsplit(entry: Entry, size: tuple[int, int, int, int], *, both: bool) -> tuple[bool, bool]:
    """The same of what PEFT makes with the rank that diffusers finds."""
    t, (ol, im, ok, inner) = entry.tensors, size
    split = "w2_a" if "w2_a" in t else "w1_a" if "w1_a" in t else ""
    rank = t[split].shape[1] if split else max(t["w2"].shape)
    return not (both and rank < max(ol, im) / 2), not rank < max(ok, inner) / 2
