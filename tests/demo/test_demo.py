"""The demo's assets are complete, small, attributed, and the same as the example's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lycoris.demo.demo import DEMO_ASSETS, load_demo_settings
from lycoris.training import data
from lycoris.training.base_model import suppress_library_output
from lycoris.training.checkpoint import STATE_FILE
from lycoris.training.preflight import check_inputs
from lycoris.training.settings import load_settings

EXAMPLE = Path(__file__).parents[2] / "examples" / "emoji"


def test_the_demo_trains_on_enough_images_with_the_shown_prompts_among_them(tmp_path: Path) -> None:
    given = load_demo_settings(tmp_path / "out")
    checked = check_inputs(given)
    trained = {example.caption for example in checked.training}
    held_out = {example.caption for example in checked.held_out}
    assert len(trained) >= 64
    assert set(given.validation_prompts) <= trained
    assert set(given.validation_prompts_outside) <= held_out
    assert not (tmp_path / "out").exists()


def test_what_the_user_chooses_is_put_over_the_demos_settings(tmp_path: Path) -> None:
    given = load_demo_settings(tmp_path, steps=7, resume="latest")
    assert (given.output_dir, given.max_train_steps, given.resume_from_checkpoint) == (tmp_path, 7, "latest")


def test_the_assets_are_small_and_attributed() -> None:
    files = [path for path in DEMO_ASSETS.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 15e6
    notice = (DEMO_ASSETS / "NOTICE.md").read_text()
    for word in ("Noto Emoji", "Apache-2.0", "Fluent UI Emoji", "MIT", "emojilib", "unicode-emoji-json"):
        assert word in notice


@pytest.mark.skipif(not EXAMPLE.is_dir(), reason="the examples are not part of an installed package")
def test_the_example_has_the_demos_settings() -> None:
    def values(folder: Path) -> dict[str, Any]:
        read = load_settings(folder / "config.json").model_dump()
        read["pretrained_model_name_or_path"] = Path(read["pretrained_model_name_or_path"])
        paths = {key: value.resolve() for key, value in read.items() if isinstance(value, Path)}
        return {**read, **paths, "output_dir": None}

    assert values(EXAMPLE) == values(DEMO_ASSETS) | {"lycoris_config": (EXAMPLE / "lycoris_config.json").resolve()}
    one, two = (json.loads((folder / "lycoris_config.json").read_text()) for folder in (EXAMPLE, DEMO_ASSETS))
    assert one == two


def test_every_image_of_the_sheet_can_be_read() -> None:
    assert data.read_examples(load_demo_settings(Path("unused")).instance_data_dir).problems == []


def test_it_goes_on_by_itself_from_what_an_interruption_left(tmp_path: Path) -> None:
    for step in (5, 12):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / STATE_FILE).touch()
    assert check_inputs(load_demo_settings(tmp_path)).resume == tmp_path / "checkpoint-12"
    assert check_inputs(load_demo_settings(tmp_path, resume="checkpoint-5")).resume == tmp_path / "checkpoint-5"
    assert load_demo_settings(tmp_path / "other").resume_from_checkpoint is None


@pytest.mark.parametrize(("fast", "precision"), [(True, "bf16"), (False, "no")])
def test_the_precision_is_one_that_the_machine_is_fast_in(
    fast: bool, precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lycoris.demo.demo.is_bfloat16_fast", lambda: fast)
    assert load_demo_settings(tmp_path).mixed_precision == precision


def test_the_base_draws_as_it_is_loaded_without_a_word_on_precision() -> None:
    with suppress_library_output():
        from diffusers import StableDiffusionPipeline

        pipe = StableDiffusionPipeline.from_pretrained(DEMO_ASSETS / "base")
        pipe.set_progress_bar_config(disable=True)
        assert {part.dtype for part in (pipe.unet, pipe.vae, pipe.text_encoder)} == {torch.float32}
        assert pipe("red heart, flat", num_inference_steps=2).images[0].size == (64, 64)
