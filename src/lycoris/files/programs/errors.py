"""How far off a program is, as the relative error of the change, where the tensors alone determine it."""

from __future__ import annotations

import torch

from lycoris.files.programs.program import Case


def unscaled_error(case: Case) -> float | None:
    """Return the relative error of the change if its scale is ignored: |1 / scale - 1|.

    None for a scale of 0.
    """
    scale = case.entry.algorithm.scale(case.entry.geometry)
    return abs(1 / scale - 1) if scale else None


def misplacement_error(case: Case) -> float:
    """Return the relative error of ΔW if `kron` pairs the last axes of w1 (ol, im) and w2 (ok, in, *K).

    The result has the right number of elements, so a reshape hides the mistake.
    """
    p = {name: tensor.double() for name, tensor in case.entry.tensors.items()}
    w1 = p["w1"] if "w1" in p else p["w1_a"] @ p["w1_b"]
    right = torch.einsum("ab,cdk->acbdk", w1, p["w2"].flatten(2)).flatten()
    return float((torch.kron(w1, p["w2"]).flatten() - right).norm() / right.norm().clamp_min(1e-30))


def misplaced_alone(case: Case) -> float | None:
    """Return `misplacement_error`, or None under DoRA, where it depends on the base weight.

    For LoKr with a w2 that is not split.
    """
    return None if case.dora else misplacement_error(case)


def bias_share(case: Case) -> float | None:
    """Return the relative error of the change if that of the bias is ignored.

    None unless weight and bias are both stored as full differences.
    """
    t = case.entry.tensors
    if case.extra or "diff" not in t or "diff_b" not in t:
        return None
    bias, total = (float(sum(t[name].double().square().sum() for name in names)) for names in (["diff_b"], t))
    return (bias / total) ** 0.5 if total else None
