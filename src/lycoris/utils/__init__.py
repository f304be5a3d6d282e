"""Merging a file into the models of a pipeline, extracting one, and small functions."""

from lycoris.compat.compvis import convert_diffusers_name_to_compvis
from lycoris.compat.extract import extract_diff
from lycoris.compat.extract_layer import extract_conv, extract_linear
from lycoris.compat.merge import merge
from lycoris.compat.values import (
    default,
    load_bytes_in_safetensors,
    make_sparse,
    precalculate_safetensors_hashes,
    product,
    str_bool,
)
from lycoris.utils import general, preset, quant

__all__ = [
    "convert_diffusers_name_to_compvis",
    "default",
    "extract_conv",
    "extract_diff",
    "extract_linear",
    "general",
    "load_bytes_in_safetensors",
    "make_sparse",
    "merge",
    "precalculate_safetensors_hashes",
    "preset",
    "product",
    "quant",
    "str_bool",
]
