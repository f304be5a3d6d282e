"""Slices: an adapter of a fused layer, shared by the layers that have its rows."""

from lycoris.algorithms.slices.entries import cut_entry, fused_entry, own_rows, rejoin, share
from lycoris.algorithms.slices.slice import ROW_BIASES, AdditiveSlice, Slice, cut_additive, take_additive

__all__ = [
    "ROW_BIASES",
    "AdditiveSlice",
    "Slice",
    "cut_additive",
    "cut_entry",
    "fused_entry",
    "own_rows",
    "rejoin",
    "share",
    "take_additive",
]
