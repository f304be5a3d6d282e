"""Classes of quantized layers in the packages that are installed, imported on demand."""

from typing import Any

from lycoris.compat.legacy_options import logger
from lycoris.compat.quantized import quant_linears

__all__ = ["logger"]


def __getattr__(name: str) -> Any:
    # A tuple for isinstance, and whether it has any: both import what is installed.
    if name == "QuantLinears":
        return quant_linears()
    if name == "SUPPORT_QUANT":
        return bool(quant_linears())
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
