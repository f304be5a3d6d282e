"""The denoising loss for every prediction type."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler

from lycoris.errors import ConfigError
from lycoris.training.cache import CachedExamples
from lycoris.training.objective import (
    Batch,
    build_noise_schedule,
    compute_denoising_loss,
    compute_held_out_loss,
    compute_target,
)


def batch() -> Batch:
    return Batch(torch.randn(3, 4, 2, 2), torch.randn(3, 4, 2, 2), torch.tensor([10, 500, 990]), torch.zeros(3, 2, 2))


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
def test_the_target_is_what_takes_a_noisy_sample_back(kind: str) -> None:
    schedule, given = build_noise_schedule(DDIMScheduler(prediction_type=kind)), batch()
    noisy = schedule.add_noise(given.clean, given.noise, given.timesteps)
    alpha = schedule.alphas_cumprod[given.timesteps].reshape(3, 1, 1, 1).sqrt()
    sigma = (1 - alpha**2).sqrt()
    predicted = compute_target(schedule, given)
    clean = {
        "epsilon": (noisy - sigma * predicted) / alpha,
        "sample": predicted,
        "v_prediction": alpha * noisy - sigma * predicted,
    }[kind]
    torch.testing.assert_close(clean, given.clean, rtol=1e-3, atol=1e-3)


def test_a_perfect_prediction_has_no_loss() -> None:
    schedule, given = build_noise_schedule(DDIMScheduler()), batch()
    assert compute_denoising_loss(lambda *_: given.noise, schedule, given) == 0


def test_an_unknown_prediction_type_is_named() -> None:
    schedule = build_noise_schedule(DDIMScheduler())
    schedule.register_to_config(prediction_type="flow")
    with pytest.raises(ConfigError, match="'flow' is not supported"):
        compute_target(schedule, batch())


def test_the_held_out_loss_does_not_depend_on_batches_or_the_global_seed() -> None:
    schedule = build_noise_schedule(DDIMScheduler())
    data = CachedExamples(torch.randn(5, 4, 2, 2), torch.zeros(5, 2, 2))

    def loss(size: int) -> float:
        return compute_held_out_loss(lambda noisy, *_: noisy, schedule, data, torch.device("cpu"), size)

    first = loss(2)
    before = torch.get_rng_state()
    assert loss(5) == pytest.approx(first, rel=1e-5)
    assert torch.equal(before, torch.get_rng_state())
