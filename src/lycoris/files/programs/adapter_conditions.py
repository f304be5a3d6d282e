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
    """Make a condition for adapters of these algorithms, with DoRA over them or without.

    DyLoRA counts as "lora".
    """
    return lambda case: case.name in names


def has_other_algorithm(*names: str) -> Condition:
    """Make a condition for adapters of any other algorithm.

    DyLoRA counts as "lora".
    """
    return lambda case: case.name not in names


def has_dora(case: Case) -> bool:
    """Return whether the adapter has a magnitude, on whichever axis."""
    return bool(case.dora)


def has_output_magnitude(case: Case) -> bool:
    """Return whether the adapter is a DoRA with a magnitude per output row."""
    return case.dora == "out"


def has_input_magnitude(case: Case) -> bool:
    """Return whether the adapter is a DoRA with a magnitude per input column."""
    return case.dora == "in"


def has_input_magnitude_of_one_row(case: Case) -> bool:
    """Return whether the adapter has a magnitude per input column, and the layer a single output.

    Programs take such a magnitude for one of outputs: its shape fits both.
    """
    return has_input_magnitude(case) and case.entry.geometry.out_features == 1


def is_square(case: Case) -> bool:
    """Return whether the layer is linear with as many inputs as outputs."""
    g = case.entry.geometry
    return g.kind == "linear" and g.out_features == g.in_features


def fits_both_glora_layouts(case: Case) -> bool:
    """Return whether a GLoRA has as many ranks as inputs and outputs.

    Then its tensors fit the first layout, too, and programs may take them for that.
    """
    g = case.entry.geometry
    return case.name == "glora" and case.entry.tensors["a1"].shape[1] == g.in_features == g.out_features


def has_first_glora_layout(case: Case) -> bool:
    """Return whether the file stores a GLoRA in its first layout.

    That is a1 (r, I) and a2 (I, r), b1 (r, I) and b2 (O, r).
    """
    g, shapes = case.entry.geometry, case.stored
    if case.name != "glora" or not shapes:
        return False
    return (shapes["a1.weight"][0], shapes["a2.weight"][1], shapes["b1.weight"][0]) != (
        g.in_features,
        g.in_features,
        g.out_features,
    )


def has_old_rotation(case: Case) -> bool:
    """Return whether the file stores rotation matrices rather than what generates them."""
    return "oft_diag" in case.stored


def has_no_scale(case: Case) -> bool:
    return case.entry.algorithm.scale(case.entry.geometry) == 1


def has_scale_tensor(case: Case) -> bool:
    """Return whether the file stores the scale as a number of its own."""
    return "scale" in case.stored


def has_no_alpha(case: Case) -> bool:
    """Return whether the file has no alpha tensor for the layer.

    Does not hold where the stored names are not known.
    """
    return bool(case.stored) and ALPHA not in case.stored


def is_linear(case: Case) -> bool:
    return case.entry.geometry.kind == "linear"


def has_extra_entries(case: Case) -> bool:
    """Return whether the layer has a change of the bias, or a sparse change of the weight, next to its algorithm."""
    return bool(case.extra)


def is_parameter(case: Case) -> bool:
    """Return whether the layer is a bare parameter."""
    return case.entry.geometry.kind == "parameter"


def has_flat_magnitude(case: Case) -> bool:
    """Return whether the file stores DoRA's magnitude as a vector.

    Others store it in a shape that broadcasts over the weight.
    """
    return bool(case.dora) and len(case.stored.get(MAGNITUDE, (1, 1))) < 2


def has_unfolded_factors(case: Case) -> bool:
    """Return whether second factors keep the kernel's dimensions in the file."""
    return any(len(case.stored.get(name, ())) > 2 for name in ("hada_w1_b", "hada_w2_b", "lokr_w2_b"))


def is_stacked(case: Case) -> bool:
    """Return whether the layer is a stack of matrices."""
    return case.entry.geometry.stack > 0


def is_stack_of_one(case: Case) -> bool:
    """Return whether the layer is a stack of a single matrix."""
    return case.entry.geometry.stack == 1


def has_dora_scale(case: Case) -> bool:
    """Return whether the file stores DoRA's magnitude as `dora_scale`, a name PEFT does not know.

    For an adapter that is not in a file yet, whether its dialect would.
    """
    if case.stored:
        return bool(case.dora) and MAGNITUDE in case.stored
    return DIALECTS[case.dialect].magnitudes.get(case.dora) == MAGNITUDE


def has_core(case: Case) -> bool:
    """Return whether the adapter has a Tucker core."""
    return any(name in case.entry.tensors for name in ("mid", "t1", "t2"))


def has_unread_core(case: Case) -> bool:
    """Return whether a LoRA has a core although its factors have PEFT's names, with which no core is expected.

    Names are those of the file, or those of its dialect where they are not known.
    """
    if case.name != "lora" or not has_core(case):
        return False
    if case.spelled:
        return "lora_up.weight" not in case.spelled
    return "lora_up.weight" in DIALECTS[case.dialect].spelling


def is_not_2d(case: Case) -> bool:
    """Return whether the layer is a convolution over one or three dimensions."""
    return case.dimensions in (1, 3)


def is_grouped(case: Case) -> bool:
    return case.entry.geometry.kind == "conv" and case.entry.geometry.groups > 1


