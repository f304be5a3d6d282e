"""Reading and writing adapter files. A file is read whole or not at all, and written whole or not at all."""

from __future__ import annotations

from lycoris.files.detect import Detection, detect
from lycoris.files.dialects import DIALECTS
from lycoris.files.headers import Header, TensorInfo, header
from lycoris.files.kinds import PICKLES
from lycoris.files.reading import read, resolve
from lycoris.files.storage import load_tensors, save_tensors
from lycoris.files.writing import compose, encode, write

__all__ = [
    "DIALECTS",
    "PICKLES",
    "Detection",
    "Header",
    "TensorInfo",
    "compose",
    "detect",
    "encode",
    "header",
    "load_tensors",
    "read",
    "resolve",
    "save_tensors",
    "write",
]
