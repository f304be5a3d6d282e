"""The report of a run: pictures, a plot of the loss, JSON, and a summary on the console."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lycoris.training.console import print_verbatim
from lycoris.training.evaluate import Measurements
from lycoris.training.jsonfile import write_atomically, write_object
from lycoris.training.run import History
from lycoris.training.sampling import draw_grid

if TYPE_CHECKING:
    from rich.console import Console

PICTURE, PLOT, NUMBERS = "before_after.png", "loss.png", "report.json"
USAGE_TEMPLATE = """from diffusers import StableDiffusionPipeline
pipe = StableDiffusionPipeline.from_pretrained({base!r})

from lycoris import create_lycoris_from_weights
network, _ = create_lycoris_from_weights({multiplier!r}, {path!r}, pipe.unet)
network.apply_to()

pipe({prompt!r}).images[0].save({picture!r})"""


@dataclass(frozen=True)
class RunReport:
    """The results of a finished run: times in seconds, sizes in bytes, losses None when nothing was held out."""

    adapter: str
    base: str
    """Value of `pretrained_model_name_or_path`."""
    prompt: str
    """A prompt that the adapter was trained on."""
    multiplier: float
    """Strength at which the adapter was trained and its loss was measured."""
    steps: int
    step_saved: int
    """Step of the saved adapter: the last one, or with `keep_best` that of the lowest held-out loss."""
    images: int
    images_held_out: int
    images_skipped: int
    layers: int
    adapter_parameters: int
    adapter_bytes: int
    base_parameters: int
    base_bytes: int | None
    held_out_loss_base: float | None
    held_out_loss_adapter: float | None
    merge_difference: float
    """Largest difference of a pixel between merged and attached, in gray levels of 0..255."""
    seconds_training: float
    seconds_total: float


def write_report(report: RunReport, measured: Measurements, history: History, folder: Path) -> list[Path]:
    """Write the picture grid, the loss plot and report.json into a folder, and return the files written.

    Without matplotlib (`pip install "lycoris-lora[plots]"`) there is no plot, without prompts no picture.
    """
    written = [folder / NUMBERS]
    write_object({**vars(report), "losses": history.losses, "held_out": history.held_out}, folder / NUMBERS)
    if measured.blocks:
        write_atomically(folder / PICTURE, draw_grid(measured.blocks).save)
        written.append(folder / PICTURE)
    if importlib.util.find_spec("matplotlib") is not None:
        write_atomically(folder / PLOT, lambda path: draw_plot(history, path))
        written.append(folder / PLOT)
    return written


def draw_plot(history: History, path: Path) -> None:
    """Save a plot of the training loss, raw and smoothed, and of the held-out losses, as PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    steps = range(1, len(history.losses) + 1)
    axes.plot(steps, history.losses, color="tab:blue", alpha=0.2, linewidth=0.8)
    axes.plot(steps, smooth_losses(history.losses), color="tab:blue", label="training (smoothed)")
    if history.held_out:
        points = sorted(history.held_out.items())
        axes.plot(*zip(*points, strict=True), "o-", color="tab:orange", label="held out")
    axes.set(xlabel="step", ylabel="denoising loss", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, format="png", dpi=120)


def smooth_losses(values: Sequence[float], window: int = 25) -> list[float]:
    """Return the running mean over the last `window` values, over fewer at the start."""
    return [sum(part) / len(part) for i in range(len(values)) if (part := values[max(0, i + 1 - window) : i + 1])]


def print_summary(report: RunReport, written: Sequence[Path], console: Console) -> None:
    """Print the results as a table, the files written, and the code that uses the adapter."""
    from rich.syntax import Syntax
    from rich.table import Table

    table = Table(title="Result", show_header=True)
    for column in ("", "adapter", "base"):
        table.add_column(column, justify="left" if not column else "right")
    table.add_row("parameters", f"{report.adapter_parameters:,}", f"{report.base_parameters:,} (denoiser)")
    table.add_row(
        "file",
        _format_size(report.adapter_bytes),
        "-" if report.base_bytes is None else _format_size(report.base_bytes),
    )
    table.add_row(
        f"held-out loss, {report.images_held_out} images",
        _format_loss(report.held_out_loss_adapter),
        _format_loss(report.held_out_loss_base),
    )
    table.add_row("seconds of training", f"{report.seconds_training:.0f} for {report.steps} steps", "")
    if report.step_saved != report.steps:
        table.add_row("saved, lowest held-out loss", f"step {report.step_saved}", "")
    table.add_row("seconds in total", f"{report.seconds_total:.0f}", "")
    table.add_row("merged - attached, largest", f"{report.merge_difference:.3f} of 255", "")
    console.print(table)
    for path in written:
        print_verbatim(console, f"wrote {path}")
    if importlib.util.find_spec("matplotlib") is None:
        print_verbatim(console, 'no loss plot, which needs matplotlib: pip install "lycoris-lora[plots]"')
    console.print("\nUse it with this base model, or any pipeline that shares its UNet:\n")
    lines = USAGE_TEMPLATE.format(
        base=report.base,
        multiplier=report.multiplier,
        path=report.adapter,
        prompt=report.prompt,
        picture=str(Path(report.adapter).with_name("picture.png")),
    )
    console.print(Syntax(lines, "python", background_color="default"), soft_wrap=True)


def _format_size(count: int) -> str:
    return f"{count / 1e6:.2f} MB"


def _format_loss(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
