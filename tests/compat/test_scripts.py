"""The inference scripts that users find in trainers' documentation, on stock pipelines that are small and random.

Apart from where the components come from and the size of the picture they are as published.
"""

from __future__ import annotations

import json
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5TokenizerFast

from cases import perturb
from lycoris import RankSchedule, create_lycoris, create_lycoris_from_weights
from lycoris.adapters.saving import BaseOnlyWarning
from lycoris.files import load_tensors
from tiny import PARTS, PROMPT, denoiser

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:`torch_dtype` is deprecated:FutureWarning"),
]

RANK, STEPS = 6, 4
DTYPE = torch.float64
CLOSE = 1e-6
"""Pictures come out as float32."""

ADAPTERS: dict[str, dict[str, Any]] = {
    "lora": {"algo": "lora", "linear_dim": 4, "linear_alpha": 2.0},
    "loha": {"algo": "loha", "linear_dim": 2, "linear_alpha": 1.0},
    "lokr": {"algo": "lokr", "linear_dim": 2, "linear_alpha": 1.0, "factor": 4},
}
TLORA: dict[str, Any] = {"algo": "tlora", "linear_dim": RANK, "linear_alpha": 3.0, "tlora_min_rank": 2}
CLASSES = {"flux": ["FluxAttention"], "sdxl": ["Attention", "FeedForward"]}


def parts_of(family: str) -> dict[str, Any]:
    parts = PARTS[family][1]()
    return {name: part.to(DTYPE) if isinstance(part, nn.Module) else part for name, part in parts.items()}


def trained(family: str, config: dict[str, Any], folder: Path, *, header: bool = False) -> Path:
    """A file as a trainer leaves it, with random tensors."""
    config = {"multiplier": 1.0, **config, "apply_preset": {"target_module": CLASSES[family]}}
    network = create_lycoris(parts_of(family)[PARTS[family][2]], **config)
    perturb(network.adapters, 0.3)
    path = folder / "pytorch_lora_weights.safetensors"
    network.save_weights(path, torch.float32, {"lycoris_config": json.dumps(config)} if header else {})
    return path


