"""`lycoris convert` and `lycoris check`, as they are typed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from lycoris import DoRA, LoKr, LoRA, write
from lycoris.algorithm import Algorithm
from lycoris.bundle import Bundle, Entry
from lycoris.cli import app
from lycoris.files.families import ARCHITECTURES
from lycoris.files.layout import Layout

RUN = CliRunner()


def made(path: Path, algorithm: Algorithm, layer: str = "*", dialect: str = "lycoris") -> Path:
    """A file for some layers of Flux.1."""
    where = Layout.known(ARCHITECTURES["flux1"], "flux.1-schnell")
    entries = {}
    for name, g in where.layers.items():
        if name.startswith("transformer_blocks.0.attn.") and g.kind == "linear":
            tensors = {slot: torch.randn(what.shape) for slot, what in algorithm.slots(g).items()}
            entries[name] = (Entry(algorithm, g, tensors),)
    write(Bundle(entries), path, dialect, model=where)
    return path


def test_convert(tmp_path: Path) -> None:
    source, target = made(tmp_path / "a.safetensors", LoRA(rank=2)), tmp_path / "out" / "b.safetensors"
    done = RUN.invoke(app, ["convert", str(source), str(target), "--to", "comfyui", "--base", "flux.1-dev"])
    assert done.exit_code == 0, done.output
    assert "from lycoris: 8 layers" in done.output
    assert done.output.splitlines()[-1] == str(target)
    keys = load_file(target)
    assert "diffusion_model.double_blocks.0.img_attn.qkv.lora_up.weight" in keys
    assert keys["diffusion_model.double_blocks.0.img_attn.qkv.alpha"] == 6


def test_convert_says_what_became_of_it(tmp_path: Path) -> None:
    source = made(tmp_path / "a.safetensors", LoKr(rank=2, factor=8))
    target = str(tmp_path / "b.safetensors")
    done = RUN.invoke(app, ["convert", str(source), target, "--to", "kohya", "--base", "flux.1-dev", "--dtype", "fp16"])
    assert "lokr became a LoRA of rank 48, exact" in done.output
    floats = {str(t.dtype) for key, t in load_file(target).items() if not key.endswith("alpha")}
    assert floats == {"torch.float16"}


def test_check(tmp_path: Path) -> None:
    source = made(tmp_path / "a.safetensors", DoRA(over=LoRA(rank=2)))
    good = RUN.invoke(app, ["check", str(source), "--for", "simpletuner", "--base", "flux.1-dev"])
    assert good.exit_code == 0, good.output
    assert "SimpleTuner reads all of it as trained." in good.output
    bad = RUN.invoke(app, ["check", str(source), "--for", "comfyui", "--base", "flux.1-dev"])
    assert bad.exit_code == 1
    assert "8 layers of dora over lora, axis out: differently: ComfyUI" in bad.output
    assert "--portable comfyui" in bad.output
    keys = RUN.invoke(app, ["check", str(source), "--for", "webui", "--base", "flux.1-dev"])
    assert keys.exit_code == 1
    assert "WebUI does not know keys of the format lycoris for flux1" in keys.output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["convert", "{a}", "{b}", "--to", "comfi"], "unknown dialect 'comfi'; did you mean 'comfyui'"),
        (["convert", "{a}", "{b}"], "say what to convert to"),
        (["convert", "{a}", "{b}", "--portable", "webiu"], "unknown program 'webiu'; did you mean 'webui'"),
        (["convert", "{none}", "{b}", "--to", "kohya"], "there is no file"),
        (["convert", "{cut}", "{b}", "--to", "kohya"], "cut"),
        (["convert", "{a}", "{b}", "--to", "kohya", "--base", "flux.1"], "unknown model 'flux.1'"),
        (["convert", "{a}", "{b}", "--to", "kohya", "--dtype", "fp8"], "unknown --dtype 'fp8'"),
        (["convert", "{a}", "{b}", "--portable", "comfyui"], "--base"),
        (["check", "{a}", "--for", "comfy"], "unknown program 'comfy'; did you mean 'comfyui'"),
        (["check", "{other}", "--for", "comfyui"], "is of no known model"),
    ],
)
def test_mistakes_are_said_and_nothing_is_written(arguments: list[str], words: str, tmp_path: Path) -> None:
    source = made(tmp_path / "a.safetensors", DoRA(over=LoRA(rank=2)))
    (tmp_path / "cut.safetensors").write_bytes(source.read_bytes()[:-10])
    save_file({"lycoris_x_y.lora_up.weight": torch.ones(2, 2)}, tmp_path / "other.safetensors")
    names = {name: str(tmp_path / f"{name}.safetensors") for name in ("a", "b", "none", "cut", "other")}
    done = RUN.invoke(app, [each.format(**names) for each in arguments])
    assert done.exit_code == 2, done.output
    assert words in done.output
    assert done.output.startswith("error: ")
    assert not (tmp_path / "b.safetensors").exists()
