"""`lycoris plan`: known models, config.json of two libraries, and messages."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from lycoris.cli import app
from lycoris.demo.demo import DEMO_ASSETS


def run(*words: str | Path) -> Result:
    return CliRunner().invoke(app, ["plan", *map(str, words)])


def described(path: Path, **config: Any) -> Path:
    path.write_text(json.dumps(config))
    return path


def test_a_known_model_is_planned_without_its_library(tmp_path: Path) -> None:
    words = ["plan", "flux.1-dev", "--algo", "lokr", "--json", str(tmp_path / "a.json")]
    code = (
        "import sys; from lycoris.cli import app; app({words}, standalone_mode=False); "
        "print([n for n in ('diffusers', 'transformers', 'accelerate') if n in sys.modules])"
    ).replace("{words}", repr(words))
    made = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stderr
    assert "FluxTransformer2DModel: 11,901,408,320 parameters" in made.stdout
    assert "504 layers get adapters, 0 do not" in made.stdout
    assert re.search(r"base weights +23\.8 GB", made.stdout)
    assert made.stdout.endswith("[]\n")
    whole = json.loads((tmp_path / "a.json").read_text())
    assert whole["config"] == {"algo": "lokr"}
    assert whole["parameters"] == sum(layer["parameters"] for layer in whole["layers"])
    assert whole["memory"]["gradients"] == 4 * whole["parameters"]


def test_a_config_and_options_over_it(tmp_path: Path) -> None:
    config = described(tmp_path / "lycoris.json", algo="lora", linear_dim=8, dropout=0.1)
    words = ["sd-1.5", "--config", config, "--linear-dim", "2", "--set", "dora_wd=true", "--set", "algo=loha"]
    made = run(*words, "--optimizer", "sgd", "--tokens", "64", "--batch", "2", "--json", tmp_path / "a.json")
    assert made.exit_code == 0, made.output
    whole = json.loads((tmp_path / "a.json").read_text())
    asked = {"algo": "loha", "linear_dim": 2, "dropout": 0.1, "dora_wd": True}
    assert whole["config"] == asked
    assert (whole["tokens"], whole["batch"], whole["memory"]["optimizer"]) == (64, 2, 0)
    assert "in training, 2 x 64 tokens, sgd" in made.output


def test_a_diffusers_folder() -> None:
    made = run(DEMO_ASSETS / "base" / "unet", "--algo", "lora", "--linear-dim", "4")
    assert made.exit_code == 0, made.output
    assert "UNet2DConditionModel" in made.output


@pytest.mark.filterwarnings("ignore:::transformers")
@pytest.mark.parametrize("named", [{"architectures": ["LlamaForCausalLM"]}, {}], ids=["named", "by-type"])
def test_a_transformers_config(tmp_path: Path, named: dict[str, Any]) -> None:
    small = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = described(tmp_path / "config.json", model_type="llama", vocab_size=100, **small, **named)
    preset = {"target_module": ["LlamaDecoderLayer"]}
    made = run(config, "--algo", "lora", "--set", f"apply_preset={json.dumps(preset)}")
    assert made.exit_code == 0, made.output
    assert "14 layers get adapters" in made.output


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["flux.1-dve"], "did you mean 'flux.1-dev'"),
        (["sd-1.5", "--algo", "lokrr"], "did you mean 'lokr'"),
        (["sd-1.5", "--set", "dropot=0.1"], "did you mean 'dropout'"),
        (["sd-1.5", "--set", "dropout"], "NAME=VALUE"),
        (["sd-1.5", "--optimizer", "adam"], "did you mean 'adamw'"),
        (["sd-1.5", "--dtype", "bf61"], "did you mean 'bf16'"),
        (["sd-1.5", "--tokens", "0"], "tokens must be"),
        (["none/config.json"], "is no file and no folder"),
        (["sd-1.5", "--config", "none.json"], "none.json does not exist"),
        ([str(DEMO_ASSETS / "base")], "folders in it that have one: "),
    ],
    ids=lambda value: value[-1][-12:] if isinstance(value, list) else "",
)
def test_what_is_wrong_is_one_message(words: list[str], told: str) -> None:
    made = run(*words)
    assert made.exit_code == 2
    assert told in made.stderr
    assert "Traceback" not in made.output


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"a": 1}, "names no model"),
        ({"_class_name": "FluxTransformer2DModle"}, "did you mean 'FluxTransformer2DModel'"),
        ({"_class_name": "UNet2DConditionModel", "in_channels": "x"}, "no model can be built"),
        ({"architectures": ["LlamaForCausalML"]}, "did you mean 'LlamaForCausalLM'"),
        ({"model_type": "lama"}, "no model can be built"),
    ],
    ids=lambda value: str(value)[:24],
)
@pytest.mark.filterwarnings("ignore:::transformers")
def test_a_config_that_describes_no_model(tmp_path: Path, config: dict[str, Any], told: str) -> None:
    made = run(described(tmp_path / "config.json", **config))
    assert made.exit_code == 2
    assert told in made.stderr
    assert "Traceback" not in made.output


def test_the_report_replaces_nothing_unasked_and_never_what_is_read(tmp_path: Path) -> None:
    config, report = tmp_path / "l.json", tmp_path / "report.json"
    config.write_bytes(b"\xef\xbb\xbf" + json.dumps({"algo": "lokr", "linear_dim": 16}).encode())
    report.write_text("something else")
    words = ["sd-1.5", "--config", str(config), "--json"]
    refused = run(*words, str(report))
    assert refused.exit_code == 2
    assert "exists; name another file, or overwrite it with --force" in refused.stderr
    assert report.read_text() == "something else"
    assert run(*words, str(report), "--force").exit_code == 0
    assert json.loads(report.read_text())["config"]["algo"] == "lokr"
    assert "is read here" in run(*words, str(config), "--force").stderr
