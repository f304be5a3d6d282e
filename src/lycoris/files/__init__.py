"""Reading and writing adapter files. A file is read whole or not at all, and written whole or not at all."""

from __future__ import annotations

from lycoris.files.container.headers import Header, TensorInfo, header
from lycoris.files.container.kinds import PICKLES
from lycoris.files.container.storage import load_tensors, save_tensors
from lycoris.files.convert import convert
from lycoris.files.detect import Detection, detect, judge
from lycoris.files.dialects import DIALECTS
from lycoris.files.peft import read_peft, write_peft
from lycoris.files.programs.check import check
from lycoris.files.reading import read, resolve
from lycoris.files.writing import compose, encode, keep_header, write

__all__ = [
    "DIALECTS",
    "PICKLES",
    "Detection",
    "Header",
    "TensorInfo",
    "check",
    "compose",
    "convert",
    "detect",
    "encode",
    "header",
    "judge",
    "keep_header",
    "load_tensors",
    "read",
    "read_peft",
    "resolve",
    "save_tensors",
    "write",
    "write_peft",
]
