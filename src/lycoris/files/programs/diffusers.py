"""diffusers (0.42), which runs LoRA through PEFT, and of two families LoKr."""

from __future__ import annotations

from lycoris.files.programs import keys
from lycoris.files.programs.adapter_conditions import (
    changes_bias,
    changes_size,
    has_algorithm,
    has_core,
    has_dora,
    has_dora_scale,
    has_extra_entries,
    has_input_magnitude,
    has_no_scale,
    has_other_algorithm,
    has_other_padding,
    is_dilated,
    is_grouped,
    is_square,
    misfits_peft_lora,
)
from lycoris.files.programs.conditions import all_of, any_of, is_dotted, is_for, is_written_as, not_
from lycoris.files.programs.diffusers_lokr import explain_lokr_conflict
from lycoris.files.programs.diffusers_routes import route_diffusers
from lycoris.files.programs.errors import unscaled_error
from lycoris.files.programs.peft import MAGNITUDE_NOT_SCALED
from lycoris.files.programs.program import Case, Condition, Program, Reads, Row

PADDING_DIFFERS = "pads with zeros next to a layer that does not; how far off that is depends on the input"


def make_lora_rows(when: Condition, reads: Reads, why: str) -> tuple[Row, Row]:
    """Make the rows for an adapter that diffusers misreads but that converts exactly to LoRA.

    Where PEFT's LoRA itself does not fit the layer, no remedy is offered. An adapter that is not read at all makes
    diffusers reject the file.
    """
    beside = Row(all_of(when, misfits_peft_lora), reads, f"{why}; nor does its LoRA fit here", stops=True)
    return beside, Row(when, reads, why, "lora", stops=True)


def _is_wan_bias(case: Case) -> bool:
    """A change of the bias next to a LoRA, which is taken for that of its second factor."""
    # _convert_non_diffusers_wan_lora_to_diffusers
    alone = all(set(each.tensors) == {"diff_b"} for each in case.extra)
    blocks = case.key.startswith("diffusion_model.blocks.") or not case.key
    return case.architecture == "wan" and is_dotted(case) and blocks and case.name == "lora" and alone and not case.dora


def _is_converted(case: Case) -> bool:
    """In dotted names other than diffusers' own, behind its own prefix."""
    return is_dotted(case) and not case.key.startswith("transformer.")


_is_flux1_in_diffusers_names = all_of(is_for("flux1"), is_written_as("diffusers", "onetrainer-diffusers"))
"""Flux.1's pipeline leaves out what it has no use for of files with diffusers' names."""


def is_from_kohya(case: Case) -> bool:
    """Return whether a file has kohya's names.

    The converter for Flux.2 drops what it has no use for from such files.
    """
    return "lora_down.weight" in case.file_suffixes


def _is_taken_for_lokr(case: Case) -> bool:
    """In a file of Flux.1's that has LoKr in diffusers' names: load_lora_adapter then takes it for one of LoKr.

    Of LoKr alone the pipeline rejects a file: there must be a name with "lora" in it.
    """
    mixed = any("lokr_" in name for name in case.file_suffixes) and any("lora" in name for name in case.file_suffixes)
    return mixed and _is_flux1_in_diffusers_names(case)


def _is_norm(case: Case) -> bool:
    return case.entry.geometry.kind == "norm"


def _is_passed_over(case: Case) -> bool:
    """A norm's changes that are passed over: in Flux.1's own format, and of Wan under ComfyUI's names."""
    wan = case.architecture == "wan" and case.key.startswith("diffusion_model.")
    return _is_flux1_in_diffusers_names(case) or (
        wan and bool(case.stored) and case.stored.keys() <= {"diff", "diff_b"}
    )


def _gets_magnitude(case: Case) -> bool:
    """A LoRA in a file of which another layer has a magnitude: then every layer gets one, that of its base weight."""
    return case.name == "lora" and not case.dora and "lora_magnitude_vector" in case.file_suffixes


def _accepts_lokr(case: Case) -> bool:
    """A file whose LoKr the pipelines of Flux.2 and Z-Image take."""
    if case.architecture == "flux2":
        # _convert_lycoris_flux2_lokr_to_diffusers, _convert_non_diffusers_flux2_lokr_to_diffusers
        return case.dialect in ("lycoris", "comfyui", "musubi-other", "onetrainer-comfy")
    # _convert_non_diffusers_lokr_to_diffusers: it takes another prefix for a part of the path, and has no other names.
    bare = case.dialect in ("musubi-other", "bare", "onetrainer-original") or case.key.startswith("diffusion_model.")
    return case.architecture == "z-image" and bare and not case.key.endswith(".attention.out")


