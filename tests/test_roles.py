"""`Attention` and `FeedForward` in a config are parts of a known family's blocks, whatever they are called there."""

from __future__ import annotations

import re

import pytest
from torch import nn

from lycoris.layers.sites import ModelSites, class_name
from lycoris.models import outline
from lycoris.models.families import DENOISERS
from lycoris.targeting.planning import Plan
from lycoris.targeting.recipe import Recipe

CONFIG = {"algo": "lora", "linear_dim": 2, "apply_preset": {"target_module": ["Attention", "FeedForward"]}}
BESIDE = re.compile(r"norm|mod|ada|(^|\.)proj_(in|out)$|pooler|caption|text_fusion\.projector")
"""What else there is in a block: modulations, and in UNets the layers around the blocks."""


def reached(model: nn.Module, config: dict = CONFIG) -> tuple[set[str], Plan]:
    made = Recipe.parse(config).plan(model)
    return {each.path for each in made.placements}, made


@pytest.mark.sample(10)
@pytest.mark.parametrize("name", [model for each in DENOISERS for model in each.outlines[:1]])
def test_every_layer_of_a_block_but_its_modulations(name: str) -> None:
    model = outline.load_model(name)
    (known,) = (each for each in DENOISERS if name in each.outlines)
    roots = [path for path, module in model.named_modules() if class_name(module) in known.blocks]
    inside = {
        site.path
        for site in ModelSites(model).values()
        if site.geometry.kind in ("linear", "conv") and any(site.path.startswith(f"{root}.") for root in roots)
    }
    got, _ = reached(model)
    singles = {path for path in inside if re.fullmatch(r"single_transformer_blocks\.\d+\.proj_out", path)}
    assert {path for path in inside - got if not BESIDE.search(path)} == set()
    assert singles <= got


def flux() -> nn.Module:
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        axes_dims_rope=(4, 4, 8),
    )


def test_what_a_name_means_is_told() -> None:
    got, made = reached(flux())
    assert len(got) == 12 + 2 * 5
    assert not any("norm" in path for path in got)
    told = "\n".join(made.remarks)
    assert "'Attention' means FluxAttention too: FluxTransformer2DModel has these for it" in told
    assert "'FeedForward' means FluxSingleTransformerBlock.proj_mlp, FluxSingleTransformerBlock.proj_out too" in told
    assert "matches no layer" not in told


def test_settings_go_along() -> None:
    sizes = {"Attention": {"dim": 3}, "FeedForward": {"dim": 5}}
    preset = {"target_module": [], "module_algo_map": sizes}
    _, made = reached(flux(), {"algo": "lora", "linear_dim": 2, "apply_preset": preset})
    ranks = {each.path: each.algorithms[0].rank for each in made.placements}
    assert {rank for path, rank in ranks.items() if ".attn." in path} == {3}
    assert {rank for path, rank in ranks.items() if ".attn." not in path} == {5}


@pytest.mark.parametrize("globs", [False, True])
def test_layers_of_the_published_code(globs: bool) -> None:
    """There a feed-forward is no class of its own."""
    block = type("DoubleStreamBlock", (nn.Module,), {})()
    block.img_attn = type("SelfAttention", (nn.Module,), {})()
    block.img_attn.qkv = nn.Linear(4, 12)
    block.img_mlp = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4))
    block.img_mod = nn.Linear(4, 8)
    model = type("Flux", (nn.Module,), {})()
    model.double_blocks = nn.ModuleList([block])
    preset = CONFIG["apply_preset"] | {"use_fnmatch": globs}
    got, _ = reached(model, CONFIG | {"apply_preset": preset})
    assert got == {"double_blocks.0.img_attn.qkv", "double_blocks.0.img_mlp.0", "double_blocks.0.img_mlp.2"}


def test_a_model_of_no_known_family_is_taken_at_its_word() -> None:
    model = nn.ModuleDict({"a": type("FluxAttention", (nn.Sequential,), {})(nn.Linear(2, 2)), "b": nn.Sequential()})
    model["b"] = type("FeedForward", (nn.Sequential,), {})(nn.Linear(2, 2))
    got, made = reached(model)
    assert got == {"b.0"}
    assert any("did you mean 'FluxAttention'" in remark for remark in made.remarks)


def test_names_that_are_spelled_out_are_not_told() -> None:
    preset = {"target_module": ["Attention", "FluxAttention"]}
    _, made = reached(flux(), CONFIG | {"apply_preset": preset})
    assert not any("means" in remark for remark in made.remarks)


def test_layers_of_a_class_that_is_spelled_out_are_its_own() -> None:
    """Settings of `FeedForward` are not those of a single block's layers where the config names the block itself."""
    targets = {
        "target_module": ["FluxTransformerBlock", "FluxSingleTransformerBlock"],
        "module_algo_map": {"FeedForward": {"algo": "lora", "linear_dim": 3}},
    }
    _, made = reached(flux(), CONFIG | {"apply_preset": targets})
    ranks = {each.path: each.algorithms[0].rank for each in made.placements}
    assert ranks["single_transformer_blocks.0.proj_mlp"] == 2
    assert ranks["transformer_blocks.0.ff.net.2"] == 3
