"""Real pipelines with small random models, and adapters with an effect for them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import tiny
from cases import perturb
from lycoris import AdapterSet, LoRA, Rule, plan
from lycoris.adapters.attach import bottom
from lycoris.adapters.bundle import Bundle
from lycoris.algorithms.base import Algorithm
from lycoris.files import encode, save_tensors
from lycoris.files.peft import encode_lora_metadata, encode_peft
from lycoris.integrations.diffusers import models
from lycoris.layers.sites import Site

PIPELINES: dict[str, Callable[[], Any]] = {
    "sd": tiny.sd_pipeline,
    "flux": tiny.flux_pipeline,
    "wan": tiny.wan_pipeline,
}
DENOISER = {"sd": "unet", "flux": "transformer", "wan": "transformer"}
ATTENTION = "*[aA]tt*"


def pipeline(name: str, made: dict[str, Any]) -> Any:
    if name not in made:
        made[name] = PIPELINES[name]()
        made[name].set_progress_bar_config(disable=True)
        # As `from_pretrained` leaves them: T5 has dropout.
        for model in models(made[name]).values():
            model.eval()
    return copy.deepcopy(made[name])


def draw(pipe: Any, steps: int = 2) -> Tensor:
    frames = {"num_frames": 5} if hasattr(pipe, "transformer_2") else {}
    seed = torch.Generator().manual_seed(0)
    out = pipe("a cat", height=16, width=16, num_inference_steps=steps, generator=seed, output_type="latent", **frames)
    return out.images if hasattr(out, "images") else out.frames


def adapters(model: nn.Module, algorithm: Algorithm, seed: int = 0) -> Bundle:
    """With an effect, for the attention layers of a model."""
    torch.manual_seed(seed)
    made = AdapterSet.build(model, plan(model, Rule(algorithm, path=ATTENTION), strict=False))
    perturb(made, 0.2)
    return made.bundle()


def bundles(pipe: Any, algorithm: Algorithm | None = None) -> dict[str, Bundle]:
    algorithm = LoRA(rank=2, alpha=3.0) if algorithm is None else algorithm
    return {name: adapters(model, algorithm, at) for at, (name, model) in enumerate(models(pipe).items())}


def merged(pipe: Any, found: dict[str, Bundle], strength: Callable[[str, str], float]) -> Any:
    """The pipeline with every layer's change put into its weight by hand, at a strength by component and path."""
    for component, bundle in found.items():
        own = AdapterSet.load(models(pipe)[component], bundle)
        for path, (adapter, *_) in own.stacks.items():
            layer = own.model.get_submodule(path)
            base = bottom(Site.of(layer)).affine()
            with torch.no_grad():
                whole = adapter.adapt_affine(base)
                layer.weight.copy_(base.weight + strength(component, path) * (whole.weight - base.weight))
    return pipe


def state(pipe: Any) -> list[Any]:
    """Everything that an adapter could leave behind."""
    found: list[Any] = []
    for model in models(pipe).values():
        for path, module in model.named_modules():
            hooks = [len(module._forward_hooks), len(module._forward_pre_hooks)]
            found.append((path, type(module), id(module), hooks, sorted(module.__dict__), list(module._modules)))
        found += [(key, id(tensor)) for key, tensor in [*model.named_parameters(), *model.named_buffers()]]
    return found


def kohya(path: Path, found: dict[str, Bundle]) -> Path:
    tensors: dict[str, Tensor] = {}
    for component, bundle in found.items():
        name = "" if component in ("unet", "transformer") else component
        tensors |= encode(bundle, "kohya-diffusers", component=name)
    save_tensors(tensors, path, {})
    return path


def diffusers_file(folder: Path, found: dict[str, Bundle]) -> None:
    tensors = {
        f"{component}.{key}": tensor
        for component, bundle in found.items()
        for key, tensor in encode_peft(bundle)[0].items()
    }
    header = {"lora_adapter_metadata": encode_lora_metadata(found)}
    save_tensors(tensors, folder / "pytorch_lora_weights.safetensors", header)


def mixed(pipe: Any, denoiser: str) -> Bundle:
    """Ranks and alphas that differ from layer to layer."""
    model = models(pipe)[denoiser]
    torch.manual_seed(3)
    rules = [Rule(LoRA(rank=3, alpha=1.0), path="*to_q"), Rule(LoRA(rank=2, alpha=5.0), path="*to_v")]
    made = AdapterSet.build(model, plan(model, [*rules, Rule(LoRA(rank=4), path="*attn*")], strict=False))
    perturb(made, 0.2)
    return made.bundle()
