"""diffusers (0.42), which runs LoRA through PEFT, and of two families LoKr."""

from __future__ import annotations

from lycoris.files.programs import keys
from lycoris.files.programs.conditions import (
    all_of,
    any_of,
    beside,
    changes_bias,
    changes_size,
    dora,
    dora_in,
    has_core,
    has_no_scale,
    is_a,
    is_dilated,
    is_dotted,
    is_grouped,
    is_scaled,
    lora_goes_wrong,
    no_other_than,
    not_,
    on,
    padded_otherwise,
    square,
    written_as,
)
from lycoris.files.programs.diffusers_lokr import together
from lycoris.files.programs.diffusers_routes import route
from lycoris.files.programs.errors import unscaled_error
from lycoris.files.programs.peft import STRENGTH
from lycoris.files.programs.program import Case, Program, Reads, Row, Test

PADDING = "pads with zeros beside a layer that does not; how far off that is depends on the input"


def instead(when: Test, reads: Reads, why: str) -> tuple[Row, Row]:
    """What LoRA makes right, on layers where PEFT's LoRA itself is right. What is not read costs the whole file."""
    beside = Row(all_of(when, lora_goes_wrong), reads, f"{why}; nor does its LoRA fit here", stops=True)
    return beside, Row(when, reads, why, "lora", stops=True)


def _bias_of_wan(case: Case) -> bool:
    """A change of the bias beside a LoRA, which is taken for that of its second factor."""
    # _convert_non_diffusers_wan_lora_to_diffusers
    alone = all(set(each.tensors) == {"diff_b"} for each in case.beside)
    blocks = case.key.startswith("diffusion_model.blocks.") or not case.key
    return case.architecture == "wan" and is_dotted(case) and blocks and case.name == "lora" and alone and not case.dora


def _is_converted(case: Case) -> bool:
    """In dotted names other than diffusers' own, behind its own prefix."""
    return is_dotted(case) and not case.key.startswith("transformer.")


_of_flux1 = all_of(on("flux1"), written_as("diffusers", "onetrainer-diffusers"))
"""Flux.1's pipeline leaves out what it has no use for of files with diffusers' names."""


def by_kohya(case: Case) -> bool:
    """In a file of kohya's, of which the converter for Flux.2 leaves out what it has no use for."""
    return "lora_down.weight" in case.among


def _taken_for_lokr(case: Case) -> bool:
    """In a file of Flux.1's that has LoKr in diffusers' names: load_lora_adapter then takes it for one of LoKr.

    Of LoKr alone the pipeline rejects a file: there must be a name with "lora" in it.
    """
    mixed = any("lokr_" in name for name in case.among) and any("lora" in name for name in case.among)
    return mixed and _of_flux1(case)


def _norm(case: Case) -> bool:
    return case.entry.geometry.kind == "norm"


def _passed_over(case: Case) -> bool:
    """A norm's changes that are passed over: in Flux.1's own format, and of Wan under ComfyUI's names."""
    wan = case.architecture == "wan" and case.key.startswith("diffusion_model.")
    return _of_flux1(case) or (wan and bool(case.stored) and case.stored.keys() <= {"diff", "diff_b"})


def _gets_lengths(case: Case) -> bool:
    """A LoRA in a file of which another layer has a magnitude: then every layer gets one, that of its base weight."""
    return case.name == "lora" and not case.dora and "lora_magnitude_vector" in case.among


def _of_lokr(case: Case) -> bool:
    """A file whose LoKr the pipelines of Flux.2 and Z-Image take."""
    if case.architecture == "flux2":
        # _convert_lycoris_flux2_lokr_to_diffusers, _convert_non_diffusers_flux2_lokr_to_diffusers
        return case.dialect in ("lycoris", "comfyui", "musubi-other", "onetrainer-comfy")
    # _convert_non_diffusers_lokr_to_diffusers: it takes another prefix for a part of the path, and has no other names.
    bare = case.dialect in ("musubi-other", "bare", "onetrainer-original") or case.key.startswith("diffusion_model.")
    return case.architecture == "z-image" and bare and not case.key.endswith(".attention.out")


lokr = all_of(is_a("lokr"), _of_lokr)

DIFFUSERS = Program(
    "diffusers",
    "diffusers",
    keys.DIFFUSERS,
    (
        Row(all_of(_norm, _passed_over), "not at all", "has no adapters for a layer of kind norm"),
        Row(_norm, "not at all", "has no adapters for a layer of kind norm", stops=True),
        Row(
            all_of(_taken_for_lokr, no_other_than("lokr")), "not at all", "takes a file with LoKr for one of LoKr alone"
        ),
        Row(
            all_of(_taken_for_lokr, dora),
            "differently",
            "leaves the magnitude out of LoKr; how far off that is depends on the base weight",
            "lora",
        ),
        Row(
            all_of(_taken_for_lokr, not_(has_no_scale)),
            "differently",
            "reads no scale beside LoKr for this model, and takes 1",
            "lora",
            unscaled_error,
        ),
        Row(_taken_for_lokr, "as trained", "computes what was trained, if one decompose_factor fits all of them"),
        Row(
            all_of(beside, any_of(on("flux1"), all_of(on("flux2"), by_kohya)), is_a("lora")),
            "differently",
            "leaves out the change of the bias that is beside it",
        ),
        Row(
            all_of(any_of(no_other_than("lora"), changes_bias), _of_flux1),
            "not at all",
            "reads LoRA only",
            "lora",
        ),
        Row(
            all_of(any_of(beside, changes_bias), lambda case: not _bias_of_wan(case)),
            "not at all",
            "has no counterpart that changes a bias",
            stops=True,
        ),
        Row(
            all_of(is_grouped, is_a("lora")),
            "not at all",
            "makes a LoRA of other shapes on convolutions with groups",
            stops=True,
        ),
        Row(
            _gets_lengths,
            "differently",
            "gives every layer a magnitude where one layer of the file has one; how far off that is depends on the "
            "base weight",
        ),
        *instead(
            all_of(
                is_scaled, any_of(is_a("lora"), lokr), on("wan"), any_of(_is_converted, written_as("kohya", "musubi"))
            ),
            "not at all",
            "rejects files with DoRA's lengths for Wan",
        ),
        *instead(
            all_of(is_scaled, any_of(is_a("lora"), lokr)),
            "differently",
            "leaves DoRA's lengths out, which in this format are called dora_scale; how far off that is depends on the "
            "base weight",
        ),
        Row(lokr, "as trained", "computes what was trained, if one decompose_factor fits all layers of the file"),
        *instead(is_a("lokr"), "not at all", "reads LoKr for Flux.2 and Z-Image only, in some of their formats"),
        *instead(no_other_than("lora"), "not at all", "reads LoRA only"),
        *instead(
            all_of(on("flux2"), written_as("lycoris", "comfyui", "onetrainer-comfy")),
            "not at all",
            "reads LoKr only from this format for Flux.2",
        ),
        *instead(
            all_of(dora_in, square),
            "differently",
            "takes DoRA's lengths of inputs for those of outputs, and how far off that is depends on the base weight",
        ),
        *instead(dora_in, "not at all", "knows DoRA's lengths of outputs only"),
        Row(
            all_of(has_core, lora_goes_wrong),
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
        Row(padded_otherwise, "differently", PADDING),
        Row(dora, "as trained", STRENGTH),
    ),
    kinds=("linear", "conv", "norm"),
    reads_header=True,
    route=route,
    whole=together,
)
