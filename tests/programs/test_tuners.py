"""What the table says of diffusers, on a small model of its own; and that PEFT is asked rightly."""

from __future__ import annotations

import warnings

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from torch import Tensor, nn

import tiny
from cases import perturb
from lycoris import AdapterSet, LoRA, Rule, plan
from lycoris.algorithms.base import Entry
from lycoris.algorithms.tensors import read_tensors
from lycoris.files.programs import PROGRAMS
from lycoris.files.writing import compose
from lycoris.layers.geometry import describe
from programs import Refused, tuners
from tiny import sdxl_unet

FLAT = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"
PATH = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"


def loaded(tensors: dict[str, Tensor]) -> tuple[nn.Module, nn.Module, Tensor]:
    """A layer of a UNet that loaded an adapter for it, the same layer without, and an input."""
    torch.manual_seed(0)
    unet = sdxl_unet()
    plain = nn.Linear(16, 16, bias=False)
    plain.load_state_dict(unet.get_submodule(PATH).state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        unet.load_lora_adapter({f"{PATH}.{name}": tensor for name, tensor in tensors.items()}, prefix=None)
    return unet.get_submodule(PATH), plain, torch.randn(2, 16)


def test_diffusers_runs_lora() -> None:
    up, down = torch.randn(16, 4), torch.randn(4, 16)
    layer, plain, x = loaded({"lora_A.weight": down, "lora_B.weight": up})
    assert torch.allclose(layer(x), plain(x) + x @ down.T @ up.T, atol=1e-5)


def test_diffusers_runs_dora_from_the_magnitude_vector() -> None:
    up, down, lengths = torch.randn(16, 4), torch.randn(4, 16), torch.rand(16) + 0.5
    layer, plain, x = loaded({"lora_A.weight": down, "lora_B.weight": up, "lora_magnitude_vector": lengths})
    whole = plain.weight + up @ down
    expected = x @ (whole * (lengths / whole.norm(dim=1))[:, None]).T
    assert torch.allclose(layer(x), expected, atol=1e-5)


def kohya(**tensors: Tensor) -> dict[str, Tensor]:
    names = {"up": "lora_up.weight", "down": "lora_down.weight", "mid": "lora_mid.weight"}
    return {f"{FLAT}.{names.get(name, name)}": tensor for name, tensor in tensors.items()}


def test_diffusers_refuses_cores_and_other_algorithms_in_kohya_files() -> None:
    up, down = torch.randn(16, 4), torch.randn(4, 16)
    core = kohya(up=up, down=down, mid=torch.randn(4, 4, 3, 3), alpha=torch.tensor(4.0))
    shapes = {"hada_w1_a": (16, 4), "hada_w1_b": (4, 16), "hada_w2_a": (16, 4), "hada_w2_b": (4, 16)}
    for tensors in (core, kohya(**{name: torch.randn(shape) for name, shape in shapes.items()})):
        with pytest.raises(ValueError, match="lora"):
            StableDiffusionXLPipeline.lora_state_dict(tensors, unet_config=sdxl_unet().config)


def test_diffusers_leaves_the_lengths_of_kohya_files_out(caplog: pytest.LogCaptureFixture) -> None:
    up, down = torch.randn(16, 4), torch.randn(4, 16)
    tensors = kohya(up=up, down=down, alpha=torch.tensor(4.0), dora_scale=torch.rand(16, 1))
    found, _ = StableDiffusionXLPipeline.lora_state_dict(tensors, unet_config=sdxl_unet().config)
    assert not [key for key in found if "dora" in key or "magnitude" in key]
    assert len(found) == 2


def test_peft_is_given_what_it_needs_to_be_told() -> None:
    layer, x = nn.Linear(16, 24, bias=False), torch.randn(2, 16)
    w1, w2 = torch.randn(4, 4), torch.randn(6, 4)
    for alpha in (None, torch.tensor(0.5)):
        tensors = {"lokr_w1": w1, "lokr_w2": w2} | ({} if alpha is None else {"alpha": alpha})
        bare = nn.Linear(16, 24, bias=False)
        bare.load_state_dict(layer.state_dict())
        found = tuners.output(tensors, bare, x) - layer(x)
        assert torch.allclose(found, x @ torch.kron(w1, w2).T, atol=1e-4)


def test_peft_does_not_take_a_part_of_the_tensors() -> None:
    layer, x = nn.Linear(16, 24), torch.randn(2, 16)
    with pytest.raises(Refused, match="no tuner"):
        tuners.output({"lora_up.weight": torch.randn(24, 2)}, layer, x)
    with pytest.raises(Refused, match="no factor"):
        tuners.output({"lokr_w1": torch.randn(8, 4), "lokr_w2": torch.randn(3, 4)}, layer, x)


@pytest.mark.filterwarnings("ignore:::peft", "ignore:::diffusers", "ignore:::transformers")
@pytest.mark.parametrize("dialect", ["diffusers", "kohya"])
@pytest.mark.parametrize("component", ["text_encoder", "text_encoder_2"])
def test_diffusers_reads_clip(component: str, dialect: str) -> None:
    pipeline = StableDiffusionXLPipeline(**tiny.sdxl_parts())
    encoder = getattr(pipeline, component).eval()
    lora = Rule(LoRA(rank=2, alpha=1.0 if dialect == "kohya" else 2.0), path="*self_attn*")
    adapters = AdapterSet.build(encoder, plan(encoder, lora, strict=False))
    perturb(adapters)
    x = torch.randint(0, 50, (1, 8))
    with torch.no_grad():
        plain = encoder(x)[0]
        adapters.attach()
        expected = encoder(x)[0]
        adapters.detach()
    written = compose({component: adapters.bundle()}, dialect, model={component: encoder}, family="sdxl")
    pipeline.load_lora_weights(dict(written.tensors))
    with torch.no_grad():
        found = encoder(x)[0]
    assert torch.allclose(found, expected, atol=1e-4)
    assert not torch.allclose(found, plain, atol=1e-4)
    architecture = "clip" if component == "text_encoder" else "clip-with-projection"
    assert PROGRAMS["diffusers"].find_keys(dialect, architecture) is not None


@pytest.mark.parametrize(("rank", "reads"), [(1, "as trained"), (2, "not at all")])
def test_lycoris_makes_a_whole_factor_from_half_its_size_on(rank: int, reads: str) -> None:
    """Run with lycoris-lora 4.1.3: rank 1 loads, rank 2 stops with "no attribute 'lokr_w2_a'"."""
    layer = nn.Linear(16, 16)
    geometry = describe(layer)
    assert geometry is not None
    tensors = {"lokr_w1": torch.ones(4, 4), "lokr_w2_a": torch.ones(4, rank), "lokr_w2_b": torch.ones(rank, 4)}
    algorithm, own = read_tensors(tensors | {"alpha": torch.tensor(1.0)}, geometry, "layer")
    assert PROGRAMS["simpletuner"].judge(Entry(algorithm, geometry, own)).reads == reads
