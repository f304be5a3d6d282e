"""Checkpoints: going on equals never having stopped, and what cannot be gone on from is refused."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from covering import select_quick
from lycoris.errors import ConfigError, FileError
from lycoris.training import checkpoint
from lycoris.training.settings import FREE_ON_RESUME, Settings
from lycoris.training.train import train_adapter

Make = Callable[..., Settings]
BARE: dict[str, Any] = {"validation_prompts": [], "validation_prompts_outside": []}


def states_equal(one: Any, two: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, two)
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(states_equal(one[key], two[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(two) and all(map(states_equal, one, two))
    return bool(one == two)


@pytest.mark.parametrize("algo", select_quick(["lora", "tlora"], "tlora"))
def test_ten_steps_equal_five_and_five_bit_for_bit(settings: Make, console: Console, algo: str) -> None:
    common = {
        **BARE,
        "max_train_steps": 10,
        "checkpointing_steps": 5,
        "lr_scheduler": "cosine",
        "lr_warmup_steps": 2,
        "gradient_accumulation_steps": 2,
    }
    whole = train_adapter(settings({"algo": algo}, **common), console)
    first = whole.adapter.parent
    second = first.with_name("second")
    shutil.copytree(first / "checkpoint-5", second / "checkpoint-5")
    torch.manual_seed(99)
    random.seed(99)
    resumed = train_adapter(
        settings({"algo": algo}, **common, output_dir="second", resume_from_checkpoint=checkpoint.LATEST), console
    )
    assert states_equal(load_file(whole.adapter), load_file(resumed.adapter))
    one, two = (
        torch.load(folder / "checkpoint-10" / checkpoint.STATE_FILE, weights_only=True) for folder in (first, second)
    )
    for state in (one, two):
        del state["history"]["seconds"]
    assert states_equal(one, two)


@pytest.mark.slow
def test_only_the_newest_are_kept(settings: Make, console: Console) -> None:
    given = settings(**BARE, max_train_steps=4, checkpointing_steps=1, checkpoints_total_limit=2)
    train_adapter(given, console)
    assert [path.name for path in checkpoint.list_checkpoints(given.output_dir)] == ["checkpoint-3", "checkpoint-4"]


def test_a_new_run_does_not_mix_with_an_earlier_ones_checkpoints(settings: Make, console: Console) -> None:
    given = settings(**BARE, checkpointing_steps=2)
    train_adapter(given, console)
    with pytest.raises(ConfigError, match=r"checkpoint-2 of an earlier run.*--resume latest"):
        train_adapter(given, console)


def test_what_cannot_be_resumed_is_refused(settings: Make, console: Console) -> None:
    bare = {**BARE, "checkpointing_steps": 2}
    given = settings(**bare)
    with pytest.raises(ConfigError, match="has no checkpoint"):
        train_adapter(given.model_copy(update={"resume_from_checkpoint": "latest"}), console)
    train_adapter(given, console)
    with pytest.raises(ConfigError, match=r"'checkpoint-9' is not a checkpoint folder; .* has checkpoint-2"):
        train_adapter(given.model_copy(update={"resume_from_checkpoint": "checkpoint-9"}), console)
    with pytest.raises(ConfigError, match="another lycoris_config"):
        train_adapter(settings({"linear_dim": 8}, **bare, resume_from_checkpoint="latest"), console)
    with pytest.raises(ConfigError, match="no steps are left"):
        train_adapter(settings(**bare, max_train_steps=2, resume_from_checkpoint="latest"), console)
    state = given.output_dir / "checkpoint-2" / checkpoint.STATE_FILE
    state.write_bytes(state.read_bytes()[:1000])
    with pytest.raises(FileError, match="cannot be read"):
        train_adapter(settings(**bare, resume_from_checkpoint="latest"), console)


def test_an_unfinished_checkpoint_is_not_seen(tmp_path: Path) -> None:
    (tmp_path / ".checkpoint-3.part").mkdir()
    (tmp_path / "checkpoint-2").mkdir()
    assert checkpoint.list_checkpoints(tmp_path) == []


def test_changed_settings_are_refused_and_all_named(settings: Make, console: Console) -> None:
    train_adapter(settings(**BARE, checkpointing_steps=2), console)
    changes = {"learning_rate": 0.5, "train_batch_size": 1, "lr_scheduler": "cosine", "seed": 7}
    with pytest.raises(ConfigError) as caught:
        train_adapter(settings(**BARE, **changes, checkpointing_steps=2, resume_from_checkpoint="latest"), console)
    for line in ("learning_rate was 0.01 and is 0.5", "train_batch_size was 2 and is 1", "seed was 42 and is 7"):
        assert line in str(caught.value)
    assert "lr_scheduler was 'constant_with_warmup' and is 'cosine'" in str(caught.value)


@pytest.mark.slow
def test_changed_captions_are_refused(settings: Make, console: Console, images: Path) -> None:
    train_adapter(settings(**BARE, checkpointing_steps=2), console)
    (images / "red.txt").write_text("a crimson ball")
    with pytest.raises(ConfigError, match="the images, their captions, or which of them are held out have changed"):
        train_adapter(settings(**BARE, checkpointing_steps=2, resume_from_checkpoint="latest"), console)


def test_what_is_shown_and_where_it_lies_may_change(settings: Make, console: Console, images: Path) -> None:
    train_adapter(settings(**BARE, checkpointing_steps=2), console)
    images.rename(images.with_name("moved"))
    changes = {"checkpointing_steps": 0, "max_train_steps": 4, "validation_steps": 3, "instance_data_dir": "moved"}
    shown = {"validation_guidance": 2.0, "validation_prompts": ["a cube"], "validation_prompts_outside": []}
    outcome = train_adapter(settings(**changes, **shown, resume_from_checkpoint="latest"), console)
    assert outcome.report is not None


def test_free_settings_are_settings() -> None:
    assert set(FREE_ON_RESUME) <= set(Settings.model_fields)


@pytest.mark.parametrize("alien", [{"step": 1}, [1, 2], {"model": torch.zeros(2)}], ids=["part", "list", "other"])
def test_a_state_of_another_program_is_refused(settings: Make, console: Console, alien: Any) -> None:
    given = settings(**BARE, resume_from_checkpoint="checkpoint-1")
    folder = given.output_dir / "checkpoint-1"
    folder.mkdir(parents=True)
    torch.save(alien, folder / checkpoint.STATE_FILE)
    with pytest.raises(FileError, match=r"is not the training state of this version; it lacks .*optimizer"):
        train_adapter(given, console)
