"""`keep_best`: what is saved is the adapter of the lowest held-out loss, also when a run was interrupted in between."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from lycoris.errors import ConfigError
from lycoris.training import checkpoint
from lycoris.training.preflight import check_inputs
from lycoris.training.settings import Settings
from lycoris.training.train import train_adapter

Make = Callable[..., Settings]
OVERSHOOTING: dict[str, Any] = {
    "validation_prompts": [],
    "validation_prompts_outside": [],
    "learning_rate": 1.0,
    "max_train_steps": 3,
    "eval_steps_interval": 1,
    "keep_best": True,
}
"""Steps so large that the third makes the held-out loss worse."""


def test_the_saved_adapter_has_the_lowest_loss_that_was_measured(settings: Make, console: Console) -> None:
    outcome = train_adapter(settings(**OVERSHOOTING), console)
    assert outcome.report is not None
    losses = _measured(outcome.adapter.parent)
    best = min(losses, key=losses.__getitem__)
    assert best < 3, "the case is no test if the last step is the best"
    assert outcome.report.step_saved == best
    assert outcome.report.held_out_loss_adapter == pytest.approx(losses[best], rel=1e-4)
    assert f"step {best}" in console.file.getvalue()


@pytest.mark.slow
def test_without_it_the_last_step_is_saved(settings: Make, console: Console) -> None:
    outcome = train_adapter(settings(**{**OVERSHOOTING, "keep_best": False}), console)
    assert outcome.report is not None
    assert outcome.report.step_saved == outcome.report.steps == 3
    assert outcome.report.held_out_loss_adapter == pytest.approx(_measured(outcome.adapter.parent)[3], rel=1e-4)


@pytest.mark.slow
def test_going_on_from_the_best_step_still_saves_it(settings: Make, console: Console) -> None:
    common = {**OVERSHOOTING, "checkpointing_steps": 1}
    whole = train_adapter(settings(**common), console)
    assert whole.report is not None
    best = f"checkpoint-{whole.report.step_saved}"
    second = whole.adapter.parent.with_name("second")
    shutil.copytree(whole.adapter.parent / best, second / best)
    resumed = train_adapter(settings(**common, output_dir="second", resume_from_checkpoint=checkpoint.LATEST), console)
    assert resumed.report is not None
    assert resumed.report.step_saved == whole.report.step_saved
    one, two = load_file(whole.adapter), load_file(resumed.adapter)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_it_needs_measurements(settings: Make) -> None:
    with pytest.raises(ConfigError, match="eval_steps_interval"):
        settings(keep_best=True)
    nothing_held_out = {"num_eval_images": 0, "validation_prompts_outside": []}
    with pytest.raises(ConfigError, match="no image is held out"):
        check_inputs(settings(keep_best=True, eval_steps_interval=1, **nothing_held_out))


def _measured(folder: Path) -> dict[int, float]:
    held_out = json.loads((folder / "report.json").read_text())["held_out"]
    return {int(step): loss for step, loss in held_out.items() if int(step) > 0}
