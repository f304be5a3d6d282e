"""Latents and text embeddings, computed once before training by the frozen parts of the base."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from lycoris.training.data import Example, load_pixels

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

ENCODE_BATCH_SIZE = 8


@dataclass(frozen=True)
class CachedExamples:
    """What the denoiser trains on, in CPU memory.

    Latents have shape (N, C, H, W) and are scaled as the denoiser expects; text embeddings have shape (N, L, D).
    """

    latents: torch.Tensor
    text: torch.Tensor

    def __len__(self) -> int:
        return len(self.latents)


@torch.no_grad()
def encode_examples(
    pipe: StableDiffusionPipeline,
    examples: Sequence[Example],
    resolution: int,
    advance: Callable[[int], object] = lambda _: None,
) -> CachedExamples:
    """Encode images with the VAE and captions with the text encoder.

    The latents are the mean of the VAE's distribution times its scaling factor, so encoding draws no random numbers.

    Args:
        advance: Called with the number of examples after each batch of `ENCODE_BATCH_SIZE`.
    """
    latents, text = [], []
    for start in range(0, len(examples), ENCODE_BATCH_SIZE):
        part = examples[start : start + ENCODE_BATCH_SIZE]
        images = torch.stack([load_pixels(example, resolution) for example in part]).to(pipe.vae.device)
        latents.append((pipe.vae.encode(images).latent_dist.mean * pipe.vae.config.scaling_factor).cpu())
        text.append(encode_text(pipe, [example.caption for example in part]))
        advance(len(part))
    return CachedExamples(torch.cat(latents), torch.cat(text))


def find_truncated_captions(pipe: StableDiffusionPipeline, captions: Sequence[str]) -> list[str]:
    """Return the captions with more tokens than the text encoder reads.

    The limit is `model_max_length` of the tokenizer; what follows is cut off.
    """
    limit = pipe.tokenizer.model_max_length
    lengths = [len(ids) for ids in pipe.tokenizer(list(captions), truncation=True, max_length=limit + 1).input_ids]
    return [caption for caption, length in zip(captions, lengths, strict=True) if length > limit]


@torch.no_grad()
def encode_text(pipe: StableDiffusionPipeline, captions: Sequence[str]) -> torch.Tensor:
    """Return the last hidden states of the text encoder, (N, L, D), on the CPU.

    Captions are padded or truncated to the tokenizer's `model_max_length`, L.
    """
    tokens = pipe.tokenizer(
        list(captions),
        padding="max_length",
        truncation=True,
        max_length=pipe.tokenizer.model_max_length,
        return_tensors="pt",
    )
    states: torch.Tensor = pipe.text_encoder(tokens.input_ids.to(pipe.text_encoder.device))[0]
    return states.cpu()
