"""What a trained adapter does, measured on its saved file in a freshly loaded pipeline."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lycoris import files
from lycoris.adapters.adapter_set import AdapterSet
from lycoris.training import base_model, objective
from lycoris.training.data import Example, load_pixels
from lycoris.training.preview import build_sampling, follow_pipeline_timesteps
from lycoris.training.run import TrainingRun, build_rank_schedule
from lycoris.training.sampling import PictureTable, Pixels, draw_pictures


@dataclass(frozen=True)
class Measurements:
    """Pictures and numbers of the report.

    Losses are None when nothing was held out. `merge_difference` is the largest difference of a pixel between merged
    and attached adapters, in gray levels of 0..255. `base_bytes` is None when the denoiser's files are not on this
    machine.
    """

    blocks: list[PictureTable]
    base_loss: float | None
    adapter_loss: float | None
    merge_difference: float
    base_parameters: int
    base_bytes: int | None


def measure_adapter(run: TrainingRun, path: Path) -> Measurements:
    """Load the adapter file `path` into a fresh pipeline, draw all prompts and compute the held-out loss.

    The pictures are drawn without the adapter, at half and at full strength, and merged at full strength. Full is
    `validation_lycoris_strength` times the recipe's multiplier; the loss is computed at the multiplier, as in training.
    """
    settings = run.settings
    trained_at = run.checked.recipe.multiplier
    full = settings.validation_lycoris_strength * trained_at
    prompts = [*settings.validation_prompts, *settings.validation_prompts_outside]
    pipe = base_model.load_base_model(settings, run.accelerator.device)
    rows = [("base", _draw_prompts(pipe, prompts, run))]
    base_loss = _measure_loss(pipe, run)
    parameters = sum(p.numel() for p in pipe.unet.parameters())

    adapters = AdapterSet.load(pipe.unet, files.read(path, pipe.unet))
    adapters.schedule = build_rank_schedule(run.checked.recipe, run.noise_schedule)
    adapters.set_strength(trained_at)
    adapters.attach()
    with follow_pipeline_timesteps(adapters):
        adapter_loss = _measure_loss(pipe, run)
        for strength in (0.5 * full, full):
            with adapters.at(strength=strength):
                rows.append((f"adapter, strength {strength:g}", _draw_prompts(pipe, prompts, run)))
        adapters.merge(full)
        rows.append((f"merged, strength {full:g}", _draw_prompts(pipe, prompts, run)))
    difference = float(np.abs(rows[-1][1] - rows[-2][1]).max(initial=0)) * 255
    return Measurements(
        _build_tables(run, rows), base_loss, adapter_loss, difference, parameters, _measure_denoiser_files(settings)
    )


def _draw_prompts(pipe: Any, prompts: Sequence[str], run: TrainingRun) -> Pixels:
    if not prompts:
        return np.zeros((0, 1, 1, 3), np.float32)
    return draw_pictures(pipe, prompts, build_sampling(run.settings))


def _measure_loss(pipe: Any, run: TrainingRun) -> float | None:
    if run.held_out is None:
        return None

    def predict(noisy: torch.Tensor, timesteps: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        predicted: torch.Tensor = pipe.unet(noisy, timesteps, encoder_hidden_states=text).sample
        return predicted

    return objective.compute_held_out_loss(predict, run.noise_schedule, run.held_out, run.accelerator.device)


def _build_tables(run: TrainingRun, rows: Sequence[tuple[str, Pixels]]) -> list[PictureTable]:
    settings = run.settings
    inside, outside = settings.validation_prompts, settings.validation_prompts_outside
    blocks = []
    if inside:
        shown = [(label, pictures[: len(inside)]) for label, pictures in rows]
        title = _name_table(inside, run.checked.training)
        blocks.append(
            PictureTable(
                title, inside, [*shown, *_add_real_images("image trained on", inside, run.checked.training, run)]
            )
        )
    if outside:
        shown = [(label, pictures[len(inside) :]) for label, pictures in rows]
        title = "Prompts outside the fine-tuning set: the adapter never saw these"
        blocks.append(
            PictureTable(
                title, outside, [*shown, *_add_real_images("held-out image", outside, run.checked.held_out, run)]
            )
        )
    return blocks


def _name_table(prompts: Sequence[str], training: Sequence[Example]) -> str:
    captions = {example.caption for example in training}
    among = sum(prompt in captions for prompt in prompts)
    if among == len(prompts):
        return "Prompts of the fine-tuning set"
    return f"Prompts, {among or 'none'} of {len(prompts)} from the fine-tuning set"


def _add_real_images(
    label: str, prompts: Sequence[str], examples: Sequence[Example], run: TrainingRun
) -> list[tuple[str, Pixels]]:
    """Return the images with these captions as a row, white where there is none; no row when there are none at all."""
    by_caption = {example.caption: example for example in examples}
    if not any(prompt in by_caption for prompt in prompts):
        return []
    size = run.settings.resolution
    row = np.ones((len(prompts), size, size, 3), np.float32)
    for place, prompt in enumerate(prompts):
        with contextlib.suppress(KeyError):
            row[place] = (load_pixels(by_caption[prompt], size).permute(1, 2, 0).numpy() + 1) / 2
    return [(label, row)]


def _measure_denoiser_files(settings: Any) -> int | None:
    folder = Path(settings.pretrained_model_name_or_path) / "unet"
    return sum(path.stat().st_size for path in folder.glob("*.safetensors")) or None
