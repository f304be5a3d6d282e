"""One call that trains an adapter from settings to report."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lycoris.training import checkpoint, report
from lycoris.training.console import say
from lycoris.training.evaluate import measure
from lycoris.training.loop import fit
from lycoris.training.preflight import Checked, check
from lycoris.training.run import Run
from lycoris.training.settings import Settings
from lycoris.training.setup import prepare

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True)
class Outcome:
    """What a run left behind; `report` is None when Ctrl-C stopped it, and `checkpoint` is where it can go on."""

    adapter: Path
    report: report.Report | None
    checkpoint: Path | None = None


def train(settings: Settings, console: Console, *, overwrite: bool = False) -> Outcome:
    """Check, train, save the adapter, reload it from its file into a fresh pipeline, and report.

    `overwrite` replaces the run that `output_dir` holds, its checkpoints included. Raises ConfigError, PlanError or
    FileError before anything is written, and NotFiniteError when training diverges.
    """
    started = time.perf_counter()
    checked = check(settings, overwrite=overwrite)
    _announce(checked, console)
    with _fresh_accelerate():
        run = prepare(checked, console)
        say(console, str(run.plan))
        settings.output_dir.mkdir(parents=True, exist_ok=True)
        if checked.resume is None:
            # Nothing, or what `overwrite` gave up: the new run's checkpoints must not be taken for its own.
            checkpoint.remove_all(settings.output_dir)
        run.accelerator.init_trackers("logs")
        finished = fit(run, console)
        run.accelerator.end_training()
        step_saved = run.return_to_best()
        adapter = checkpoint.write_adapter(run.adapters, checked.recipe, settings.output_dir)
        if not finished:
            return Outcome(adapter, None, settings.output_dir / f"checkpoint-{run.step}")
        if step_saved != run.step:
            say(console, f"keeping the adapter of step {step_saved}, where the held-out loss was lowest")
        say(console, f"saved {adapter}; reloading it into a fresh pipeline")
        outcome = Outcome(adapter, _report(run, adapter, step_saved, started, console))
        if settings.checkpointing_steps == 0:
            checkpoint.remove_interrupted(settings.output_dir)
        return outcome


def _report(run: Run, adapter: Path, step_saved: int, started: float, console: Console) -> report.Report:
    measured = measure(run, adapter)
    numbers = report.Report(
        adapter=str(adapter),
        base=run.settings.pretrained_model_name_or_path,
        prompt=next(iter((*run.settings.validation_prompts, *(each.caption for each in run.checked.training)))),
        multiplier=run.checked.recipe.multiplier,
        steps=run.step,
        step_saved=step_saved,
        images=len(run.checked.training),
        images_held_out=len(run.checked.held_out),
        images_skipped=len(run.checked.skipped),
        layers=len(run.plan.placements),
        adapter_parameters=sum(p.numel() for p in run.adapters.parameters()),
        adapter_bytes=adapter.stat().st_size,
        base_parameters=measured.base_parameters,
        base_bytes=measured.base_bytes,
        held_out_loss_base=measured.base_loss,
        held_out_loss_adapter=measured.adapter_loss,
        merge_difference=measured.merge_difference,
        seconds_training=run.history.seconds,
        seconds_total=time.perf_counter() - started,
    )
    written = report.write(numbers, measured, run.history, run.settings.output_dir)
    report.summarise(numbers, [adapter, *written], console)
    return numbers


def _announce(checked: Checked, console: Console) -> None:
    counts = (len(checked.training), len(checked.held_out), len(checked.skipped))
    say(console, "{} images to train on, {} held out, {} skipped".format(*counts))
    for problem in checked.skipped:
        say(console, f"  skipped {problem}")
    if checked.unused:
        say(console, f"  {checked.unused}")
    if checked.resume is not None:
        say(console, f"going on from {checked.resume}")


@contextmanager
def _fresh_accelerate() -> Iterator[None]:
    """Accelerate keeps its settings for the whole process; forget them, so that a second run may choose others."""
    from accelerate.state import AcceleratorState, GradientState

    try:
        yield
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
