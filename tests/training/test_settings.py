"""Config files: what is read, and how every kind of mistake is explained."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lycoris.errors import ConfigError
from lycoris.training import base_model
from lycoris.training.settings import Settings, load_settings

NEEDED = {"lycoris_config": "l.json", "pretrained_model_name_or_path": "base", "instance_data_dir": "images"}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"learning_rte": 0.1}, ["learning_rte", "did you mean 'learning_rate'", "0.1"]),
        ({"max_train_steps": "many"}, ["max_train_steps = 'many'", "integer"]),
        ({"gradient_checkpointing": "true"}, ["gradient_checkpointing = 'true'", "boolean"]),
        ({"learning_rate": "1e-4"}, ["learning_rate = '1e-4'", "number"]),
        ({"learning_rate": 0}, ["learning_rate = 0", "greater than 0"]),
        ({"learning_rate": float("inf")}, ["learning_rate = inf", "finite"]),
        ({"validation_guidance": float("nan")}, ["validation_guidance = nan", "finite"]),
        ({"validation_lycoris_strength": float("inf")}, ["validation_lycoris_strength = inf", "finite"]),
        ({"seed": 2**70}, ["seed = ", "less than 9223372036854775808"]),
        ({"validation_seed": 2**63}, ["validation_seed = ", "less than"]),
        ({"resolution": 33}, ["resolution = 33", "multiple of 8"]),
        ({"lr_scheduler": "cosin"}, ["lr_scheduler = 'cosin'", "'cosine'"]),
        ({"model_type": "full"}, ["model_type = 'full'", "'lora'"]),
        ({"lora_type": "standard"}, ["lora_type = 'standard'", "'lycoris'"]),
        ({"model_family": "flux"}, ["model_family = 'flux'", "cannot be trained yet", "sd1x"]),
        ({"validation_prompts": "a cat"}, ["validation_prompts = 'a cat'"]),
        ({"validation_prompts": ["cat"], "validation_prompts_outside": ["cat"]}, ["cat", "remove them from one"]),
    ],
)
def test_a_mistake_names_key_and_value(changes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        Settings.parse({**NEEDED, **changes})
    assert all(word in str(caught.value) for word in words), caught.value


def test_every_mistake_is_named_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        Settings.parse({"seed": -1, "optimiser": "adamw"})
    text = str(caught.value)
    for word in ("seed = -1", "did you mean 'optimizer'", "lycoris_config is missing"):
        assert word in text


def test_every_field_is_documented() -> None:
    assert [name for name, field in Settings.model_fields.items() if not field.description] == []


def test_keys_may_have_dashes_as_on_a_command_line() -> None:
    assert Settings.parse({**NEEDED, "--seed": 7}).seed == 7


def test_settings_do_not_change() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Settings.parse(NEEDED).seed = 1  # type: ignore[misc]


def test_paths_are_relative_to_the_file_and_overrides_are_not(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    path = tmp_path / "config.json"
    path.write_text(json.dumps(NEEDED))
    read = load_settings(path, {"output_dir": Path("here")})
    assert read.lycoris_config == tmp_path / "l.json"
    assert read.pretrained_model_name_or_path == str(tmp_path / "base")
    assert read.output_dir == Path("here")


def test_a_repository_name_stays_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**NEEDED, "pretrained_model_name_or_path": "owner/model"}))
    assert load_settings(path).pretrained_model_name_or_path == "owner/model"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{\n  "seed": 1,\n}', "line 3, column 1"),
        ("[1]", "expected an object"),
        ('{"seed": ' + "1" * 5000 + "}", "cannot be read as JSON"),
        ('{"seed": 1, "seed": 2}', "'seed' appears twice"),
    ],
)
def test_bad_json_says_where(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=words):
        load_settings(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nothing\.json does not exist"):
        load_settings(tmp_path / "nothing.json")


def test_another_pipeline_class_is_not_yet_supported(settings: Callable[..., Settings], tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    with pytest.raises(ConfigError, match="FluxPipeline, which cannot be trained yet"):
        base_model.check_base_model(settings(pretrained_model_name_or_path=str(tmp_path)))


def test_a_folder_without_a_pipeline_is_refused(settings: Callable[..., Settings], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="neither a pipeline folder"):
        base_model.check_base_model(settings(pretrained_model_name_or_path=str(tmp_path)))


@pytest.mark.parametrize(
    ("given", "read"),
    [
        ("latest", "latest"),
        ("runs/checkpoint-5", "{folder}/runs/checkpoint-5"),
        ("here", "{folder}/here"),
        ("checkpoint-5", "checkpoint-5"),
        ("/elsewhere/checkpoint-5", "/elsewhere/checkpoint-5"),
    ],
)
def test_a_checkpoint_in_a_file_is_relative_to_it_or_a_name_in_output_dir(
    tmp_path: Path, given: str, read: str
) -> None:
    (tmp_path / "here").mkdir()
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**NEEDED, "resume_from_checkpoint": given}))
    assert load_settings(path).resume_from_checkpoint == read.format(folder=tmp_path)
    assert load_settings(path, {"resume_from_checkpoint": "runs/x"}).resume_from_checkpoint == "runs/x"


@pytest.mark.parametrize("text", ["[]", "3", '"StableDiffusionPipeline"', "{"])
def test_an_index_that_is_none_is_refused(settings: Callable[..., Settings], tmp_path: Path, text: str) -> None:
    (tmp_path / "model_index.json").write_text(text)
    with pytest.raises(ConfigError, match="neither a pipeline folder"):
        base_model.check_base_model(settings(pretrained_model_name_or_path=str(tmp_path)))


def test_a_missing_part_of_the_base_is_named(settings: Callable[..., Settings], base: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(base, copy)
    shutil.rmtree(copy / "tokenizer")
    with pytest.raises(ConfigError, match="has no tokenizer;"):
        base_model.check_base_model(settings(pretrained_model_name_or_path="copy"))
    index = json.loads((copy / "model_index.json").read_text())
    (copy / "model_index.json").write_text(json.dumps({**index, "vae": [None, None]}))
    with pytest.raises(ConfigError, match="has no tokenizer, vae;"):
        base_model.check_base_model(settings(pretrained_model_name_or_path="copy"))


def test_a_damaged_part_of_the_base_is_an_error_without_a_trace(
    settings: Callable[..., Settings], base: Path, tmp_path: Path
) -> None:
    shutil.copytree(base, tmp_path / "copy")
    (tmp_path / "copy" / "unet" / "config.json").write_text("[]")
    with pytest.raises(ConfigError, match="cannot be loaded"):
        base_model.load_base_model(settings(pretrained_model_name_or_path="copy"))
