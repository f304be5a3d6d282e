"""A run: what its steps use, what it has measured, and its checkpoints."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lycoris.adapters.adapter_set import AdapterSet
from lycoris.errors import ConfigError
from lycoris.targeting.planning import Plan
from lycoris.targeting.recipe import Recipe
from lycoris.training import cache, checkpoint, objective
from lycoris.training.preflight import Checked
from lycoris.training.settings import FREE_ON_RESUME, Settings

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline


@dataclass
class History:
    """What a run has measured: one loss per step, held-out losses by step, and the seconds its steps took."""

    losses: list[float] = field(default_factory=list)
    held_out: dict[int, float] = field(default_factory=dict)
    seconds: float = 0.0


@dataclass(frozen=True)
class Best:
    """The adapter at the lowest held-out loss so far, in CPU memory."""

    step: int
    loss: float
    adapter: dict[str, torch.Tensor]


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
    best: Best | None = None
    """With `keep_best`, from the first measurement on."""

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

    def remember_if_best(self, loss: float) -> None:
        """Copy the adapter if its held-out loss, `loss`, is lower than any before."""
        if math.isfinite(loss) and (self.best is None or loss < self.best.loss):
            adapter = {name: tensor.detach().cpu().clone() for name, tensor in self.adapters.state_dict().items()}
            self.best = Best(self.step, loss, adapter)

    def return_to_best(self) -> int:
        """Put the remembered adapter, if any, in place of the last step's; the step that it is from."""
        if self.best is None:
            return self.step
        self.adapters.load_state_dict(self.best.adapter)
        return self.best.step


def save(run: Run, *, interrupted: bool = False) -> Path:
    """Write a checkpoint of the step just taken, and remove those beyond the limit."""
    folder = run.settings.output_dir / f"checkpoint-{run.step}"
    state = {
        "step": run.step,
        "optimizer": run.optimizer.state_dict(),
        "rates": run.rates.state_dict(),
        "scaler": None if run.accelerator.scaler is None else run.accelerator.scaler.state_dict(),
        "history": dataclasses.asdict(run.history),
        "settings": _binding(run.settings),
        "images": _fingerprint(run.checked),
        "best": None if run.best is None else vars(run.best),
    }
    checkpoint.save(folder, state, run.adapters, run.checked.recipe, interrupted=interrupted)
    checkpoint.prune(run.settings.output_dir, run.settings.checkpoints_total_limit)
    return folder


def restore(run: Run, folder: Path) -> None:
    """Set the run to where it was when `folder` was saved."""
    state = checkpoint.load(folder, run.adapters, run.checked.recipe)
    if changes := _changes(state, run.checked):
        raise ConfigError(
            f"{folder} cannot be gone on from, since this is not the run that made it; undo these changes, or train "
            "anew into another output_dir:" + "".join(f"\n  {line}" for line in changes)
        )
    if state["step"] >= run.settings.max_train_steps:
        raise ConfigError(
            f"{folder} is at step {state['step']}, and max_train_steps is {run.settings.max_train_steps}: "
            "nothing is left to do; raise max_train_steps, or choose another output_dir to train anew"
        )
    run.optimizer.load_state_dict(state["optimizer"])
    run.rates.load_state_dict(state["rates"])
    if state["scaler"] is not None and run.accelerator.scaler is not None:
        run.accelerator.scaler.load_state_dict(state["scaler"])
    run.step, run.history = state["step"], History(**state["history"])
    if run.settings.keep_best and state["best"] is not None:
        run.best = Best(**state["best"])


def _binding(settings: Settings) -> dict[str, Any]:
    """The settings that must be the same when a run goes on."""
    return settings.model_dump(mode="json", exclude=set(FREE_ON_RESUME))


def _fingerprint(checked: Checked) -> str:
    """SHA-256 of the names and captions trained on and held out, in order: the same files anywhere are the same."""
    parts = [[(example.name, example.caption) for example in part] for part in (checked.training, checked.held_out)]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _changes(state: Mapping[str, Any], checked: Checked) -> list[str]:
    """One line on everything in which a checkpoint's run differs from this one."""
    then, now = state["settings"], _binding(checked.settings)
    lines = [
        f"{key} was {then.get(key)!r} and is {now.get(key)!r}"
        for key in sorted({*then, *now})
        if then.get(key) != now.get(key)
    ]
    if state["images"] != _fingerprint(checked):
        lines.append("the images, their captions, or which of them are held out have changed")
    return lines


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
