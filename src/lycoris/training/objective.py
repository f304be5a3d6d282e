"""The denoising loss: the distance between the model's prediction and the target of the noise schedule."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F

from lycoris.errors import ConfigError
from lycoris.training.cache import CachedExamples

EVALUATED_AT = (0.05, 0.2, 0.35, 0.5, 0.65, 0.8, 0.95)
"""Fractions of the noise schedule over which the held-out loss is averaged: 0 is clean, 1 pure noise."""
EVALUATION_SEED = 5

Predict: TypeAlias = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(noisy latents (B, C, H, W), timesteps (B,), text (B, L, D)) -> prediction (B, C, H, W)."""


@dataclass(frozen=True)
class Batch:
    """One batch: clean latents (B, C, H, W), noise of the same shape, timesteps (B,) and text embeddings (B, L, D)."""

    clean: torch.Tensor
    noise: torch.Tensor
    timesteps: torch.Tensor
    text: torch.Tensor

    def to(self, device: torch.device) -> Batch:
        """Return the batch on a device."""
        return Batch(*(value.to(device) for value in (self.clean, self.noise, self.timesteps, self.text)))


def build_noise_schedule(pipe_scheduler: Any) -> Any:
    """Return a `DDPMScheduler` with the noise schedule that the pipeline's sampler is configured with."""
    from diffusers import DDPMScheduler

    return DDPMScheduler.from_config(pipe_scheduler.config)


def compute_target(scheduler: Any, batch: Batch) -> torch.Tensor:
    """Return what the model should predict, by `prediction_type` of the scheduler.

    "epsilon" is the noise ε, "sample" the clean latents x₀, "v_prediction" the velocity v = √ᾱ·ε - √(1-ᾱ)·x₀
    (arXiv:2202.00512). Raises `ConfigError` for another type.
    """
    kind = scheduler.config.prediction_type
    if kind == "epsilon":
        return batch.noise
    if kind == "sample":
        return batch.clean
    if kind == "v_prediction":
        velocity: torch.Tensor = scheduler.get_velocity(batch.clean, batch.noise, batch.timesteps)
        return velocity
    raise ConfigError(
        f"the scheduler's prediction_type {kind!r} is not supported; expected epsilon, sample or v_prediction"
    )


def compute_denoising_loss(predict: Predict, scheduler: Any, batch: Batch) -> torch.Tensor:
    """Return the mean squared error between prediction and target, computed in float32.

    `predict` gets the clean latents with noise added at `batch.timesteps`. The mean is over all elements of the batch.
    """
    noisy = scheduler.add_noise(batch.clean, batch.noise, batch.timesteps)
    return F.mse_loss(predict(noisy, batch.timesteps, batch.text).float(), compute_target(scheduler, batch).float())


@torch.no_grad()
def compute_held_out_loss(
    predict: Predict, scheduler: Any, data: CachedExamples, device: torch.device, batch_size: int = 16
) -> float:
    """Return the mean loss over `data` at fixed timesteps and with fixed noise, the same for every model.

    The timesteps are the fractions `EVALUATED_AT` of the noise schedule; the noise depends only on `EVALUATION_SEED`
    and on the number of examples. The global random state is not used.
    """
    generator = torch.Generator().manual_seed(EVALUATION_SEED)
    steps = scheduler.config.num_train_timesteps
    total = 0.0
    places = range(0, len(data), batch_size)
    for part in EVALUATED_AT:
        noise = torch.randn(data.latents.shape, generator=generator)
        timesteps = torch.full((len(data),), int(part * steps))
        for rows in (slice(start, start + batch_size) for start in places):
            batch = Batch(data.latents[rows], noise[rows], timesteps[rows], data.text[rows]).to(device)
            total += compute_denoising_loss(predict, scheduler, batch).item() * len(batch.clean)
    return total / (len(data) * len(EVALUATED_AT))