def picture(pipe: Any, **options: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    settings: dict[str, Any] = {"width": 16, "height": 16, "num_inference_steps": STEPS, "guidance_scale": 3.5}
    with torch.inference_mode():
        return pipe(
            prompt=PROMPT, generator=torch.Generator().manual_seed(0), **{"output_type": "np", **settings, **options}
        ).images[0]


def made_with(family: str, weights: Path | None, way: str, config: dict[str, Any] | None = None) -> Any:
    """The picture with an adapter that was merged or applied, and with `_tlora_config` if given."""
    parts = parts_of(family)
    if weights is not None:
        wrapper, _ = create_lycoris_from_weights(1.0, weights, parts[PARTS[family][2]])
        getattr(wrapper, way)()
    pipe = PARTS[family][0](**parts)
    if config is not None:
        pipe._tlora_config = config
    return picture(pipe)


@pytest.mark.sample(1)
@pytest.mark.parametrize("algo", ADAPTERS)
def test_flux_inference_script(algo: str, tmp_path: Path) -> None:
    bfl_repo = tmp_path / "base"
    FluxPipeline(**PARTS["flux"][1]()).save_pretrained(bfl_repo)
    lycoris_safetensors_path = trained("flux", ADAPTERS[algo], tmp_path)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16

    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(bfl_repo, subfolder="scheduler")
    text_encoder = CLIPTextModel.from_pretrained(bfl_repo, subfolder="text_encoder", torch_dtype=dtype)
    # The published script gives the tokenizers a dtype too; transformers 5 then cannot save them.
    tokenizer = CLIPTokenizer.from_pretrained(bfl_repo, subfolder="tokenizer")
    text_encoder_2 = T5EncoderModel.from_pretrained(bfl_repo, subfolder="text_encoder_2", torch_dtype=dtype)
    tokenizer_2 = T5TokenizerFast.from_pretrained(bfl_repo, subfolder="tokenizer_2")
    vae = AutoencoderKL.from_pretrained(bfl_repo, subfolder="vae", torch_dtype=dtype)
    transformer = FluxTransformer2DModel.from_pretrained(bfl_repo, subfolder="transformer")

    lycoris_strength = 1.0
    wrapper, _ = create_lycoris_from_weights(lycoris_strength, lycoris_safetensors_path, transformer)
    wrapper.merge_to()
    transformer.to(device, dtype=dtype)
    pipe = FluxPipeline(
        scheduler=scheduler,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        text_encoder_2=text_encoder_2,
        tokenizer_2=tokenizer_2,
        vae=vae,
        transformer=transformer,
    )
    if device == "cuda":  # the call needs an accelerator
        pipe.enable_sequential_cpu_offload()
    image = picture(pipe, output_type="pil")
    image.save(tmp_path / "image.png")
    pipe.save_pretrained(tmp_path / "pipeline")

    again = FluxPipeline.from_pretrained(tmp_path / "pipeline", torch_dtype=dtype)
    base = FluxPipeline.from_pretrained(bfl_repo, torch_dtype=dtype)
    with Image.open(tmp_path / "image.png") as saved:
        assert np.array_equal(np.asarray(picture(again, output_type="pil")), np.asarray(saved))
        assert not np.array_equal(np.asarray(picture(base, output_type="pil")), np.asarray(saved))


@pytest.mark.sample(3)
@pytest.mark.parametrize("family", PARTS)
@pytest.mark.parametrize("algo", ADAPTERS)
def test_merged_applied_and_restored_pictures(algo: str, family: str, tmp_path: Path) -> None:
    weights = trained(family, ADAPTERS[algo], tmp_path)
    base, applied = made_with(family, None, ""), made_with(family, weights, "apply_to")
    assert np.abs(applied - base).max() > 1e-2
    assert np.abs(made_with(family, weights, "merge_to") - applied).max() < CLOSE

    parts = parts_of(family)
    pipe = PARTS[family][0](**parts)
    wrapper, _ = create_lycoris_from_weights(1.0, weights, denoiser(pipe))
    wrapper.merge_to()
    wrapper.restore()
    assert np.array_equal(picture(pipe), base)


@pytest.mark.sample(1)
@pytest.mark.parametrize("family", PARTS)
def test_tlora_script_merged_equals_applied(family: str, tmp_path: Path) -> None:
    weights = trained(family, TLORA, tmp_path)
    config = {"max_rank": RANK, "min_rank": 2, "alpha": 1.0}
    with pytest.warns(UserWarning, match="_tlora_config"):
        merged = made_with(family, weights, "merge_to", config)
    applied = made_with(family, weights, "apply_to", config)
    unmasked = made_with(family, weights, "apply_to")
    assert np.abs(merged - applied).max() < CLOSE
    assert np.abs(applied - unmasked).max() > 1e-3
    assert np.abs(applied - made_with(family, None, "")).max() > 1e-3


@pytest.mark.sample(2)
@pytest.mark.parametrize("family", PARTS)
@pytest.mark.parametrize("way", ["merge_to", "apply_to"])
def test_a_schedule_in_the_header_needs_no_tlora_config(family: str, way: str, tmp_path: Path) -> None:
    bare, headed = tmp_path / "bare", tmp_path / "headed"
    config = {"max_rank": RANK, "min_rank": 2, "alpha": 2.0}
    settings = {**TLORA, "tlora_alpha": 2.0}
    by_hand = made_with(family, trained(family, settings, bare), "apply_to", config)
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        by_header = made_with(family, trained(family, settings, headed, header=True), way)
    assert np.abs(by_header - by_hand).max() < CLOSE


@pytest.mark.parametrize("family", PARTS)
def test_merged_without_any_schedule_warns_and_counts_every_rank(family: str, tmp_path: Path) -> None:
    weights = trained(family, TLORA, tmp_path)
    with pytest.warns(UserWarning, match="without one: every rank will count at every step"):
        merged = made_with(family, weights, "merge_to")
    assert np.abs(merged - made_with(family, weights, "apply_to")).max() < CLOSE


@pytest.mark.sample(2)
@pytest.mark.parametrize("family", PARTS)
@pytest.mark.parametrize(("way", "alpha"), [("merge_to", 1.0), ("apply_to", 0.5)])
@pytest.mark.filterwarnings("ignore:merging adapters that were trained:UserWarning")
def test_every_step_has_the_ranks_of_the_schedule(family: str, way: str, alpha: float, tmp_path: Path) -> None:
    weights = trained(family, TLORA, tmp_path)
    parts = parts_of(family)
    name = PARTS[family][2]
    wrapper, _ = create_lycoris_from_weights(1.0, weights, parts[name])
    getattr(wrapper, way)()
    pipe = PARTS[family][0](**parts)
    pipe._tlora_config = {"max_rank": RANK, "min_rank": 2, "alpha": alpha}
    calls: list[tuple[Any, Any, Tensor]] = []
    hook = parts[name].register_forward_hook(
        lambda model, args, kwargs, out: calls.append((args, kwargs, out[0])), with_kwargs=True
    )
    picture(pipe)
    hook.remove()

    schedule = RankSchedule(max_rank=RANK, min_rank=2, alpha=alpha)
    ranks = [schedule.rank(float(t)) for t in pipe.scheduler.timesteps]
    assert len(calls) == len(ranks) == STEPS
    assert len(set(ranks)) > 2
    for rank, (args, kwargs, out) in zip(ranks, calls, strict=True):
        model = parts_of(family)[name]
        create_lycoris_from_weights(1.0, None, model, weights_sd=cut(weights, rank))[0].apply_to()
        with torch.inference_mode():
            assert (model(*args, **kwargs)[0] - out).abs().max() < CLOSE


def cut(weights: Path, rank: int) -> dict[str, Tensor]:
    """The tensors of a T-LoRA file of which only the first ranks have an effect, whatever the mask."""
    tensors = load_tensors(weights)[0]
    for key, tensor in tensors.items():
        if key.endswith(("_lambda", "lambda_layer")):
            tensor[..., rank:] = 0
    return tensors


@pytest.mark.sample(1)
@pytest.mark.parametrize("family", PARTS)
def test_other_max_rank_than_the_adapters_is_reported(family: str, tmp_path: Path, caplog: Any) -> None:
    made_with(family, trained(family, TLORA, tmp_path), "apply_to", {"max_rank": 64, "min_rank": 1, "alpha": 1.0})
    assert [r for r in caplog.messages if "max_rank 64" in r and str(RANK) in r]


def test_taking_tlora_config_away_takes_the_mask_away(tmp_path: Path) -> None:
    """Trainers set the attribute before validation and delete it afterwards."""
    parts = parts_of("sdxl")
    wrapper, _ = create_lycoris_from_weights(1.0, trained("sdxl", TLORA, tmp_path), parts["unet"])
    wrapper.apply_to()
    pipe = PARTS["sdxl"][0](**parts)
    unmasked = picture(pipe)
    pipe._tlora_config = {"max_rank": RANK, "min_rank": 2, "alpha": 1.0}
    assert np.abs(picture(pipe) - unmasked).max() > 1e-3
    del pipe._tlora_config
    assert np.array_equal(picture(pipe), unmasked)


@pytest.mark.parametrize("way", ["merge_to", "apply_to"])
def test_a_saved_pipeline_has_the_keys_of_the_base(way: str, tmp_path: Path) -> None:
    parts = parts_of("sdxl")
    keys = list(parts["unet"].state_dict())
    wrapper, _ = create_lycoris_from_weights(1.0, trained("sdxl", TLORA, tmp_path, header=True), parts["unet"])
    getattr(wrapper, way)()
    assert list(parts["unet"].state_dict()) == keys
    # Applied, what is saved is the base alone, and that is said.
    with pytest.warns(BaseOnlyWarning, match="UNet2D") if way == "apply_to" else nullcontext():
        PARTS["sdxl"][0](**parts).save_pretrained(tmp_path / "pipeline")
    again = PARTS["sdxl"][0].from_pretrained(tmp_path / "pipeline", torch_dtype=DTYPE)
    assert all(torch.equal(value, parts["unet"].state_dict()[key]) for key, value in again.unet.state_dict().items())
