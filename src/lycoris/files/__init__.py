"""Reading and writing adapter files. A file is read whole or not at all, and written whole or not at all."""

from __future__ import annotations

from lycoris.files.dialects import DIALECTS
from lycoris.files.reading import read, resolve
from lycoris.files.storage import PICKLES, load_tensors, save_tensors
from lycoris.files.writing import encode, write

__all__ = ["DIALECTS", "PICKLES", "encode", "load_tensors", "read", "resolve", "save_tensors", "write"]
