"""`lycoris inspect`, `resize` and `combine`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from diffusers import UNet2DConditionModel
from typer.testing import CliRunner

from lycoris.cli import app
from lycoris.cli.tools import parse_size, parse_source
from lycoris.demo.demo import DEMO_ASSETS
from lycoris.errors import ConfigError
from networks import trained

UNET = DEMO_ASSETS / "base" / "unet"


def run(*args: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(each) for each in args])
    return result.exit_code, result.output


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("adapter") / "style.v1.safetensors"
    unet = UNet2DConditionModel.from_pretrained(UNET)
    trained(unet, linear_dim=4, algo="lora").save_weights(path, None, {})
    return path


def test_the_three_commands(adapter: Path, tmp_path: Path) -> None:
    code, text = run("inspect", adapter, "--base", UNET)
    assert code == 0
    assert "87 of lora rank 4" in text
    assert "‖ΔW‖/‖W‖" in text
    code, text = run("inspect", adapter, "--json")
    assert code == 0
    assert len(json.loads(text)["layers"]) == 87
    small, both = tmp_path / "small.safetensors", tmp_path / "both.safetensors"
    code, text = run("resize", adapter, small, "--rank", 2)
    assert code == 0
    assert "87 layers (87 of lora) became LoRA of rank 2" in text
    code, text = run("combine", f"{adapter}:0.7", f"{small}:-0.2", both, "--rank", 4)
    assert code == 0
    assert "became LoRA of rank 4" in text
    assert run("combine", adapter, both)[0] == 2
    assert run("combine", adapter, both, "--force")[0] == 0


@pytest.mark.parametrize(
    "wrong",
    [
        ["resize", "IN", "OUT"],
        ["resize", "IN", "OUT", "--size", "much"],
        ["resize", "IN", "OUT", "--rank", "0"],
        ["combine", "IN"],
    ],
)
def test_wrong_commands_write_nothing(wrong: list[str], adapter: Path, tmp_path: Path) -> None:
    target = tmp_path / "out.safetensors"
    code, text = run(*(str(adapter) if each == "IN" else str(target) if each == "OUT" else each for each in wrong))
    assert code == 2
    assert "error:" in text
    assert not target.exists()


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("a:0.7", ("a", 0.7)),
        ("a", ("a", 1.0)),
        ("c:\\a", ("c:\\a", 1.0)),
        ("v1:b:-2", ("v1:b", -2.0)),
        (":1", (":1", 1.0)),
    ],
)
def test_strengths(text: str, found: tuple[str, float]) -> None:
    assert parse_source(text) == found


@pytest.mark.parametrize(
    ("text", "found"), [("20MB", 20_000_000), ("1.5 GB", 1_500_000_000), ("300k", 300_000), ("7", 7)]
)
def test_sizes(text: str, found: int) -> None:
    assert parse_size(text) == found


@pytest.mark.parametrize("text", ["", "MB", "much", "1XB", "inf"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(ConfigError, match="is no size"):
        parse_size(text)
