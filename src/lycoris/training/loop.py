"""The training loop: optimizer steps, and what happens between them."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, Any

import torch

from lycoris.adapters import debug
from lycoris.errors import NotFiniteError
from lycoris.training import diagnose
from lycoris.training.interrupt import catch_interrupt
from lycoris.training.noise import draw_batch
from lycoris.training.objective import Batch, compute_denoising_loss
from lycoris.training.preview import draw_preview
from lycoris.training.run import TrainingRun, save_run

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress


def run_training_steps(run: TrainingRun, console: Console) -> bool:
    """Train to `max_train_steps`, and return whether that was reached.

    False means that Ctrl-C ended training earlier, after a complete step and a checkpoint. Raises `NotFiniteError`,
    which names the first module with a bad value, before a bad gradient reaches the adapter.
    """
    settings = run.settings
    if run.step == 0:
        _record_held_out_loss(run)
    run.pipe.unet.train()
    with catch_interrupt() as stop_asked, _create_progress_bar(console) as progress:
        task = progress.add_task("training", total=settings.max_train_steps, completed=run.step, loss="")
        while run.step < settings.max_train_steps:
            started = time.perf_counter()
            loss = take_step(run)
            run.step += 1
            run.history.losses.append(loss)
            run.history.seconds += time.perf_counter() - started
            recent = run.history.losses[-50:]
            progress.update(task, completed=run.step, loss=f"loss {sum(recent) / len(recent):.4f}")
            run.accelerator.log({"loss": loss, "learning_rate": run.rates.get_last_lr()[0]}, step=run.step)
            if stop_asked():
                save_run(run, interrupted=settings.checkpointing_steps == 0)
                return run.step >= settings.max_train_steps
            _act_between_steps(run)
    return True


def take_step(run: TrainingRun) -> float:
    """Take one optimizer step over `gradient_accumulation_steps` batches, and return their mean loss.

    Raises `NotFiniteError` for a NaN or infinite loss or gradient, with the adapter as it was before the step.
    """
    settings = run.settings
    total = 0.0
    for part in range(settings.gradient_accumulation_steps):
        batch = draw_batch(
            run.training,
            run.no_text,
            seed=settings.seed,
            index=run.step * settings.gradient_accumulation_steps + part,
            size=settings.train_batch_size,
            timesteps=run.noise_schedule.config.num_train_timesteps,
            dropout=settings.caption_dropout_probability,
        ).to(run.accelerator.device)
        loss = compute_denoising_loss(run.predict, run.noise_schedule, batch) / settings.gradient_accumulation_steps
        if not math.isfinite(loss.item()):
            raise NotFiniteError(_describe_divergence(run, f"the loss is {loss.item()}", batch))
        run.accelerator.backward(loss)
        total += loss.item()
    _clip_gradients(run, batch)
    run.optimizer.step()
    run.rates.step()
    run.optimizer.zero_grad()
    return total


def _clip_gradients(run: TrainingRun, batch: Batch) -> None:
    run.accelerator.unscale_gradients()
    # With a gradient scaler (fp16) an occasional overflow is expected, and the scaler skips that step.
    strict = run.accelerator.scaler is None
    limit = run.settings.max_grad_norm or math.inf
    try:
        torch.nn.utils.clip_grad_norm_(list(run.adapters.parameters()), limit, error_if_nonfinite=strict)
    except RuntimeError:
        raise NotFiniteError(_describe_divergence(run, "a gradient is NaN or infinite", batch)) from None


def _act_between_steps(run: TrainingRun) -> None:
    settings, last = run.settings, run.step == run.settings.max_train_steps
    if last or _is_due(run.step, settings.eval_steps_interval):
        _record_held_out_loss(run)
    if not last and _is_due(run.step, settings.validation_steps):
        draw_preview(run)
    if _is_due(run.step, settings.checkpointing_steps):
        save_run(run)


def _is_due(step: int, interval: int) -> bool:
    return interval > 0 and step % interval == 0


def _record_held_out_loss(run: TrainingRun) -> None:
    loss = run.held_out_loss()
    if loss is not None:
        run.history.held_out[run.step] = loss
        run.accelerator.log({"held_out_loss": loss}, step=run.step)
        # Before the first step the adapter has no effect.
        if run.settings.keep_best and run.step > 0:
            run.remember_if_best(loss)


def _describe_divergence(run: TrainingRun, what: str, batch: Batch) -> str:
    noisy = run.noise_schedule.add_noise(batch.clean, batch.noise, batch.timesteps)
    where = debug.first_bad_module(run.pipe.unet, lambda: run.predict(noisy, batch.timesteps, batch.text))
    where = where or debug.first_bad_tensor(run.pipe.unet) or "no module; it could not be reproduced"
    values: dict[str, Any] = {
        "learning_rate": run.settings.learning_rate,
        "mixed_precision": run.settings.mixed_precision,
    }
    return (
        f"training stopped at step {run.step + 1}: {what}. First seen in: {where}\n"
        f"Nothing was saved from this step; earlier checkpoints in {run.settings.output_dir} are usable.\n"
        + diagnose.REMEDIES.format(**values)
    )


def _create_progress_bar(console: Console) -> Progress:
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[loss]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
    )
