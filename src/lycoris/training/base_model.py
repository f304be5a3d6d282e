"""Base models: which pipelines can be trained, and how one is loaded for it."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lycoris.errors import ConfigError
from lycoris.training.settings import FAMILIES, Settings

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

PIPELINES = ("StableDiffusionPipeline",)
"""Pipeline classes of those families."""
COMPONENTS = ("scheduler", "text_encoder", "tokenizer", "unet", "vae")
"""Parts of such a pipeline that training needs; each is a folder in it."""
PACKAGES: Mapping[str, str] = {
    "accelerate": "accelerate",
    "diffusers": "diffusers",
    "PIL": "pillow",
    "transformers": "transformers",
}
"""What training imports, by module and by package name."""
PLAIN_ATTENTION_TOKENS = 1024
"""Up to this many tokens the attention matrix is small enough that plain attention costs little memory."""


def check_packages() -> None:
    """Raise ConfigError when a library that training needs is not installed."""
    missing = [package for module, package in PACKAGES.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise ConfigError(f'training needs {", ".join(missing)}; install with: pip install "lycoris-lora[train]"')


def check(settings: Settings) -> None:
    """Raise ConfigError when the base cannot be trained; reads at most the pipeline's model_index.json."""
    base = settings.pretrained_model_name_or_path
    index = _index(base)
    name = index["_class_name"]
    if name not in PIPELINES:
        raise ConfigError(
            f"pretrained_model_name_or_path = {base!r} is a {name}, which is not yet supported; "
            f"supported so far: {', '.join(PIPELINES)} (model_family {', '.join(FAMILIES)})"
        )
    lacking = [part for part in COMPONENTS if not _has(base, index, part)]
    if lacking:
        raise ConfigError(
            f"pretrained_model_name_or_path = {base!r} has no {', '.join(lacking)}; a whole pipeline has folders "
            f"{', '.join(COMPONENTS)}, each of them named in model_index.json"
        )


def load(settings: Settings, device: torch.device | str = "cpu") -> StableDiffusionPipeline:
    """The base in float32, frozen, without a safety checker and without a progress bar of its own."""
    with quiet():
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
        and (settings.resolution // pipe.vae_scale_factor) ** 2 <= PLAIN_ATTENTION_TOKENS
    ):
        use_plain_attention(pipe)
    return pipe


def use_plain_attention(pipe: StableDiffusionPipeline) -> None:
    """Matmul, softmax, matmul. On CPU the fused kernel's backward is 1.4 times slower in bfloat16, equal in float32."""
    from diffusers.models.attention_processor import AttnProcessor

    pipe.unet.set_attn_processor(AttnProcessor())


@contextmanager
def quiet() -> Iterator[None]:
    """No log lines below errors and no progress bars from diffusers and transformers; restored on the way out."""
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


def _index(base: str) -> Mapping[str, Any]:
    """The pipeline's model_index.json."""
    with quiet():
        from diffusers import DiffusionPipeline

        try:
            index: Mapping[str, Any] = DiffusionPipeline.load_config(base)
            index["_class_name"]
        except (OSError, ValueError, KeyError, TypeError):
            raise ConfigError(
                f"pretrained_model_name_or_path = {base!r} is neither a folder with a pipeline (model_index.json, "
                "unet/, vae/, ...) nor a repository that can be reached on the hub"
            ) from None
    return index


def _has(base: str, index: Mapping[str, Any], part: str) -> bool:
    named = index.get(part)
    if not isinstance(named, (list, tuple)) or None in named:
        return False
    return (Path(base) / part).is_dir() or not Path(base).is_dir()


def _check_layout(pipe: StableDiffusionPipeline) -> None:
    unet, vae = pipe.unet.config, pipe.vae.config
    if unet.in_channels != vae.latent_channels:
        raise ConfigError(
            f"the UNet takes {unet.in_channels} channels and the VAE makes {vae.latent_channels}: inpainting and "
            "depth models are not yet supported"
        )
    if unet.addition_embed_type not in (None, "text"):
        raise ConfigError(f"a UNet with addition_embed_type {unet.addition_embed_type!r} is not yet supported")
