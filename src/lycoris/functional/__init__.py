"""Algorithms as functions of tensors."""

from lycoris.functional import boft, diag_oft, general, locon, loha, lokr
from lycoris.functional.general import *  # noqa: F403  # the functions have one list, which is there

__all__ = ["boft", "diag_oft", "general", "locon", "loha", "lokr"]
__all__ += general.__all__
