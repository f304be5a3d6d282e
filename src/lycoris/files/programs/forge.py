"""Forge (2025), whose rules are ComfyUI's without rotations."""

from __future__ import annotations

from lycoris.files.programs import keys
from lycoris.files.programs.comfyui import FAILING, KRON, SHARED, STOPPED
from lycoris.files.programs.conditions import (
    all_of,
    any_of,
    core_without_contiguous,
    dora_in,
    flat_lengths,
    has_unfolded_factors,
    is_a,
    is_exchanged,
    is_named,
    linear,
    no_other_than,
    not_,
    square,
    under_own_names,
)
from lycoris.files.programs.program import ASKED, NAMES, Case, Program, Row
from lycoris.files.programs.replacements import changes_weight, replaces_bias, replaces_weight
from lycoris.files.programs.taking import by_forge

UNMATCHED = 12
"""More keys than these in a file that nothing takes, and it rejects the file."""


def _misfits(case: Case) -> bool:
    """Lengths as a vector where they do not broadcast over the columns."""
    return flat_lengths(case) and case.name != "full" and not (linear(case) and (dora_in(case) or square(case)))


REPLACED = (
    Row(
        all_of(replaces_bias, not_(under_own_names), replaces_weight),
        "differently",
        "knows a bias in place of a layer's own behind diffusion_model. only",
        "joined",
    ),
    Row(
        all_of(replaces_bias, not_(under_own_names), changes_weight),
        "differently",
        "knows a bias in place of a layer's own behind diffusion_model. only",
        "joined",
    ),
    Row(
        all_of(replaces_bias, not_(under_own_names)),
        "not at all",
        "knows a bias in place of a layer's own behind diffusion_model. only",
        "joined",
    ),
    Row(
        all_of(replaces_weight, changes_weight),
        "differently",
        "puts the stored weight in place of all that changes the layer's own",
        "joined",
    ),
    Row(
        all_of(replaces_weight, is_exchanged),
        "differently",
        "puts the stored weight in place without exchanging its halves",
        "format",
    ),
)
VECTORS = (
    Row(_misfits, "not at all", "cannot divide lengths of DoRA that are a vector there, and stops", "anew", stops=True),
    Row(
        all_of(flat_lengths, square, no_other_than("full")),
        "differently",
        "takes a vector of DoRA's lengths for those of rows and of columns at once; how far off that is depends on the "
        "base weight",
        "anew",
    ),
    Row(
        all_of(has_unfolded_factors, any_of(is_a("loha"), is_a("lokr"))),
        "not at all",
        "multiplies matrices, and stops at second factors that keep the kernel's dimensions",
        "anew",
        stops=True,
    ),
)
EXCHANGED = Row(
    all_of(is_exchanged, is_a("full"), changes_weight),
    "differently",
    "adds a difference stored whole without exchanging its halves",
    "format",
)
PROJECTION = r"text_encoder\.text_projection"
OF_ANOTHER_ENCODER = (
    Row(
        all_of(is_named(PROJECTION), is_a("lora", "loha", "lokr", "glora", "replace")),
        "not at all",
        "takes the projection of the first text encoder for that of the second, and stops",
        "format",
        stops=True,
    ),
    Row(
        is_named(PROJECTION),
        "not at all",
        "takes the projection of the first text encoder for that of the second, and leaves it out",
        "format",
    ),
)
BARE, *OTHERS = SHARED

FORGE = Program(
    "forge",
    "Forge",
    keys.FORGE,
    (
        Row(
            is_a("diag-oft", "boft"),
            "not at all",
            "knows no rotations, and passes their keys over",
            "plain",
        ),
        BARE,
        *OF_ANOTHER_ENCODER,
        *REPLACED,
        *VECTORS,
        EXCHANGED,
        *STOPPED,
        Row(core_without_contiguous, "not at all", f"{KRON}, and stops", "flat w2", stops=True),
        *(row._replace(stops=True) if row in FAILING else row for row in OTHERS),
        Row(
            replaces_weight,
            "as trained",
            "puts the stored weight in place of the layer's own, and at another strength than 1 it does the same",
        ),
        Row(
            replaces_bias,
            "as trained",
            "puts the stored bias in place of the layer's own, and at another strength than 1 it does the same",
        ),
    ),
    kinds=("linear", "conv", "norm", "embedding", "parameter"),
    asked=ASKED | {"replace"},
    names=NAMES | {"scale", "set_weight", "bias.set_weight"},
    replaces=True,
    unmatched=UNMATCHED,
    takes=by_forge,
    own="comfyui",
)
