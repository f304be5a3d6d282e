"""Conditions of program tables on an adapter and its layer: algorithm, tensors, geometry."""

from __future__ import annotations

import torch

from lycoris.algorithms import IA3
from lycoris.algorithms.conversion import adapt_affine
from lycoris.algorithms.layer_below import BareWeight
from lycoris.algorithms.tensors import ALPHA, MAGNITUDE
from lycoris.files.dialects import DIALECTS
from lycoris.files.programs.errors import misplacement_error
from lycoris.files.programs.program import Case, Condition

ROUNDING_ERROR = 1e-5
"""A relative error up to this is rounding."""


def has_algorithm(*names: str) -> Condition:
    return lambda case: case.name in names


def has_other_algorithm(*names: str) -> Condition:
    return lambda case: case.name not in names


def has_dora(case: Case) -> bool:
    return bool(case.dora)


def has_output_magnitude(case: Case) -> bool:
    """Lengths per output row."""
    return case.dora == "out"


def has_input_magnitude(case: Case) -> bool:
    """Lengths per input column."""
    return case.dora == "in"


def has_input_magnitude_of_one_row(case: Case) -> bool:
    """Lengths per input column of a layer with one output."""
    return has_input_magnitude(case) and case.entry.geometry.out_features == 1


def is_square(case: Case) -> bool:
    """A linear layer with as many inputs as outputs."""
    g = case.entry.geometry
    return g.kind == "linear" and g.out_features == g.in_features


def fits_both_glora_layouts(case: Case) -> bool:
    """GLoRA of as many ranks as inputs and outputs, whose tensors fit its first layout too."""
    g = case.entry.geometry
    return case.name == "glora" and case.entry.tensors["a1"].shape[1] == g.in_features == g.out_features


def has_first_glora_layout(case: Case) -> bool:
    """GLoRA that the file has in its first layout, a1 (r, I) and a2 (I, r), b1 (r, I) and b2 (O, r)."""
    g, shapes = case.entry.geometry, case.stored
    if case.name != "glora" or not shapes:
        return False
    return (shapes["a1.weight"][0], shapes["a2.weight"][1], shapes["b1.weight"][0]) != (
        g.in_features,
        g.in_features,
        g.out_features,
    )


def has_old_rotation(case: Case) -> bool:
    """Rotations themselves in the file, instead of what generates them."""
    return "oft_diag" in case.stored


def has_no_scale(case: Case) -> bool:
    return case.entry.algorithm.scale(case.entry.geometry) == 1


def has_scale_tensor(case: Case) -> bool:
    """With the scale as a number of its own."""
    return "scale" in case.stored


def has_no_alpha(case: Case) -> bool:
    """Without a tensor for alpha in the file."""
    return bool(case.stored) and ALPHA not in case.stored


def is_linear(case: Case) -> bool:
    return case.entry.geometry.kind == "linear"


def has_extra_entries(case: Case) -> bool:
    """A change of the bias, or of single places of the weight, beside another algorithm."""
    return bool(case.extra)


def is_parameter(case: Case) -> bool:
    """A bare parameter."""
    return case.entry.geometry.kind == "parameter"


def has_flat_magnitude(case: Case) -> bool:
    """DoRA's lengths as a vector."""
    return bool(case.dora) and len(case.stored.get(MAGNITUDE, (1, 1))) < 2


def has_unfolded_factors(case: Case) -> bool:
    """Second factors that keep the kernel's dimensions."""
    return any(len(case.stored.get(name, ())) > 2 for name in ("hada_w1_b", "hada_w2_b", "lokr_w2_b"))


def is_stacked(case: Case) -> bool:
    """A stack of matrices."""
    return case.entry.geometry.stack > 0


def is_stack_of_one(case: Case) -> bool:
    """A stack of one matrix."""
    return case.entry.geometry.stack == 1


def has_dora_scale(case: Case) -> bool:
    """DoRA's lengths under the name that PEFT does not know."""
    if case.stored:
        return bool(case.dora) and MAGNITUDE in case.stored
    return DIALECTS[case.dialect].magnitudes.get(case.dora) == MAGNITUDE


def has_core(case: Case) -> bool:
    """With a Tucker core."""
    return any(name in case.entry.tensors for name in ("mid", "t1", "t2"))


def has_unread_core(case: Case) -> bool:
    """LoRA with a core beside factors that are called as PEFT does, which has none."""
    if case.name != "lora" or not has_core(case):
        return False
    if case.spelled:
        return "lora_up.weight" not in case.spelled
    return "lora_up.weight" in DIALECTS[case.dialect].spelling


def is_not_2d(case: Case) -> bool:
    """A convolution over one or three dimensions."""
    return case.dimensions in (1, 3)


def is_grouped(case: Case) -> bool:
    return case.entry.geometry.kind == "conv" and case.entry.geometry.groups > 1


def is_dilated(case: Case) -> bool:
    g = case.entry.geometry
    return g.kind == "conv" and any(d > 1 and k > 1 for d, k in zip(g.dilation, g.kernel, strict=True))


def changes_size(case: Case) -> bool:
    """Whether leaving the dilation out changes the size of the output."""
    return is_dilated(case) and case.entry.geometry.padding != "same"


def has_other_padding(case: Case) -> bool:
    """With padding that is not of zeros."""
    g = case.entry.geometry
    return g.kind == "conv" and g.padding_mode != "zeros" and any(g.pad)


