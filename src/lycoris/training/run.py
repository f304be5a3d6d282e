"""Everything one training run holds, set up so that whatever can be wrong is found before anything is written."""

from __future__ import annotations

import dataclasses
import importlib.util
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
from lycoris.training import cache, checkpoint, data, families, objective
from lycoris.training.jsonfile import read_object
from lycoris.training.settings import Settings

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline
    from rich.console import Console


@dataclass(frozen=True)
class Checked:
    """The inputs of a run, checked, before the base is loaded."""

    settings: Settings
    recipe: Recipe
    training: list[data.Example]
    held_out: list[data.Example]
    skipped: list[str]
    resume: Path | None


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


def check(settings: Settings) -> Checked:
    """Everything that can be checked without loading the base; raises ConfigError, PlanError or FileError."""
    families.check(settings)
    if settings.report_to == "tensorboard" and importlib.util.find_spec("tensorboard") is None:
        raise ConfigError('report_to = "tensorboard" needs tensorboard; pip install "lycoris-lora[train]" or "none"')
    if settings.mixed_precision == "fp16" and not torch.cuda.is_available():
        raise ConfigError('mixed_precision = "fp16" needs a GPU; use "bf16" or "no"')
    recipe = Recipe.parse(read_object(settings.lycoris_config))
    found = data.read(settings.instance_data_dir, skip_unreadable=settings.skip_unreadable_images)
    training, held_out = data.split(
        found.usable,
        count=settings.num_eval_images,
        seed=settings.seed,
        inside=settings.validation_prompts,
        outside=settings.validation_prompts_outside,
    )
    resume = checkpoint.to_resume(settings.output_dir, settings.resume_from_checkpoint)
    return Checked(settings, recipe, training, held_out, found.problems, resume)


def prepare(checked: Checked, console: Console) -> Run:
    """Load the base, put the adapters on it, encode the images, and restore the checkpoint if there is one."""
    settings = checked.settings
    accelerator = _accelerator(settings)
    pipe = families.load(settings, accelerator.device)
    noise_schedule = objective.training_scheduler(pipe.scheduler)
    torch.manual_seed(settings.seed)
    plan = checked.recipe.plan(pipe.unet)
    adapters = AdapterSet.build(pipe.unet, plan)
    adapters.schedule = schedule(checked.recipe, noise_schedule)
    adapters.attach()
    if settings.gradient_checkpointing:
        pipe.unet.enable_gradient_checkpointing()
    training, held_out = _encode(pipe, checked, console)
    optimizer, rates = accelerator.prepare(*_optimizer(settings, adapters))
    run = Run(
        checked, accelerator, pipe, plan, adapters, noise_schedule, optimizer, rates, training, held_out,
        cache.encode_text(pipe, [""])[0], History(),
    )  # fmt: skip
    if checked.resume is not None:
        restore(run, checked.resume)
    return run


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
            f"{folder} is at step {state['step']} and max_train_steps is {run.settings.max_train_steps}: nothing is left"
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


def _accelerator(settings: Settings) -> Any:
    from accelerate import Accelerator
    from accelerate.utils import ProjectConfiguration

    accelerator = Accelerator(
        mixed_precision=settings.mixed_precision,
        log_with="tensorboard" if settings.report_to == "tensorboard" else None,
        project_config=ProjectConfiguration(str(settings.output_dir), str(settings.output_dir)),
    )
    if accelerator.num_processes > 1:
        raise ConfigError(
            f"training runs in one process so far, not in {accelerator.num_processes}; start it without a launcher"
        )
    return accelerator


def _optimizer(settings: Settings, adapters: AdapterSet) -> tuple[Any, Any]:
    from diffusers.optimization import get_scheduler

    optimizer = torch.optim.AdamW(
        list(adapters.parameters()),
        lr=settings.learning_rate,
        betas=(settings.adam_beta1, settings.adam_beta2),
        eps=settings.adam_epsilon,
        weight_decay=settings.adam_weight_decay,
    )
    rates = get_scheduler(settings.lr_scheduler, optimizer, settings.lr_warmup_steps, settings.max_train_steps)
    return optimizer, rates


def _encode(pipe: Any, checked: Checked, console: Console) -> tuple[cache.Cached, cache.Cached | None]:
    from rich.progress import Progress

    count = len(checked.training) + len(checked.held_out)
    resolution = checked.settings.resolution
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("encoding images and captions", total=count)
        training = cache.encode(pipe, checked.training, resolution, lambda n: progress.advance(task, n))
        if not checked.held_out:
            return training, None
        return training, cache.encode(pipe, checked.held_out, resolution, lambda n: progress.advance(task, n))
