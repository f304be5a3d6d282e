"""Base models: which pipelines can be trained, and how one is loaded."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lycoris.errors import ConfigError
from lycoris.training.settings import TRAINABLE_FAMILIES, Settings

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

SUPPORTED_PIPELINES = ("StableDiffusionPipeline",)
"""Pipeline classes that can be trained."""
PIPELINE_COMPONENTS = ("scheduler", "text_encoder", "tokenizer", "unet", "vae")
"""Components of such a pipeline that training needs, each a folder in it."""
REQUIRED_PACKAGES: Mapping[str, str] = {
    "accelerate": "accelerate",
    "diffusers": "diffusers",
    "PIL": "pillow",
    "transformers": "transformers",
}
"""Modules that training imports → the packages that provide them."""
UNFUSED_ATTENTION_TOKENS = 1024
"""Up to this many tokens, attention without the fused kernel costs little memory."""


def check_packages() -> None:
    """Raise `ConfigError` when a library that training needs is not installed.

    Imports none of them. The error names the missing packages and the command that installs them.
    """
    missing = [package for module, package in REQUIRED_PACKAGES.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise ConfigError(f'training needs {", ".join(missing)}; install with: pip install "lycoris-lora[train]"')


def check_base_model(settings: Settings) -> None:
    """Check that the base model can be trained, without loading its weights.

    Reads at most the pipeline's model_index.json. Raises `ConfigError` when there is no such pipeline, when its class
    is not supported, or when one of `PIPELINE_COMPONENTS` is missing.
    """
    base = settings.pretrained_model_name_or_path
    index = _load_model_index(base)
    name = index["_class_name"]
    if name not in SUPPORTED_PIPELINES:
        raise ConfigError(
            f"pretrained_model_name_or_path = {base!r} is a {name}, which cannot be trained yet; "
            f"supported so far: {', '.join(SUPPORTED_PIPELINES)} (model_family {', '.join(TRAINABLE_FAMILIES)})"
        )
    lacking = [part for part in PIPELINE_COMPONENTS if not _has_component(base, index, part)]
    if lacking:
        raise ConfigError(
            f"pretrained_model_name_or_path = {base!r} has no {', '.join(lacking)}; a complete pipeline has folders "
            f"{', '.join(PIPELINE_COMPONENTS)}, each listed in model_index.json"
        )


def load_base_model(settings: Settings, device: torch.device | str = "cpu") -> StableDiffusionPipeline:
    """Load the base pipeline in float32 with all parameters frozen.

    It comes without a safety checker and without a progress bar. On a CPU the fused attention kernel is turned off
    where that is faster, see `disable_fused_attention`.

    Raises `ConfigError` for a damaged pipeline, and for inpainting, depth and other variants that are not supported.
    """
    with suppress_library_output():
        from diffusers import StableDiffusionPipeline

        try:
            pipe: StableDiffusionPipeline = StableDiffusionPipeline.from_pretrained(
                settings.pretrained_model_name_or_path,
                dtype=torch.float32,  # both libraries must agree: left alone, transformers keeps a float16 file's type
                safety_checker=None,
                requires_safety_checker=False,
            )
        except Exception as error:  # a damaged part makes its library raise any type
            raise ConfigError(f"{settings.pretrained_model_name_or_path} cannot be loaded: {error}") from error
    _check_layout(pipe)
    for part in (pipe.unet, pipe.vae, pipe.text_encoder):
        part.requires_grad_(False).eval()
    pipe.set_progress_bar_config(disable=True)
    pipe.to(device)
    if (
        torch.device(device).type == "cpu"
        and (settings.resolution // pipe.vae_scale_factor) ** 2 <= UNFUSED_ATTENTION_TOKENS
    ):
        disable_fused_attention(pipe)
    return pipe


def disable_fused_attention(pipe: StableDiffusionPipeline) -> None:
    """Compute attention as matmul, softmax, matmul.

    On a CPU the backward pass of the fused kernel is 1.4 times slower in bfloat16, and equally fast in float32.
    """
    from diffusers.models.attention_processor import AttnProcessor

    pipe.unet.set_attn_processor(AttnProcessor())


@contextmanager
def suppress_library_output() -> Iterator[None]:
    """Suppress log lines below errors and progress bars of diffusers and transformers inside the context.

    The verbosity and progress bars from before are restored on exit.
    """
    from diffusers.utils import logging as of_diffusers
    from transformers.utils import logging as of_transformers

    libraries = (of_diffusers, of_transformers)
    before = [(each.get_verbosity(), each.is_progress_bar_enabled()) for each in libraries]
    for each in libraries:
        each.set_verbosity_error()
        each.disable_progress_bar()
    try:
        yield
    finally:
        for each, (verbosity, bars) in zip(libraries, before, strict=True):
            each.set_verbosity(verbosity)
            if bars:
                each.enable_progress_bar()


def _load_model_index(base: str) -> Mapping[str, Any]:
    """Return the pipeline's model_index.json."""
    with suppress_library_output():
        from diffusers import DiffusionPipeline

        try:
            index: Mapping[str, Any] = DiffusionPipeline.load_config(base)
            index["_class_name"]
        except (OSError, ValueError, KeyError, TypeError):
            raise ConfigError(
                f"pretrained_model_name_or_path = {base!r} is neither a pipeline folder (model_index.json, "
                "unet/, vae/, ...) nor a repository on the hub that can be reached"
            ) from None
    return index


def _has_component(base: str, index: Mapping[str, Any], part: str) -> bool:
    named = index.get(part)
    if not isinstance(named, (list, tuple)) or None in named:
        return False
    return (Path(base) / part).is_dir() or not Path(base).is_dir()


def _check_layout(pipe: StableDiffusionPipeline) -> None:
    unet, vae = pipe.unet.config, pipe.vae.config
    if unet.in_channels != vae.latent_channels:
        raise ConfigError(
            f"the UNet takes {unet.in_channels} channels and the VAE has {vae.latent_channels}: inpainting and "
            "depth models cannot be trained yet"
        )
    if unet.addition_embed_type not in (None, "text"):
        raise ConfigError(f"a UNet with addition_embed_type {unet.addition_embed_type!r} cannot be trained yet")
