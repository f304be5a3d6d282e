"""What is written, and where."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest
import torch
from torch import nn

from lycoris import AdapterSet, LoRA, Rule, plan, write
from lycoris.adapters.bundle import Bundle
from lycoris.errors import FileError
from lycoris.files import compose, load_tensors, save_tensors


@pytest.fixture
def bundle() -> Bundle:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8))
    adapters = AdapterSet.build(model, plan(model, Rule(LoRA(rank=4, alpha=2.0), path="*")))
    for parameter in adapters.parameters():
        nn.init.normal_(parameter)
    return adapters.bundle()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("", "is a folder; name a file in it"),
        (".", "is a folder; name a file in it"),
        ("a.pt", r"has the name of a pickle.*name it a\.safetensors"),
        ("A.CKPT", r"has the name of a pickle.*name it A\.safetensors"),
        ("pipe", "is a device or a pipe"),
        ("a\0b.safetensors", "cannot be the name of a file"),
        ("x" * 300 + ".safetensors", "cannot be the name of a file|cannot be written"),
        ("file/b.safetensors", "cannot be the name of a file|cannot be written"),
    ],
)
def test_targets_that_are_none(name: str, words: str, bundle: Bundle, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "file").write_text("")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(FileError, match=words):
        write(bundle, f"{tmp_path}/{name}")
    assert sorted(tmp_path.iterdir()) == before


def test_a_long_name_and_a_new_folder(tmp_path: Path) -> None:
    at = tmp_path / "new" / ("x" * 240 + ".safetensors")
    save_tensors({"a": torch.ones(1)}, at, {})
    assert load_tensors(at)[0]["a"] == 1
    assert [*at.parent.iterdir()] == [at]


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.complex64], ids=str)
def test_dtypes_without_fractions(dtype: torch.dtype, bundle: Bundle, tmp_path: Path) -> None:
    with pytest.raises(FileError, match="cannot hold adapters, whose values are not integers"):
        write(bundle, tmp_path / "a.safetensors", dtype=dtype)
    assert not [*tmp_path.iterdir()]


def test_what_would_become_nothing(bundle: Bundle, tmp_path: Path) -> None:
    ((entry,),) = bundle.entries.values()
    small = {name: tensor * 1e-9 for name, tensor in entry.tensors.items()}
    with pytest.raises(FileError, match=r"all of lycoris_0\.\S+ is too small for torch\.float16 and would become 0"):
        write(Bundle({"0": (entry._replace(tensors=small),)}), tmp_path / "a.safetensors", dtype=torch.float16)
    write(Bundle({"0": (entry._replace(tensors=small),)}), tmp_path / "a.safetensors", dtype=torch.bfloat16)


PAIR = (("lora_B", "up"), ("lora_A", "down"))


@pytest.mark.parametrize("dialect", ["musubi-other", "ai-toolkit", "processors"])
@pytest.mark.parametrize("alpha", [-0.0625, 0.3, 1.0, 2.0, 3.0, 4.0, 16.0])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_a_scale_moves_into_the_factors_unrounded(
    dialect: str, alpha: float, dtype: torch.dtype, bundle: Bundle
) -> None:
    ((entry,),) = bundle.entries.values()
    tensors = {name: tensor.to(dtype) for name, tensor in entry.tensors.items()}
    algorithm = LoRA(rank=4, alpha=alpha)
    path = "0.to_q" if dialect == "processors" else "0"
    found = compose(Bundle({path: (entry._replace(algorithm=algorithm, tensors=tensors),)}), dialect).tensors
    up, down = (next(found[key].double() for key in found if any(word in key for word in words)) for words in PAIR)
    if math.frexp(alpha)[0] in (0.5, -0.5) and dtype.itemsize > 1:
        assert {tensor.dtype for name, tensor in found.items()} == {dtype}, "a power of two rounds nothing"
    exact = tensors["up"].double() @ tensors["down"].double() * alpha / 4
    assert torch.linalg.norm(up @ down - exact) <= 1e-6 * torch.linalg.norm(exact)
