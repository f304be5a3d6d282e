"""Algorithms as functions of tensors."""

from lycoris.dropin.functional.layer import factorization
from lycoris.functional import boft, diag_oft, locon, loha, lokr

__all__ = ["boft", "diag_oft", "factorization", "locon", "loha", "lokr"]
