"""The setup of a run from checked inputs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from lycoris.adapters.adapter_set import AdapterSet
from lycoris.errors import ConfigError, prefix_errors
from lycoris.targeting.planning import Plan
from lycoris.training import base_model, cache, objective
from lycoris.training.console import print_verbatim
from lycoris.training.preflight import CheckedInputs
from lycoris.training.run import History, TrainingRun, build_rank_schedule, restore_run
from lycoris.training.settings import Settings

if TYPE_CHECKING:
    from rich.console import Console


def prepare_run(checked: CheckedInputs, console: Console) -> TrainingRun:
    """Load the base model, attach the adapters, encode the images, and restore the checkpoint if there is one.

    Progress and warnings about truncated captions go to `console`. Raises `ConfigError`, `PlanError` or `FileError`.
    """
    settings = checked.settings
    accelerator = _create_accelerator(settings)
    pipe = base_model.load_base_model(settings, accelerator.device)
    noise_schedule = objective.build_noise_schedule(pipe.scheduler)
    torch.manual_seed(settings.seed)
    plan = _plan_adapters(checked, pipe)
    adapters = AdapterSet.build(pipe.unet, plan)
    adapters.schedule = build_rank_schedule(checked.recipe, noise_schedule)
    adapters.set_strength(checked.recipe.multiplier)
    adapters.attach()
    if settings.gradient_checkpointing:
        pipe.unet.enable_gradient_checkpointing()
    _warn_of_truncated_captions(pipe, checked, console)
    training, held_out = _encode_images(pipe, checked, console)
    optimizer, rates = accelerator.prepare(*_create_optimizer(settings, adapters))
    run = TrainingRun(
        checked, accelerator, pipe, plan, adapters, noise_schedule, optimizer, rates, training, held_out,
        cache.encode_text(pipe, [""])[0], History(),
    )  # fmt: skip
    if checked.resume is not None:
        restore_run(run, checked.resume)
    return run


def _plan_adapters(checked: CheckedInputs, pipe: Any) -> Plan:
    with prefix_errors(checked.settings.lycoris_config):
        return checked.recipe.plan(pipe.unet)


def _create_accelerator(settings: Settings) -> Any:
    from accelerate import Accelerator
    from accelerate.utils import ProjectConfiguration

    accelerator = Accelerator(
        mixed_precision=settings.mixed_precision,
        log_with="tensorboard" if settings.report_to == "tensorboard" else None,
        project_config=ProjectConfiguration(str(settings.output_dir), str(settings.output_dir)),
    )
    if accelerator.num_processes > 1:
        raise ConfigError(
            f"training supports one process, not {accelerator.num_processes}; start it without a launcher"
        )
    return accelerator


def _create_optimizer(settings: Settings, adapters: AdapterSet) -> tuple[Any, Any]:
    from diffusers.optimization import get_scheduler

    optimizer = torch.optim.AdamW(
        list(adapters.parameters()),
        lr=settings.learning_rate,
        betas=(settings.adam_beta1, settings.adam_beta2),
        eps=settings.adam_epsilon,
        weight_decay=settings.adam_weight_decay,
    )
    rates = get_scheduler(
        settings.lr_scheduler,
        optimizer,
        num_warmup_steps=settings.lr_warmup_steps,
        num_training_steps=settings.max_train_steps,
    )
    return optimizer, rates


def _warn_of_truncated_captions(pipe: Any, checked: CheckedInputs, console: Console) -> None:
    captions = [example.caption for example in (*checked.training, *checked.held_out)]
    cut = cache.find_truncated_captions(pipe, captions)
    if cut:
        print_verbatim(
            console,
            f"{len(cut)} of {len(captions)} captions are longer than the text encoder's "
            f"{pipe.tokenizer.model_max_length} tokens and are truncated, for example {cut[0]!r}",
        )


def _encode_images(
    pipe: Any, checked: CheckedInputs, console: Console
) -> tuple[cache.CachedExamples, cache.CachedExamples | None]:
    from rich.progress import Progress

    count = len(checked.training) + len(checked.held_out)
    resolution = checked.settings.resolution
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("encoding images and captions", total=count)
        training = cache.encode_examples(pipe, checked.training, resolution, lambda n: progress.advance(task, n))
        if not checked.held_out:
            return training, None
        return training, cache.encode_examples(pipe, checked.held_out, resolution, lambda n: progress.advance(task, n))