_is_accepted_lokr = all_of(has_algorithm("lokr"), _accepts_lokr)

DIFFUSERS_PROGRAM = Program(
    "diffusers",
    "diffusers",
    keys.DIFFUSERS_KEYS,
    (
        Row(all_of(_is_norm, _is_passed_over), "not at all", "has no adapters for a layer of kind norm"),
        Row(_is_norm, "not at all", "has no adapters for a layer of kind norm", stops=True),
        Row(
            all_of(_is_taken_for_lokr, has_other_algorithm("lokr")),
            "not at all",
            "takes a file with LoKr for one of LoKr alone",
        ),
        Row(
            all_of(_is_taken_for_lokr, has_dora),
            "differently",
            "leaves the magnitude out of LoKr; how far off that is depends on the base weight",
            "lora",
        ),
        Row(
            all_of(_is_taken_for_lokr, not_(has_no_scale)),
            "differently",
            "reads no scale next to LoKr for this model, and takes 1",
            "lora",
            unscaled_error,
        ),
        Row(_is_taken_for_lokr, "as trained", "computes what was trained, if one decompose_factor fits all of them"),
        Row(
            all_of(
                has_extra_entries,
                any_of(is_for("flux1"), all_of(is_for("flux2"), is_from_kohya)),
                has_algorithm("lora"),
            ),
            "differently",
            "ignores the change of the bias next to it",
        ),
        Row(
            all_of(any_of(has_other_algorithm("lora"), changes_bias), _is_flux1_in_diffusers_names),
            "not at all",
            "reads LoRA only",
            "lora",
        ),
        Row(
            all_of(any_of(has_extra_entries, changes_bias), lambda case: not _is_wan_bias(case)),
            "not at all",
            "has no counterpart that changes a bias",
            stops=True,
        ),
        Row(
            all_of(is_grouped, has_algorithm("lora")),
            "not at all",
            "makes a LoRA of other shapes on convolutions with groups",
            stops=True,
        ),
        Row(
            _gets_magnitude,
            "differently",
            "gives every layer a magnitude where one layer of the file has one; how far off that is depends on the "
            "base weight",
        ),
        *make_lora_rows(
            all_of(
                has_dora_scale,
                any_of(has_algorithm("lora"), _is_accepted_lokr),
                is_for("wan"),
                any_of(_is_converted, is_written_as("kohya", "musubi")),
            ),
            "not at all",
            "rejects files with DoRA's magnitude for Wan",
        ),
        *make_lora_rows(
            all_of(has_dora_scale, any_of(has_algorithm("lora"), _is_accepted_lokr)),
            "differently",
            "ignores DoRA's magnitude, which in this format is called dora_scale; how far off that is depends on the "
            "base weight",
        ),
        Row(
            _is_accepted_lokr,
            "as trained",
            "computes what was trained, if one decompose_factor fits all layers of the file",
        ),
        *make_lora_rows(
            has_algorithm("lokr"), "not at all", "reads LoKr for Flux.2 and Z-Image only, in some of their formats"
        ),
        *make_lora_rows(has_other_algorithm("lora"), "not at all", "reads LoRA only"),
        *make_lora_rows(
            all_of(is_for("flux2"), is_written_as("lycoris", "comfyui", "onetrainer-comfy")),
            "not at all",
            "reads LoKr only from this format for Flux.2",
        ),
        *make_lora_rows(
            all_of(has_input_magnitude, is_square),
            "differently",
            "takes DoRA's input magnitude for one of outputs, and how far off that is depends on the base weight",
        ),
        *make_lora_rows(has_input_magnitude, "not at all", "knows DoRA's output magnitude only"),
        Row(
            all_of(has_core, misfits_peft_lora),
            "not at all",
            "knows no cores of LoRA, nor does LoRA fit here",
            stops=True,
        ),
        Row(has_core, "not at all", "knows no cores of LoRA", "no core", stops=True),
        Row(changes_size, "not at all", "leaves the dilation out, and the outputs differ in size"),
        Row(
            is_dilated,
            "differently",
            "leaves the dilation of the convolution out; how far off that is depends on the input",
        ),
        Row(has_other_padding, "differently", PADDING_DIFFERS),
        Row(has_dora, "as trained", MAGNITUDE_NOT_SCALED),
    ),
    kinds=("linear", "conv", "norm"),
    reads_header=True,
    route=route_diffusers,
    explain_conflict=explain_lokr_conflict,
)
