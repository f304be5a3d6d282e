"""A config.json of SimpleTuner's: every key is accounted for, on one screen."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from typing import Any

import pytest

from lycoris.errors import ConfigError
from lycoris.training import foreign
from lycoris.training.foreign import translate_config
from lycoris.training.settings import Settings, load_settings

TYPED: dict[str, Any] = {
    "--resume_from_checkpoint": "latest", "--data_backend_config": "config/multidatabackend.json",
    "--aspect_bucket_rounding": 2, "--seed": 42, "--minimum_image_size": 0, "--output_dir": "output/models",
    "--lora_type": "lycoris", "--lycoris_config": "config/lycoris_config.json", "--max_train_steps": 10000,
    "--num_train_epochs": 0, "--checkpoint_step_interval": 500, "--checkpoints_total_limit": 5,
    "--hub_model_id": "simpletuner-lora", "--push_to_hub": "true", "--push_checkpoints_to_hub": "true",
    "--tracker_project_name": "lora-training", "--tracker_run_name": "simpletuner-lora", "--report_to": "wandb",
    "--model_type": "lora", "--pretrained_model_name_or_path": "some/model", "--model_family": "sd1x",
    "--train_batch_size": 1, "--gradient_checkpointing": "true", "--caption_dropout_probability": 0.1,
    "--resolution_type": "pixel_area", "--resolution": 1024, "--validation_seed": 42,
    "--validation_step_interval": 500, "--validation_resolution": "1024x1024", "--validation_guidance": 3.0,
    "--validation_guidance_rescale": "0.0", "--validation_num_inference_steps": "20",
    "--validation_prompt": "a cat", "--mixed_precision": "bf16", "--optimizer": "adamw_bf16",
    "--learning_rate": "1e-4", "--lr_scheduler": "polynomial", "--lr_warmup_steps": 100,
    "--validation_torch_compile": "false", "--disable_benchmark": "false", "--use_ema": "true",
    "--ema_decay": 0.999, "--attention_mechanism": "sageattention", "--vae_batch_size": 4, "--snr_gamma": 5,
    "--base_model_precision": "int8-quanto", "--quantize_via": "cpu", "--flow_schedule_shift": 3,
    "--compress_disk_cache": "true", "--lora_rank": 16,
}  # fmt: skip
KNOWN = {name: name == "report_to" for name in Settings.model_fields}


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(TYPED | {"instance_data_dir": "images"}))
    return path


def test_every_key_is_in_one_group() -> None:
    found = translate_config(TYPED, KNOWN)
    groups = [found.kept, found.mapped, *found.ignored.values(), *found.unsupported.values()]
    assert sum(map(len, groups)) == len(TYPED) == 50
    assert found.values.keys() <= KNOWN.keys()


def test_it_is_one_screen_that_says_what_to_do(config: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_settings(config)
    text = str(caught.value)
    assert sum(len(textwrap.wrap(line, 120)) for line in text.splitlines()) <= 24
    for words in (
        "used as they are: 2", "checkpoint_step_interval → checkpointing_steps", "optimizer = adamw_bf16 → adamw",
        "hub_model_id, push_to_hub", "nothing is uploaded", "not supported: 7 keys", "use_ema = \"true\"",
        "set instance_data_dir to the folder of images", "--allow-unsupported",
    ):  # fmt: skip
        assert words in text, words


def test_it_goes_on_with_a_report_where_that_is_allowed(config: Path) -> None:
    said: list[str] = []
    read = load_settings(config, allow_unsupported=True, say=said.append)
    assert (read.learning_rate, read.gradient_checkpointing, read.validation_prompts) == (1e-4, True, ("a cat",))
    assert (read.checkpointing_steps, read.validation_steps, read.report_to) == (500, 500, "tensorboard")
    assert (read.optimizer, read.validation_num_inference_steps) == ("adamw", 20)
    assert "not supported: 7 keys" in said[0]


def test_a_config_of_this_library_says_nothing(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text('{"lycoris_config": "l", "pretrained_model_name_or_path": "b", "instance_data_dir": "i"}')
    load_settings(path, say=pytest.fail)


def test_what_is_off_asks_for_nothing() -> None:
    for value in (False, "false", 0, "none", None, "no_change", [], {}):
        assert not translate_config({"use_ema": value}, KNOWN).unsupported
    for value in (True, "true", 1, [1]):
        assert translate_config({"use_ema": value}, KNOWN).unsupported
    assert not translate_config({"loss_type": "l2", "num_processes": 1}, KNOWN).unsupported


def test_text_is_a_number_only_as_on_a_command_line() -> None:
    assert translate_config({"--learning_rate": "1e-4"}, KNOWN).values == {"learning_rate": 1e-4}
    assert translate_config({"learning_rate": "1e-4"}, KNOWN).values == {"learning_rate": "1e-4"}


def test_one_setting_under_two_names_is_refused() -> None:
    found = translate_config({"validation_steps": 1, "validation_step_interval": 2}, KNOWN)
    assert found.values == {"validation_steps": 1}
    assert "remove one of them" in next(iter(found.unsupported))


def test_no_key_of_this_library_is_taken_for_anothers() -> None:
    for table in (foreign.KEYS_WITHOUT_EFFECT, foreign.UNSUPPORTED_KEYS):
        assert foreign.RENAMED_KEYS.keys().isdisjoint(" ".join(table.values()).split())
    assert set(foreign.RENAMED_KEYS.values()) | set(foreign.EQUIVALENT_VALUES) <= set(Settings.model_fields)


def test_many_unknown_keys_are_one_short_error(tmp_path: Path) -> None:
    given = {f"nonsense_{at}": at for at in range(40)} | {f"{name}s": 1 for name in list(Settings.model_fields)[:20]}
    with pytest.raises(ConfigError) as caught:
        Settings.parse({"lycoris_config": "l", "pretrained_model_name_or_path": "b", "instance_data_dir": "i"} | given)
    lines = str(caught.value).splitlines()
    assert len(lines) <= 15
    assert "(40)" in lines[1]
    assert "did you mean 'model_type'" in lines[2]
