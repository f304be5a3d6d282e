"""What a trained adapter does, measured on its file: reloaded into a fresh pipeline, before and after."""

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
from lycoris.training.data import Example, pixels
from lycoris.training.preview import following, sampling
from lycoris.training.run import Run, schedule
from lycoris.training.sampling import Block, Pixels, draw


@dataclass(frozen=True)
class Measured:
    """Losses are None when nothing is held out; `merge_difference` is in grey levels of 0..255."""

    blocks: list[Block]
    base_loss: float | None
    adapter_loss: float | None
    merge_difference: float
    base_parameters: int
    base_bytes: int | None


def measure(run: Run, path: Path) -> Measured:
    """Load `path` into a fresh pipeline; draw all prompts at strength 0, half, full, and merged; measure the loss.

    The loss is taken at the recipe's multiplier, as in training, and full is `validation_lycoris_strength` times that.
    """
    settings = run.settings
    trained_at = run.checked.recipe.multiplier
    full = settings.validation_lycoris_strength * trained_at
    prompts = [*settings.validation_prompts, *settings.validation_prompts_outside]
    pipe = base_model.load(settings, run.accelerator.device)
    rows = [("base", _draw(pipe, prompts, run))]
    base_loss = _loss(pipe, run)
    parameters = sum(p.numel() for p in pipe.unet.parameters())

    adapters = AdapterSet.load(pipe.unet, files.read(path, pipe.unet))
    adapters.schedule = schedule(run.checked.recipe, run.noise_schedule)
    adapters.set_strength(trained_at)
    adapters.attach()
    with following(adapters):
        adapter_loss = _loss(pipe, run)
        for strength in (0.5 * full, full):
            with adapters.at(strength=strength):
                rows.append((f"adapter, strength {strength:g}", _draw(pipe, prompts, run)))
        adapters.merge(full)
        rows.append((f"merged, strength {full:g}", _draw(pipe, prompts, run)))
    difference = float(np.abs(rows[-1][1] - rows[-2][1]).max(initial=0)) * 255
    return Measured(_blocks(run, rows), base_loss, adapter_loss, difference, parameters, _file_size(settings))


def _draw(pipe: Any, prompts: Sequence[str], run: Run) -> Pixels:
    if not prompts:
        return np.zeros((0, 1, 1, 3), np.float32)
    return draw(pipe, prompts, sampling(run.settings))


def _loss(pipe: Any, run: Run) -> float | None:
    if run.held_out is None:
        return None

    def predict(noisy: torch.Tensor, timesteps: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        predicted: torch.Tensor = pipe.unet(noisy, timesteps, encoder_hidden_states=text).sample
        return predicted

    return objective.held_out_loss(predict, run.noise_schedule, run.held_out, run.accelerator.device)


def _blocks(run: Run, rows: Sequence[tuple[str, Pixels]]) -> list[Block]:
    settings = run.settings
    inside, outside = settings.validation_prompts, settings.validation_prompts_outside
    blocks = []
    if inside:
        shown = [(label, pictures[: len(inside)]) for label, pictures in rows]
        title = _title(inside, run.checked.training)
        blocks.append(Block(title, inside, [*shown, *_real("image trained on", inside, run.checked.training, run)]))
    if outside:
        shown = [(label, pictures[len(inside) :]) for label, pictures in rows]
        title = "Prompts outside the fine-tuning set: the adapter never saw these"
        blocks.append(Block(title, outside, [*shown, *_real("held-out image", outside, run.checked.held_out, run)]))
    return blocks


def _title(prompts: Sequence[str], training: Sequence[Example]) -> str:
    captions = {example.caption for example in training}
    among = sum(prompt in captions for prompt in prompts)
    if among == len(prompts):
        return "Prompts of the fine-tuning set"
    return f"Prompts, {among or 'none'} of {len(prompts)} from the fine-tuning set"


def _real(label: str, prompts: Sequence[str], examples: Sequence[Example], run: Run) -> list[tuple[str, Pixels]]:
    """The images with these captions as a row, white where there is none; no row when there are none at all."""
    by_caption = {example.caption: example for example in examples}
    if not any(prompt in by_caption for prompt in prompts):
        return []
    size = run.settings.resolution
    row = np.ones((len(prompts), size, size, 3), np.float32)
    for place, prompt in enumerate(prompts):
        with contextlib.suppress(KeyError):
            row[place] = (pixels(by_caption[prompt], size).permute(1, 2, 0).numpy() + 1) / 2
    return [(label, row)]


def _file_size(settings: Any) -> int | None:
    folder = Path(settings.pretrained_model_name_or_path) / "unet"
    return sum(path.stat().st_size for path in folder.glob("*.safetensors")) or None
