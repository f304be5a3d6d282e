"""A run: what its steps use, what it has measured, and its checkpoints."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lycoris.adapters import AdapterSet
from lycoris.errors import ConfigError
from lycoris.planning import Plan
from lycoris.recipe import Recipe
from lycoris.training import cache, checkpoint, objective
from lycoris.training.inputs import Checked
from lycoris.training.settings import Settings

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline


@dataclass
class History:
    """What a run has measured: one loss per step, held-out losses by step, and the seconds its steps took."""

    losses: list[float] = field(default_factory=list)
    held_out: dict[int, float] = field(default_factory=dict)
    seconds: float = 0.0


@dataclass
class Run:
    """A run that can take steps."""

    checked: Checked
    accelerator: Any
    pipe: StableDiffusionPipeline
    plan: Plan
    adapters: AdapterSet
    noise_schedule: Any
    optimizer: Any
    rates: Any
    training: cache.Cached
    held_out: cache.Cached | None
    no_text: torch.Tensor
    history: History
    step: int = 0

    @property
    def settings(self) -> Settings:
        return self.checked.settings

    def predict(self, noisy: torch.Tensor, timesteps: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        """The adapted denoiser. The timesteps are in force only for this call."""
        self.adapters.set_timesteps(timesteps)
        try:
            with self.accelerator.autocast():
                predicted: torch.Tensor = self.pipe.unet(noisy, timesteps, encoder_hidden_states=text).sample
                return predicted
        finally:
            self.adapters.set_timesteps(None)

    def held_out_loss(self) -> float | None:
        """None when nothing is held out."""
        if self.held_out is None:
            return None
        with evaluating(self.pipe.unet):
            return objective.held_out_loss(self.predict, self.noise_schedule, self.held_out, self.accelerator.device)


def save(run: Run) -> Path:
    """Write a checkpoint of the step just taken, and remove those beyond the limit."""
    folder = run.settings.output_dir / f"checkpoint-{run.step}"
    state = {
        "step": run.step,
        "optimizer": run.optimizer.state_dict(),
        "rates": run.rates.state_dict(),
        "scaler": None if run.accelerator.scaler is None else run.accelerator.scaler.state_dict(),
        "history": dataclasses.asdict(run.history),
    }
    checkpoint.save(folder, state, run.adapters, run.checked.recipe)
    checkpoint.prune(run.settings.output_dir, run.settings.checkpoints_total_limit)
    return folder


def restore(run: Run, folder: Path) -> None:
    """Set the run to where it was when `folder` was saved."""
    state = checkpoint.load(folder, run.adapters, run.checked.recipe)
    if state["step"] >= run.settings.max_train_steps:
        raise ConfigError(
            f"{folder} is at step {state['step']}, and max_train_steps is {run.settings.max_train_steps}: "
            "nothing is left to do"
        )
    run.optimizer.load_state_dict(state["optimizer"])
    run.rates.load_state_dict(state["rates"])
    if state["scaler"] is not None and run.accelerator.scaler is not None:
        run.accelerator.scaler.load_state_dict(state["scaler"])
    run.step, run.history = state["step"], History(**state["history"])


def schedule(recipe: Recipe, noise_schedule: Any) -> Any:
    """The recipe's rank schedule over as many timesteps as the base was trained with; None when it has none."""
    if recipe.schedule is None:
        return None
    return dataclasses.replace(recipe.schedule, steps=noise_schedule.config.num_train_timesteps)


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode inside; the mode before is put back."""
    before = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(before)
