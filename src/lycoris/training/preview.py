"""Validation pictures, during training and for the report."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from lycoris.adapters.adapter_set import AdapterSet
from lycoris.training.jsonfile import write_atomically
from lycoris.training.run import TrainingRun, use_eval_mode
from lycoris.training.sampling import PictureTable, Sampling, draw_grid, draw_pictures
from lycoris.training.settings import Settings


def build_sampling(settings: Settings) -> Sampling:
    """Return the sampling settings for validation pictures, from the `validation_*` settings and `resolution`."""
    return Sampling(
        size=settings.resolution,
        steps=settings.validation_num_inference_steps,
        guidance=settings.validation_guidance,
        seed=settings.validation_seed,
        negative_prompt=settings.validation_negative_prompt,
    )


@contextmanager
def follow_pipeline_timesteps(adapters: AdapterSet) -> Iterator[None]:
    """Let adapters with a rank schedule follow the timesteps of the pipeline's calls inside the context."""
    adapters.rank_masks.follow()
    try:
        yield
    finally:
        adapters.rank_masks.unfollow()


def draw_preview(run: TrainingRun) -> None:
    """Draw the validation prompts with the current adapter, and save them to `output_dir/validation/step_<step>.png`.

    Does nothing without prompts. The denoiser is in eval mode meanwhile, and adapters with a rank schedule follow the
    sampler's timesteps.
    """
    settings = run.settings
    prompts = [*settings.validation_prompts, *settings.validation_prompts_outside]
    if not prompts:
        return
    strength = settings.validation_lycoris_strength * run.checked.recipe.multiplier
    with run.adapters.at(strength=strength), follow_pipeline_timesteps(run.adapters), use_eval_mode(run.pipe.unet):
        pictures = draw_pictures(run.pipe, prompts, build_sampling(settings))
    sheet = draw_grid([PictureTable(f"step {run.step}", prompts, [(f"strength {strength:g}", pictures)])])
    write_atomically(settings.output_dir / "validation" / f"step_{run.step:06d}.png", sheet.save)
