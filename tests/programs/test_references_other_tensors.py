"""The readers on norms, on differences of weight and bias, and on what they do not know."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from programs import Read, Refused, comfyui, forge, invokeai, musubi, simpletuner, webui
from programs.test_references import (
    READERS,
    I,
    O,
    R,
    alpha,
    base,
    error,
    lora,
    normal,
    oft,
    read,
)


def test_norms() -> None:
    weight, bias = normal(8), normal(8)
    both = {"w_norm": normal(8), "b_norm": normal(8)}
    for reader in (*READERS.values(), simpletuner):
        found = reader.read(both, weight, bias, "norm")
        assert error(found[0], weight + both["w_norm"]) < 1e-12
        assert error(found[1], bias + both["b_norm"]) < 1e-12
    alone: dict[str, Callable[[], Read | None]] = {
        name: lambda reader=reader: reader.read({"w_norm": both["w_norm"]}, weight, None, "norm")
        for name, reader in READERS.items()
    }
    with pytest.raises(Refused):
        alone.pop("webui")()
    assert all(error(found()[0], weight + both["w_norm"]) < 1e-12 for found in alone.values())


def test_differences_of_weight_and_bias() -> None:
    weight, bias = base(), normal(O)
    both = {"diff": normal(O, I), "diff_b": normal(O)}
    for reader in (*READERS.values(), simpletuner):
        found = reader.read(both, weight, bias, "linear")
        assert error(found[0], weight + both["diff"]) < 1e-12
        assert error(found[1], bias + both["diff_b"]) < 1e-12
    lone = {"diff_b": both["diff_b"]}
    assert error(comfyui.read(lone, weight, bias, "linear")[1], bias + both["diff_b"]) < 1e-12
    for reader in (webui, invokeai):
        with pytest.raises(Refused):
            reader.read(lone, weight, bias, "linear")


def tlora() -> dict[str, Tensor]:
    return {"q_layer.weight": normal(R, I), "p_layer.weight": normal(O, R), "lambda_layer": normal(1, R)}


def test_what_a_reader_does_not_know() -> None:
    weight, tensors = base(), tlora() | alpha(4.0)
    assert comfyui.read(tensors, weight, None, "linear") is None
    assert forge.read(tensors, weight, None, "linear") is None
    assert forge.read(oft() | alpha(0.0), weight, None, "linear") is None
    assert forge.accepts(12)
    assert not forge.accepts(13)
    assert musubi.read(tensors, weight, None, "linear") is None
    for reader in (webui, invokeai):
        with pytest.raises(Refused):
            read(reader, tensors, weight)
    with pytest.raises(Refused):
        read(invokeai, oft() | alpha(0.0), weight)


def test_musubi_merges_what_it_finds() -> None:
    weight = base()
    whole = {"lokr_w1": normal(4, 4), "lokr_w2": normal(6, 4)} | alpha(0.5)
    assert error(read(musubi, whole, weight), torch.kron(whole["lokr_w1"], whole["lokr_w2"])) < 1e-12
    split = {"lokr_w1_a": normal(4, 1), "lokr_w1_b": normal(1, 4), "lokr_w2": normal(6, 4)}
    for tensors in (split, {"diff": normal(O, I)}):
        assert musubi.read(tensors, weight, None, "linear") is None
    own = lora()
    assert error(read(musubi, own | {"dora_scale": normal(O, 1)}, weight), read(musubi, own, weight)) == 0
    assert musubi.read(own, weight, None, "linear", taken_for="loha") is None
    assert read(musubi, lora(kernel=(3, 3)), base(3, 3)).shape == (O, I, 3, 3)
    with pytest.raises(Refused):
        read(musubi, lora(kernel=(1, 2, 2)), base(1, 2, 2))


def test_what_simpletuner_does_not_load_again() -> None:
    weight = base()
    unbalanced = {"lokr_w1": normal(6, 4), "lokr_w2": normal(4, 4)} | alpha(1.0)
    for tensors in (unbalanced, lora() | alpha(2.0) | {"dora_scale": normal(1, I)}, lora()):
        with pytest.raises(Refused):
            read(simpletuner, tensors, weight)


def test_they_share_nothing_with_the_library() -> None:
    readers = [path for path in Path(__file__).parent.glob("*.py") if not path.name.startswith("test_")]
    assert readers
    assert not [path.name for path in readers if re.search(r"^\s*(from|import) lycoris", path.read_text(), re.M)]
