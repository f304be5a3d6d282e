"""Training an adapter in one call, from settings to report."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lycoris.training import checkpoint, report
from lycoris.training.console import print_verbatim
from lycoris.training.evaluate import measure_adapter
from lycoris.training.loop import run_training_steps
from lycoris.training.preflight import CheckedInputs, check_inputs
from lycoris.training.run import TrainingRun
from lycoris.training.settings import Settings
from lycoris.training.setup import prepare_run

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True)
class Outcome:
    """What a run left behind.

    `report` is None when Ctrl-C ended the run early; `checkpoint` is then the folder from which it can be resumed.
    """

    adapter: Path
    report: report.RunReport | None
    checkpoint: Path | None = None


def train_adapter(settings: Settings, console: Console, *, overwrite: bool = False) -> Outcome:
    """Train an adapter, save it, reload the file into a fresh pipeline, and write a report.

    Progress is printed to `console`. `overwrite` replaces the run in `output_dir`, including its checkpoints.

    Raises `ConfigError`, `PlanError` or `FileError` before anything is written, and `NotFiniteError` when training
    diverges.
    """
    started = time.perf_counter()
    checked = check_inputs(settings, overwrite=overwrite)
    _announce(checked, console)
    with _reset_accelerate():
        run = prepare_run(checked, console)
        print_verbatim(console, str(run.plan))
        settings.output_dir.mkdir(parents=True, exist_ok=True)
        if checked.resume is None:
            # With `overwrite`, old checkpoints would be mistaken for those of the new run.
            checkpoint.remove_checkpoints(settings.output_dir)
        run.accelerator.init_trackers("logs")
        finished = run_training_steps(run, console)
        run.accelerator.end_training()
        step_saved = run.return_to_best()
        adapter = checkpoint.write_adapter(run.adapters, checked.recipe, settings.output_dir)
        if not finished:
            return Outcome(adapter, None, settings.output_dir / f"checkpoint-{run.step}")
        if step_saved != run.step:
            print_verbatim(console, f"using the adapter of step {step_saved}, which has the lowest held-out loss")
        print_verbatim(console, f"saved {adapter}; reloading it into a fresh pipeline")
        outcome = Outcome(adapter, _report_run(run, adapter, step_saved, started, console))
        if settings.checkpointing_steps == 0:
            checkpoint.remove_interrupted_checkpoints(settings.output_dir)
        return outcome


def _report_run(run: TrainingRun, adapter: Path, step_saved: int, started: float, console: Console) -> report.RunReport:
    measured = measure_adapter(run, adapter)
    numbers = report.RunReport(
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
    written = report.write_report(numbers, measured, run.history, run.settings.output_dir)
    report.print_summary(numbers, [adapter, *written], console)
    return numbers


def _announce(checked: CheckedInputs, console: Console) -> None:
    counts = (len(checked.training), len(checked.held_out), len(checked.skipped))
    print_verbatim(console, "{} images to train on, {} held out, {} skipped".format(*counts))
    for problem in checked.skipped:
        print_verbatim(console, f"  skipped {problem}")
    if checked.unused:
        print_verbatim(console, f"  {checked.unused}")
    if checked.resume is not None:
        print_verbatim(console, f"resuming from {checked.resume}")


@contextmanager
def _reset_accelerate() -> Iterator[None]:
    """Reset accelerate's process-wide state on exit, so that a second run may choose other settings."""
    from accelerate.state import AcceleratorState, GradientState

    try:
        yield
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
