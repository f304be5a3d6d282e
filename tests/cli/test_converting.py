"""`lycoris convert` and `lycoris check`, as they are typed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from typer.testing import CliRunner

from lycoris import DoRA, FileError, LoKr, LoRA, create_lycoris, write
from lycoris.adapters.bundle import Base, Bundle
from lycoris.algorithms.base import Algorithm, Entry
from lycoris.cli import app
from lycoris.files import convert, described, read_header
from lycoris.files.container.model_weights import BaseWeights
from lycoris.files.layout import NamedLayout
from lycoris.layers.sites import ModelSites
from lycoris.models import fingerprint, outline
from lycoris.models.families import ARCHITECTURES

RUN = CliRunner()


def made(path: Path, algorithm: Algorithm, layer: str = "*", dialect: str = "lycoris") -> Path:
    """A file for some layers of Flux.1."""
    where = NamedLayout.from_outline(ARCHITECTURES["flux1"], "flux.1-schnell")
    entries = {}
    for name, g in where.layers.items():
        if name.startswith("transformer_blocks.0.attn.") and g.kind == "linear":
            tensors = {slot: torch.randn(what.shape) for slot, what in algorithm.slots(g).items()}
            entries[name] = (Entry(algorithm, g, tensors),)
    write(Bundle(entries), path, dialect, model=where)
    return path


def test_convert(tmp_path: Path) -> None:
    source, target = made(tmp_path / "a.safetensors", LoRA(rank=2)), tmp_path / "out" / "b.safetensors"
    asked = ["convert", str(source), str(target), "--to", "comfyui", "--base", "flux.1-dev"]
    refused = RUN.invoke(app, asked)
    assert refused.exit_code == 2
    assert "its tensors would grow from 393 kB to about 688 kB (+75%)" in refused.output
    assert "--allow-growth" in refused.output
    assert not target.exists()
    done = RUN.invoke(app, [*asked, "--allow-growth"])
    assert done.exit_code == 0, done.output
    assert "from lycoris: 8 layers" in done.output
    assert "layers: 8 lora of rank 2; now 2 lora of rank 2, 2 lora of rank 6" in done.output
    assert "exact: no value was rounded" in done.output
    assert f"size: {source.stat().st_size} bytes before, {target.stat().st_size} after (+" in done.output
    assert done.output.splitlines()[-1] == str(target)
    keys = load_file(target)
    assert "diffusion_model.double_blocks.0.img_attn.qkv.lora_up.weight" in keys
    assert keys["diffusion_model.double_blocks.0.img_attn.qkv.alpha"] == 6


def test_convert_says_what_became_of_it(tmp_path: Path) -> None:
    source = made(tmp_path / "a.safetensors", LoKr(rank=2, factor=8))
    target = str(tmp_path / "b.safetensors")
    asked = ["convert", str(source), target, "--to", "kohya", "--base", "flux.1-dev", "--dtype", "fp16"]
    done = RUN.invoke(app, [*asked, "--allow-growth"])
    assert "tensors rounded to float16" in done.output
    assert "lokr became a LoRA of rank 48, exact" in done.output
    floats = {str(t.dtype) for key, t in load_file(target).items() if not key.endswith("alpha")}
    assert floats == {"torch.float16"}


def test_check(tmp_path: Path) -> None:
    source = made(tmp_path / "a.safetensors", DoRA(inner=LoRA(rank=2)))
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


def test_detect(tmp_path: Path) -> None:
    source = made(tmp_path / "a.safetensors", LoRA(rank=2))
    done = RUN.invoke(app, ["detect", str(source)])
    assert done.exit_code == 0, done.output
    assert "format      lycoris, layers named as in diffusers" in done.output
    assert "flux.1-schnell" in done.output


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
        (["check", "{other}", "--for", "comfyui"], "matches no known model"),
    ],
)
def test_mistakes_are_said_and_nothing_is_written(arguments: list[str], words: str, tmp_path: Path) -> None:
    source = made(tmp_path / "a.safetensors", DoRA(inner=LoRA(rank=2)))
    (tmp_path / "cut.safetensors").write_bytes(source.read_bytes()[:-10])
    save_file({"lycoris_x_y.lora_up.weight": torch.ones(2, 2)}, tmp_path / "other.safetensors")
    names = {name: str(tmp_path / f"{name}.safetensors") for name in ("a", "b", "none", "cut", "other")}
    done = RUN.invoke(app, [each.format(**names) for each in arguments])
    assert done.exit_code == 2, done.output
    assert words in done.output
    assert done.output.startswith("error: ")
    assert not (tmp_path / "b.safetensors").exists()


@pytest.fixture
def stranger(tmp_path: Path) -> Path:
    """A file for a model of no known family, which nobody names."""
    model = nn.ModuleDict({"a_b": nn.Linear(8, 12), "inner": nn.ModuleDict({"c": nn.Conv2d(4, 8, 3, padding="same")})})
    network = create_lycoris(model, algorithm="lokr", rank=100, factor=4)
    network.save_weights(tmp_path / "a.safetensors", None, {})
    return tmp_path / "a.safetensors"


def test_a_file_of_no_known_model_is_checked_and_converted_by_its_header(stranger: Path) -> None:
    found = RUN.invoke(app, ["check", str(stranger), "--for", "comfyui"])
    assert "its header describes the base, a ModuleDict of 2 layers" in found.output
    assert "2 layers of lokr" in found.output
    target = stranger.with_name("b.safetensors")
    done = RUN.invoke(app, ["convert", str(stranger), str(target), "--to", "bare"])
    assert done.exit_code == 0, done.output
    assert "inner.c.lokr_w1" in load_file(target)


@pytest.mark.parametrize("how", ["gone", "of another base", "no layers", "a size that is none", "too deep"])
def test_a_description_that_is_wrong_is_not_believed(stranger: Path, how: str) -> None:
    head = dict(read_header(stranger).metadata)
    layers = json.loads(head[described.DESCRIPTION_KEY])["layers"]
    damaged = {
        "gone": "",
        "of another base": json.dumps({"layers": layers[:1]}),
        "no layers": "[]",
        "a size that is none": json.dumps({"layers": [{**each, "shape": [-1, 2]} for each in layers]}),
        "too deep": "[" * 10**5,
    }[how]
    save_file(load_file(stranger), stranger, head | {described.DESCRIPTION_KEY: damaged})
    found = RUN.invoke(app, ["check", str(stranger), "--for", "comfyui"])
    assert found.exit_code == 2
    assert "--base" in found.output + found.stderr
    assert not isinstance(found.exception, ValueError)


def test_every_setting_of_a_layer_comes_back_from_a_header() -> None:
    model = nn.Sequential(
        nn.Conv2d(4, 4, 3, padding="same", padding_mode="reflect", groups=2, dilation=2),
        *(nn.Conv1d(2, 2, 3, stride=2, bias=False), nn.Linear(3, 4, bias=False), nn.Embedding(3, 4)),
        *(nn.GroupNorm(2, 4), nn.LayerNorm(4), nn.RMSNorm(4)),
    )
    base = Base("Sequential", {place.path: place.geometry for place in ModelSites(model).values()})
    told = {
        fingerprint.FINGERPRINT_KEY: str(fingerprint.fingerprint_layers(*base)),
        described.DESCRIPTION_KEY: str(described.encode_base_layers(base)),
    }
    found = described.decode_base(told)
    assert found is not None
    assert found.layers == base.layers


def test_a_known_model_needs_no_description() -> None:
    model = outline.load_model("sd-1.5")
    assert described.encode_base_layers(Base("UNet2DConditionModel", NamedLayout.from_model(model).layers)) is None


LINKS = {
    "itself": lambda one, other: other.write_bytes(one.read_bytes()) and one,
    "a symbolic link": lambda one, other: other.symlink_to(one) or other,
    "a hard link": lambda one, other: other.hardlink_to(one) or other,
}


@pytest.mark.parametrize("how", LINKS)
@pytest.mark.parametrize("to", ["bare", "peft"])
def test_the_input_is_never_the_output(stranger: Path, how: str, to: str) -> None:
    target = LINKS[how](stranger, stranger.with_name("adapter_model.safetensors"))
    if to == "peft":
        target = target.parent if how != "itself" else target
    before = stranger.read_bytes()
    done = RUN.invoke(app, ["convert", str(stranger), str(target), "--to", to, "--force"])
    assert done.exit_code == 2
    assert "the input is never the output" in done.stderr
    assert stranger.read_bytes() == before


def test_what_exists_is_written_over_only_with_force(stranger: Path) -> None:
    target = stranger.with_name("b.safetensors")
    target.write_text("something else")
    words = ["convert", str(stranger), str(target), "--to", "bare"]
    refused = RUN.invoke(app, words)
    assert refused.exit_code == 2
    assert "exists; name another, or overwrite it (--force" in refused.stderr
    assert target.read_text() == "something else"
    assert RUN.invoke(app, [*words, "--force"]).exit_code == 0
    assert load_file(target)
    lora, folder = made(stranger.with_name("lora.safetensors"), LoRA(rank=2)), stranger.with_name("folder")
    words = ["convert", str(lora), str(folder), "--to", "peft", "--base", "flux.1-dev"]
    assert [RUN.invoke(app, words).exit_code for _ in range(2)] == [0, 2]


def test_the_bases_weights_are_never_the_output(stranger: Path) -> None:
    weights = stranger.with_name("weights.safetensors")
    save_file({"a_b.weight": torch.zeros(12, 8)}, weights)
    with pytest.raises(FileError, match="never the output"):
        convert(stranger, weights, "bare", weights=BaseWeights.open(weights), overwrite=True)
