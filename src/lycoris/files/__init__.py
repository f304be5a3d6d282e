"""Reading, writing, converting and checking adapter files. Each is done completely or not at all."""

from __future__ import annotations

from lycoris.files.container.headers import Header, TensorInfo, read_header
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
    "judge",
    "keep_header",
    "load_tensors",
    "read",
    "read_header",
    "read_peft",
    "resolve",
    "save_tensors",
    "write",
    "write_peft",
]