def is_dilated(case: Case) -> bool:
    g = case.entry.geometry
    return g.kind == "conv" and any(d > 1 and k > 1 for d, k in zip(g.dilation, g.kernel, strict=True))


def changes_size(case: Case) -> bool:
    """Return whether the output would have another size without the layer's dilation."""
    return is_dilated(case) and case.entry.geometry.padding != "same"


def has_other_padding(case: Case) -> bool:
    """Return whether the layer pads with anything but zeros."""
    g = case.entry.geometry
    return g.kind == "conv" and g.padding_mode != "zeros" and any(g.pad)


def misfits_peft_lora(case: Case) -> bool:
    """Return whether the layer is a convolution on which PEFT's LoRA computes something else.

    That is one with groups, dilation, or padding other than zeros.
    """
    return is_grouped(case) or is_dilated(case) or has_other_padding(case)


def has_strided_core(case: Case) -> bool:
    """Return whether a LoKr core contracts to a tensor that is not contiguous.

    PyTorch 2.13's `kron` requires contiguous arguments.
    """
    t = case.entry.tensors
    return case.name == "lokr" and "t2" in t and min(t["w2_a"].shape[1], t["w2_b"].shape[1]) > 1


def has_split_w1(case: Case) -> bool:
    return case.name == "lokr" and "w1_a" in case.entry.tensors


def has_split_factors(case: Case) -> bool:
    """Return whether a LoKr has at least one factor that is a product of two matrices."""
    return case.name == "lokr" and not has_unsplit_factors(case)


def has_unsplit_factors(case: Case) -> bool:
    """Return whether both factors of a LoKr are stored as they are."""
    return case.name == "lokr" and case.entry.tensors.keys() >= {"w1", "w2"}


def has_misplaced_w2(case: Case) -> bool:
    """Return whether an unsplit w2 has one or three kernel dimensions, and `kron` would pair the wrong axes.

    False where the wrong pairing gives the right weight up to `ROUNDING_ERROR`.
    """
    if case.name != "lokr" or "w2" not in case.entry.tensors or not is_not_2d(case):
        return False
    return misplacement_error(case) > ROUNDING_ERROR


def has_row_magnitude(case: Case) -> bool:
    """Return whether rotated rows are rescaled, too, by factors other than 1.

    Factors within `ROUNDING_ERROR` of 1 count as 1.
    """
    scale = case.entry.tensors.get("rescale")
    return scale is not None and not torch.allclose(scale, torch.ones_like(scale), rtol=0, atol=ROUNDING_ERROR)


def has_effective_limit(case: Case) -> bool:
    """Return whether a rotation exceeds the limit that is stored, so that a program which applies it per output changes
    the rotation.
    """
    if case.name not in ("diag-oft", "boft"):
        return False
    limit, blocks = case.entry.algorithm.export_alpha(case.entry.geometry), case.entry.tensors["blocks"]
    norm = float((blocks - blocks.mT).double().norm())
    return limit is not None and 0 < limit < norm


def has_lone_bias(case: Case) -> bool:
    """Return whether there is a `diff_b` without a `diff`.

    For norms the names in the file count.
    """
    names = case.stored.keys() if case.name == "norm" else case.entry.tensors.keys()
    return "diff_b" in names and "diff" not in names


def changes_bias(case: Case) -> bool:
    return bool(case.entry.tensors.keys() & {"diff_b", "b"})


def has_lone_shift(case: Case) -> bool:
    """Return whether the file stores a norm's shift without its scale."""
    return case.name == "norm" and "b_norm" in case.stored and "w_norm" not in case.stored


def has_half_norm(case: Case) -> bool:
    """Return whether there is only one of a norm's scale and shift.

    By the names in the file, or by the adapter's tensors where those are not known.
    """
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
    """Return whether IA3 scales the outputs of a one-dimensional convolution with as many inputs as outputs.

    The factors of the outputs then fit the inputs, and programs take them for those.
    """
    g = case.entry.geometry
    return is_output_ia3_on_conv(case) and case.dimensions == 1 and g.out_features == g.in_features > 1


def is_input_ia3_on_groups(case: Case) -> bool:
    return case.name == "ia3" and not is_output_ia3(case) and is_grouped(case)


def has_kernel(case: Case) -> bool:
    """Return whether the layer is a convolution with a kernel larger than 1."""
    return case.dimensions > 0 and not case.entry.geometry.pointwise


def is_pointwise(case: Case) -> bool:
    return not has_kernel(case)


def starts_elsewhere(case: Case) -> bool:
    """Return whether a T-LoRA started from anything but the weight's largest singular triplets.

    Without the base weight that is not known, and the condition holds for every T-LoRA.
    """
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
    """Return whether the layer is a norm without a bias."""
    return case.entry.geometry.kind == "norm" and not case.entry.geometry.has_bias


def has_up_bias(case: Case) -> bool:
    """Return whether the file stores a change of the bias as `lora_up.bias`."""
    return "lora_up.bias" in case.stored


def changes_only_bias(case: Case) -> bool:
    """Return whether the adapter changes the bias and nothing else."""
    return not case.extra and case.entry.tensors.keys() <= {"diff_b"}


def changes_any_bias(case: Case) -> bool:
    """Return whether the bias is changed, by the adapter or by an entry next to it."""
    return changes_bias(case) or has_extra_entries(case)


def is_embedding(case: Case) -> bool:
    return case.entry.geometry.kind == "embedding"