def misfits_peft_lora(case: Case) -> bool:
    """A convolution on which PEFT's LoRA is another one."""
    return is_grouped(case) or is_dilated(case) or has_other_padding(case)


def has_strided_core(case: Case) -> bool:
    """A LoKr core whose contraction is no plain block of memory, as PyTorch 2.13's `kron` wants it."""
    t = case.entry.tensors
    return case.name == "lokr" and "t2" in t and min(t["w2_a"].shape[1], t["w2_b"].shape[1]) > 1


def has_split_w1(case: Case) -> bool:
    return case.name == "lokr" and "w1_a" in case.entry.tensors


def has_split_factors(case: Case) -> bool:
    """A LoKr of which one factor or both are products."""
    return case.name == "lokr" and not has_unsplit_factors(case)


def has_unsplit_factors(case: Case) -> bool:
    """A LoKr of two whole factors."""
    return case.name == "lokr" and case.entry.tensors.keys() >= {"w1", "w2"}


def has_misplaced_w2(case: Case) -> bool:
    """A whole w2 of one or three kernel dimensions, which ends up elsewhere."""
    if case.name != "lokr" or "w2" not in case.entry.tensors or not is_not_2d(case):
        return False
    return misplacement_error(case) > ROUNDING_ERROR


def has_row_magnitude(case: Case) -> bool:
    """Rotations with lengths that are not all 1."""
    scale = case.entry.tensors.get("rescale")
    return scale is not None and not torch.allclose(scale, torch.ones_like(scale), rtol=0, atol=ROUNDING_ERROR)


def has_effective_limit(case: Case) -> bool:
    """Rotations that are cut by a limit which was meant to be multiplied by the number of outputs."""
    if case.name not in ("diag-oft", "boft"):
        return False
    limit, blocks = case.entry.algorithm.export_alpha(case.entry.geometry), case.entry.tensors["blocks"]
    norm = float((blocks - blocks.mT).double().norm())
    return limit is not None and 0 < limit < norm


def has_lone_bias(case: Case) -> bool:
    """A change of the bias without one of the weight, of a norm too where the file calls it so."""
    names = case.stored.keys() if case.name == "norm" else case.entry.tensors.keys()
    return "diff_b" in names and "diff" not in names


def changes_bias(case: Case) -> bool:
    return bool(case.entry.tensors.keys() & {"diff_b", "b"})


def has_lone_shift(case: Case) -> bool:
    """A norm's shift without its scale in the file."""
    return case.name == "norm" and "b_norm" in case.stored and "w_norm" not in case.stored


def has_half_norm(case: Case) -> bool:
    """A norm's scale without its shift, or its shift without its scale."""
    if case.name != "norm":
        return False
    keys = case.entry.algorithm.tensor_names
    return len((case.stored.keys() or {keys[name] for name in case.entry.tensors}) & set(keys.values())) == 1


def is_output_ia3(case: Case) -> bool:
    algorithm = case.entry.algorithm
    return isinstance(algorithm, IA3) and not algorithm.on_input


def is_output_ia3_on_conv(case: Case) -> bool:
    return is_output_ia3(case) and case.entry.geometry.kind == "conv"


def is_output_ia3_on_square_conv1d(case: Case) -> bool:
    """A convolution over one dimension with as many inputs as outputs: the factors of the outputs fit the inputs."""
    g = case.entry.geometry
    return is_output_ia3_on_conv(case) and case.dimensions == 1 and g.out_features == g.in_features > 1


def is_input_ia3_on_groups(case: Case) -> bool:
    return case.name == "ia3" and not is_output_ia3(case) and is_grouped(case)


def has_kernel(case: Case) -> bool:
    """A convolution with a kernel of more than one place."""
    return case.dimensions > 0 and not case.entry.geometry.pointwise


def is_pointwise(case: Case) -> bool:
    return not has_kernel(case)


def starts_elsewhere(case: Case) -> bool:
    """A T-LoRA that did not start from the weight's largest singular triplets, or that may not have."""
    if case.name != "tlora" or case.base is None:
        return case.name == "tlora"
    # The change is a small difference of two weights.
    base = case.base.widen(torch.float64)
    short = {name: tensor for name, tensor in case.entry.tensors.items() if not name.endswith("0")}
    principal = type(case.entry.algorithm).infer(short, case.entry.geometry, None)
    again = principal.fill_missing(short, BareWeight(case.entry.geometry, base.weight))
    own, other = (
        adapt_affine(case.entry._replace(tensors=tensors), base).weight - base.weight
        for tensors in (case.entry.tensors, again)
    )
    return float((other - own).norm() / own.norm().clamp_min(1e-30)) > ROUNDING_ERROR


def lacks_shift(case: Case) -> bool:
    """A norm that has no bias."""
    return case.entry.geometry.kind == "norm" and not case.entry.geometry.has_bias


def has_up_bias(case: Case) -> bool:
    """A change of the bias that the file has as that of LoRA's second factor."""
    return "lora_up.bias" in case.stored


def changes_only_bias(case: Case) -> bool:
    """A change of the bias and nothing else."""
    return not case.extra and case.entry.tensors.keys() <= {"diff_b"}


def changes_any_bias(case: Case) -> bool:
    """A change of the bias, be it alone, with one of the weight, or beside another algorithm."""
    return changes_bias(case) or has_extra_entries(case)


def is_embedding(case: Case) -> bool:
    return case.entry.geometry.kind == "embedding"
