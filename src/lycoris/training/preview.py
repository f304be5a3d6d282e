"""Validation pictures: while training, and for the report."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from lycoris.adapters.adapter_set import AdapterSet
from lycoris.training.jsonfile import write_atomically
from lycoris.training.run import Run, evaluating
from lycoris.training.sampling import Block, Sampling, draw, grid
from lycoris.training.settings import Settings


def sampling(settings: Settings) -> Sampling:
    """How validation pictures are drawn."""
    return Sampling(
        size=settings.resolution,
        steps=settings.validation_num_inference_steps,
        guidance=settings.validation_guidance,
        seed=settings.validation_seed,
        negative_prompt=settings.validation_negative_prompt,
    )


@contextmanager
def following(adapters: AdapterSet) -> Iterator[None]:
    """Inside, adapters with a rank schedule follow the timesteps of the pipeline's calls."""
    adapters.rank_masks.follow()
    try:
        yield
    finally:
        adapters.rank_masks.unfollow()


def preview(run: Run) -> None:
    """Draw the validation prompts with the adapter as it is now, into `output_dir/validation`."""
    settings = run.settings
    prompts = [*settings.validation_prompts, *settings.validation_prompts_outside]
    if not prompts:
        return
    strength = settings.validation_lycoris_strength * run.checked.recipe.multiplier
    with run.adapters.at(strength=strength), following(run.adapters), evaluating(run.pipe.unet):
        pictures = draw(run.pipe, prompts, sampling(settings))
    sheet = grid([Block(f"step {run.step}", prompts, [(f"strength {strength:g}", pictures)])])
    write_atomically(settings.output_dir / "validation" / f"step_{run.step:06d}.png", sheet.save)
