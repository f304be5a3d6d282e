"""Adapters of single layers."""

from lycoris.dropin import modules as _modules
from lycoris.dropin.functional.layer import factorization
from lycoris.dropin.module import LycorisBaseModule
from lycoris.dropin.modules import *  # noqa: F403  # module classes have one list for all that export them
from lycoris.modules import base, boft, diag_oft, dylora, full, glora, ia3, locon, loha, lokr, norms, tlora

__all__ = [
    "LycorisBaseModule",
    "base",
    "boft",
    "diag_oft",
    "dylora",
    "factorization",
    "full",
    "glora",
    "ia3",
    "locon",
    "loha",
    "lokr",
    "norms",
    "tlora",
]
__all__ += _modules.__all__
