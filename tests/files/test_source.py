"""Whatever way a file is read by, its path is before the error, once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lycoris
from lycoris import files
from lycoris.errors import AttachError, ConfigError, FileError, LycorisError, prefix_errors
from lycoris.files.opening import open_file
from lycoris.files.source import open_source
from lycoris.kohya import create_network_from_weights


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))


WAYS: Mapping[str, Callable[[Path], Any]] = {
    "read": lambda path: files.read(path, net()),
    "open_file": open_file,
    "detect": files.detect,
    "convert": lambda path: files.convert(path, path.with_name("b.safetensors"), to="kohya"),
    "create_lycoris_from_weights": lambda path: lycoris.create_lycoris_from_weights(1.0, path, net()),
    "create_network_from_weights": lambda path: create_network_from_weights(1.0, path, None, None, net()),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("content", ["missing", "damaged", "strange"])
def test_the_path_is_before_the_error_once(way: str, content: str, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    if content == "damaged":
        path.write_bytes(b"\x08" + bytes(40))
    elif content == "strange":
        files.save_tensors({"something.else": torch.zeros(2)}, path, {})
    with pytest.raises(FileError) as caught:
        WAYS[way](path)
    assert str(caught.value).count(str(path)) == 1
    assert content == "missing" or str(caught.value).startswith(str(path))


def test_a_network_names_the_file_that_does_not_fit_it(tmp_path: Path) -> None:
    network = lycoris.create_lycoris(net(), 1.0, linear_dim=2, linear_alpha=1, algo="lora")
    other = lycoris.create_lycoris(net(), 1.0, linear_dim=2, linear_alpha=1, algo="loha")
    other.save_weights(tmp_path / "a.safetensors", None)
    tensors, _ = files.load_tensors(tmp_path / "a.safetensors")
    renamed = {key: tensor * float("nan") for key, tensor in network.state_dict().items()}
    files.save_tensors({**tensors, **renamed}, tmp_path / "b.safetensors", {})
    with pytest.raises(FileError) as caught:
        network.load_weights(tmp_path / "b.safetensors")
    assert str(caught.value).startswith(f"{tmp_path / 'b.safetensors'}: ")


def test_tensors_without_a_file_have_no_prefix() -> None:
    with pytest.raises(FileError, match=r"^its 1 keys are of no known format"):
        lycoris.create_lycoris_from_weights(1.0, None, net(), {"something.else": torch.zeros(2)})
    with pytest.raises(FileError, match=r"^neither a file nor"):
        lycoris.create_lycoris_from_weights(1.0, None, net())


def test_the_config_next_to_a_file_comes_with_its_header(tmp_path: Path) -> None:
    files.save_tensors({"a.lora_A.weight": torch.zeros(2, 4)}, tmp_path / "a.safetensors", {"made": "by hand"})
    (tmp_path / "adapter_config.json").write_text('{"r": 2}')
    with open_source(tmp_path / "a.safetensors") as (tensors, header):
        assert tensors.keys() == {"a.lora_A.weight"}
        assert header["made"] == "by hand"
        assert any('{"r": 2}' in text for text in header.values())


@pytest.mark.parametrize("kind", [FileError, ConfigError, AttachError])
def test_errors_keep_their_class_and_get_one_prefix(kind: type[LycorisError]) -> None:
    with pytest.raises(kind, match=r"^a: b: wrong$") as caught, prefix_errors("a"), prefix_errors("b"):
        raise kind("wrong")
    assert type(caught.value) is kind
    with pytest.raises(kind, match=r"^a is wrong$"), prefix_errors("a"):
        raise kind("a is wrong")
    with pytest.raises(kind, match=r"^wrong$"), prefix_errors(None):
        raise kind("wrong")
    with pytest.raises(RuntimeError, match=r"^wrong$"), prefix_errors("a"):
        raise RuntimeError("wrong")
