"""The denoising loss: how far the model's prediction is from what the noise schedule asks for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F

from lycoris.errors import ConfigError
from lycoris.training.cache import Cached

EVALUATED_AT = (0.05, 0.2, 0.35, 0.5, 0.65, 0.8, 0.95)
"""The held-out loss is the mean over these parts of the noise schedule (0 clean, 1 pure noise)."""
EVALUATION_SEED = 5

Predict: TypeAlias = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(noisy latents (B, C, H, W), timesteps (B,), text (B, L, D)) -> prediction (B, C, H, W)."""


@dataclass(frozen=True)
class Batch:
    """Clean latents (B, C, H, W), noise of the same shape, timesteps (B,) and text (B, L, D)."""

    clean: torch.Tensor
    noise: torch.Tensor
    timesteps: torch.Tensor
    text: torch.Tensor

    def to(self, device: torch.device) -> Batch:
        return Batch(*(value.to(device) for value in (self.clean, self.noise, self.timesteps, self.text)))


def training_scheduler(pipe_scheduler: Any) -> Any:
    """The noise schedule that the pipeline's sampler was configured from."""
    from diffusers import DDPMScheduler

    return DDPMScheduler.from_config(pipe_scheduler.config)


def target(scheduler: Any, batch: Batch) -> torch.Tensor:
    """What the model should predict: the noise ε, the clean sample, or v = √ᾱ·ε − √(1−ᾱ)·x₀."""
    kind = scheduler.config.prediction_type
    if kind == "epsilon":
        return batch.noise
    if kind == "sample":
        return batch.clean
    if kind == "v_prediction":
        velocity: torch.Tensor = scheduler.get_velocity(batch.clean, batch.noise, batch.timesteps)
        return velocity
    raise ConfigError(
        f"the scheduler's prediction_type {kind!r} is not known; expected epsilon, sample or v_prediction"
    )


def denoising_loss(predict: Predict, scheduler: Any, batch: Batch) -> torch.Tensor:
    """Mean squared error of the prediction, in float32."""
    noisy = scheduler.add_noise(batch.clean, batch.noise, batch.timesteps)
    return F.mse_loss(predict(noisy, batch.timesteps, batch.text).float(), target(scheduler, batch).float())


@torch.no_grad()
def held_out_loss(predict: Predict, scheduler: Any, data: Cached, device: torch.device, batch_size: int = 16) -> float:
    """Mean loss over `data` at fixed timesteps with fixed noise: the same question to every model."""
    generator = torch.Generator().manual_seed(EVALUATION_SEED)
    steps = scheduler.config.num_train_timesteps
    total = 0.0
    places = range(0, len(data), batch_size)
    for part in EVALUATED_AT:
        noise = torch.randn(data.latents.shape, generator=generator)
        timesteps = torch.full((len(data),), int(part * steps))
        for rows in (slice(start, start + batch_size) for start in places):
            batch = Batch(data.latents[rows], noise[rows], timesteps[rows], data.text[rows]).to(device)
            total += denoising_loss(predict, scheduler, batch).item() * len(batch.clean)
    return total / (len(data) * len(EVALUATED_AT))
