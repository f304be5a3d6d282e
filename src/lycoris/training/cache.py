"""Everything the frozen parts of the base compute, once, before training: latents and text embeddings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from lycoris.training.data import Example, pixels

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

BATCH = 8


@dataclass(frozen=True)
class Cached:
    """What the denoiser trains on, on the CPU: latents (N, C, H, W) and text embeddings (N, L, D)."""

    latents: torch.Tensor
    text: torch.Tensor

    def __len__(self) -> int:
        return len(self.latents)


@torch.no_grad()
def encode(
    pipe: StableDiffusionPipeline,
    examples: Sequence[Example],
    resolution: int,
    advance: Callable[[int], object] = lambda _: None,
) -> Cached:
    """Encode images (the mean of the VAE's distribution, scaled as the denoiser expects) and captions.

    `advance` is called with the number of examples done.
    """
    latents, text = [], []
    for start in range(0, len(examples), BATCH):
        part = examples[start : start + BATCH]
        images = torch.stack([pixels(example, resolution) for example in part]).to(pipe.vae.device)
        latents.append((pipe.vae.encode(images).latent_dist.mean * pipe.vae.config.scaling_factor).cpu())
        text.append(encode_text(pipe, [example.caption for example in part]))
        advance(len(part))
    return Cached(torch.cat(latents), torch.cat(text))


def cut_captions(pipe: StableDiffusionPipeline, captions: Sequence[str]) -> list[str]:
    """Those of which the text encoder will see only the beginning."""
    limit = pipe.tokenizer.model_max_length
    lengths = [len(ids) for ids in pipe.tokenizer(list(captions), truncation=True, max_length=limit + 1).input_ids]
    return [caption for caption, length in zip(captions, lengths, strict=True) if length > limit]


@torch.no_grad()
def encode_text(pipe: StableDiffusionPipeline, captions: Sequence[str]) -> torch.Tensor:
    """(N, L, D): the text encoder's last hidden states, captions cut at the tokenizer's length."""
    tokens = pipe.tokenizer(
        list(captions),
        padding="max_length",
        truncation=True,
        max_length=pipe.tokenizer.model_max_length,
        return_tensors="pt",
    )
    states: torch.Tensor = pipe.text_encoder(tokens.input_ids.to(pipe.text_encoder.device))[0]
    return states.cpu()
