"""Adapters of single layers."""

from lycoris.compat import module_classes as _modules
from lycoris.compat.base_module import LycorisBaseModule
from lycoris.compat.functional.layer import factorization
from lycoris.compat.module_classes import *  # noqa: F403  # module classes have one list for all that export them
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
