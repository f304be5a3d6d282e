"""A training run: its components, what it has measured, and its checkpoints."""

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
from lycoris.training.preflight import CheckedInputs
from lycoris.training.settings import FREE_ON_RESUME, Settings

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline


@dataclass
class History:
    """What a run has measured so far.

    `losses` has one entry per optimizer step, `held_out` maps steps to held-out losses, and `seconds` is the time spent
    in steps, without measurements and checkpoints.
    """

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
class TrainingRun:
    """A run that is ready to take steps, or has taken `step` of them."""

    checked: CheckedInputs
    accelerator: Any
    pipe: StableDiffusionPipeline
    plan: Plan
    adapters: AdapterSet
    noise_schedule: Any
    optimizer: Any
    rates: Any
    training: cache.CachedExamples
    held_out: cache.CachedExamples | None
    no_text: torch.Tensor
    history: History
    step: int = 0
    best: Best | None = None
    """Set with `keep_best`, from the first measurement on."""

    @property
    def settings(self) -> Settings:
        return self.checked.settings

    def predict(self, noisy: torch.Tensor, timesteps: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        """Return the adapted denoiser's prediction, with rank masks for these timesteps.

        The timesteps are set for this call only. Shapes as in `lycoris.training.objective.Predict`.
        """
        self.adapters.set_timesteps(timesteps)
        try:
            with self.accelerator.autocast():
                predicted: torch.Tensor = self.pipe.unet(noisy, timesteps, encoder_hidden_states=text).sample
                return predicted
        finally:
            self.adapters.set_timesteps(None)

    def held_out_loss(self) -> float | None:
        """Compute the held-out loss in eval mode.

        Returns None when nothing is held out. Timesteps and noise are the same in every call, so the values of a run
        are comparable.
        """
        if self.held_out is None:
            return None
        with use_eval_mode(self.pipe.unet):
            return objective.compute_held_out_loss(
                self.predict, self.noise_schedule, self.held_out, self.accelerator.device
            )

    def remember_if_best(self, loss: float) -> None:
        """Copy the adapter to CPU memory if `loss`, its held-out loss, is lower than any before.

        A NaN or infinite loss is never the best.
        """
        if math.isfinite(loss) and (self.best is None or loss < self.best.loss):
            adapter = {name: tensor.detach().cpu().clone() for name, tensor in self.adapters.state_dict().items()}
            self.best = Best(self.step, loss, adapter)

    def return_to_best(self) -> int:
        """Replace the adapter by the remembered one, if any, and return the step it is from.

        Without a remembered one, the adapter stays and the current step is returned.
        """
        if self.best is None:
            return self.step
        self.adapters.load_state_dict(self.best.adapter)
        return self.best.step


def save_run(run: TrainingRun, *, interrupted: bool = False) -> Path:
    """Write a checkpoint of the last step to `output_dir/checkpoint-<step>`, and return that folder.

    Checkpoints beyond `checkpoints_total_limit` are deleted, the oldest first. For `interrupted` see
    `lycoris.training.checkpoint.save_checkpoint`.
    """
    folder = run.settings.output_dir / f"checkpoint-{run.step}"
    state = {
        "step": run.step,
        "optimizer": run.optimizer.state_dict(),
        "rates": run.rates.state_dict(),
        "scaler": None if run.accelerator.scaler is None else run.accelerator.scaler.state_dict(),
        "history": dataclasses.asdict(run.history),
        "settings": _dump_binding_settings(run.settings),
        "images": _fingerprint_examples(run.checked),
        "best": None if run.best is None else vars(run.best),
    }
    checkpoint.save_checkpoint(folder, state, run.adapters, run.checked.recipe, interrupted=interrupted)
    checkpoint.prune_checkpoints(run.settings.output_dir, run.settings.checkpoints_total_limit)
    return folder


def restore_run(run: TrainingRun, folder: Path) -> None:
    """Restore a run from a checkpoint folder: adapter, optimizer, learning rates, random state and history.

    Raises `ConfigError` when settings, images or captions that decide what is trained differ from those of the
    checkpoint (settings in `FREE_ON_RESUME` may), or when no steps are left. Raises `FileError` for a damaged
    checkpoint.
    """
    state = checkpoint.load_checkpoint(folder, run.adapters, run.checked.recipe)
    if changes := _list_changes(state, run.checked):
        raise ConfigError(
            f"{folder} cannot be resumed with other settings; undo these changes, or start a new run in another "
            "output_dir:" + "".join(f"\n  {line}" for line in changes)
        )
    if state["step"] >= run.settings.max_train_steps:
        raise ConfigError(
            f"{folder} is at step {state['step']}, and max_train_steps is {run.settings.max_train_steps}: "
            "no steps are left; raise max_train_steps, or choose another output_dir for a new run"
        )
    run.optimizer.load_state_dict(state["optimizer"])
    run.rates.load_state_dict(state["rates"])
    if state["scaler"] is not None and run.accelerator.scaler is not None:
        run.accelerator.scaler.load_state_dict(state["scaler"])
    run.step, run.history = state["step"], History(**state["history"])
    if run.settings.keep_best and state["best"] is not None:
        run.best = Best(**state["best"])


def _dump_binding_settings(settings: Settings) -> dict[str, Any]:
    """Return the settings that must not change when a run is resumed."""
    return settings.model_dump(mode="json", exclude=set(FREE_ON_RESUME))


def _fingerprint_examples(checked: CheckedInputs) -> str:
    """Return the SHA-256 of the names and captions of training and held-out examples, in order; paths do not matter."""
    parts = [[(example.name, example.caption) for example in part] for part in (checked.training, checked.held_out)]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _list_changes(state: Mapping[str, Any], checked: CheckedInputs) -> list[str]:
    """Return one line for each difference between a checkpoint's run and this one."""
    then, now = state["settings"], _dump_binding_settings(checked.settings)
    lines = [
        f"{key} was {then.get(key)!r} and is {now.get(key)!r}"
        for key in sorted({*then, *now})
        if then.get(key) != now.get(key)
    ]
    if state["images"] != _fingerprint_examples(checked):
        lines.append("the images, their captions, or which of them are held out have changed")
    return lines


def build_rank_schedule(recipe: Recipe, noise_schedule: Any) -> Any:
    """Return the recipe's rank schedule over the base model's number of timesteps, or None when it has no schedule."""
    if recipe.schedule is None:
        return None
    return dataclasses.replace(recipe.schedule, steps=noise_schedule.config.num_train_timesteps)


@contextmanager
def use_eval_mode(model: torch.nn.Module) -> Iterator[None]:
    """Put a model in eval mode inside the context. The mode from before is restored on exit."""
    before = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(before)
