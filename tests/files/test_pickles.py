"""Pickles: tensors by name, from archives that do no more than they must."""

from __future__ import annotations

import collections
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from storing import TENSORS, poor, put

from lycoris.files import load_tensors


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_pickles(zipped: bool, tmp_path: Path) -> None:
    path = tmp_path / "a.pt"

    def put_down(what: Any) -> None:
        torch.save(what, path, _use_new_zipfile_serialization=zipped)

    tied = {"x": TENSORS["a"], "y": TENSORS["a"].T, "z": torch.nn.Parameter(TENSORS["a"])}
    for what in (TENSORS, {"state_dict": TENSORS, "epoch": 3}, tied, collections.OrderedDict(TENSORS)):
        put_down(what)
        found, metadata = load_tensors(path)
        wanted = what.get("state_dict", what)  # type: ignore[attr-defined]
        assert metadata == {}
        assert all(torch.equal(found[key], tensor) and not found[key].requires_grad for key, tensor in wanted.items())
        assert found.keys() == wanted.keys()
    for what in (
        [torch.ones(1)],
        {"a": 1},
        {1: torch.ones(1)},
        {"a": {"b": torch.ones(1)}},
        {"state_dict": {"a": torch.ones(1), "b": 2}},
        {"state_dict": {}, "a": 1}.popitem(),
        torch.ones(1),
        None,
    ):
        put_down(what)
        poor(path, "something other than tensors by name")
    for what, word in (
        (torch.eye(3).to_sparse(), "not a dense tensor"),
        (torch.ones(3, device="meta"), "not a dense tensor|cannot be read safely"),
        (torch.ones(1).expand(10**12), "needs 4000000000000 bytes and has 4"),
        (os.getcwd, "cannot be read safely: it asks for .*getcwd"),
    ):
        put_down({"a": what})
        poor(path, word)


def test_archives_that_torch_would_not_write(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(100_000)}, tmp_path / "good.pt")
    with zipfile.ZipFile(tmp_path / "good.pt") as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(tmp_path / "small.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in parts.items():
            archive.writestr(name, content)
    poor(tmp_path / "small.pt", "compressed archive")
    whole = bytearray((tmp_path / "good.pt").read_bytes())
    at = whole.rindex(b"PK\1\2", 0, whole.rindex(b"data/0"))
    whole[at + 20 : at + 28] = (2**30).to_bytes(4, "little") * 2
    poor(put(tmp_path, bytes(whole), "large.pt"), "its parts 10")


class Grown:
    """A tensor of eight bytes that says it has eight hundred million."""

    def __reduce__(self) -> Any:
        storage = torch.zeros(2).untyped_storage()
        typed = torch.storage.TypedStorage(wrap_storage=storage, dtype=torch.float32, _internal=True)
        return torch._utils._rebuild_tensor_v2, (typed, 0, (2 * 10**8,), (1,), False, collections.OrderedDict())


def test_a_pickle_cannot_ask_for_memory_that_the_file_does_not_have(tmp_path: Path) -> None:
    for zipped in (True, False):
        torch.save({"a": Grown()}, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
        poor(tmp_path / "a.pt", "cannot be read safely|describes")
    (tmp_path / "b.pt").write_bytes(pickle.dumps(TENSORS))
    poor(tmp_path / "b.pt", "cannot be read safely")
