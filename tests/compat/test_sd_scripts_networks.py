"""sd-scripts' own `networks.loha` and `networks.lokr`: the same arguments, layers, files and parameter groups.

What it does is stated here once more, by its rules: see `by_rules` and `by_hand`.
"""

from __future__ import annotations

import ast
import importlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cases import perturb, relative
from hosts import TextEncoder, Transformer, UNet, block
from lycoris import ConfigError, FileError, PlanError, read
from lycoris.compat.sd_scripts import loha, lokr
from lycoris.kohya import create_network_from_weights

MODULES = {"loha": loha, "lokr": lokr}
EACH = pytest.mark.parametrize("name", MODULES)


class SdxlUNet2DConditionModel(UNet): ...


class Downsample2D(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 1)


class InferSdxlUNet2DConditionModel(nn.Module):
    """As sd-scripts' own, holds the other model's layers without deriving from it."""

    def __init__(self) -> None:
        super().__init__()
        self.unet, self.down = UNet(), Downsample2D()


class Qwen3MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up_proj = nn.Linear(8, 16)


def anima() -> Transformer:
    layers = ["self_attn.q_proj", "mlp.layer1", "adaln_modulation_mlp.1"]
    return Transformer(
        *(block("Block", layers) for _ in range(2)),
        block("LLMAdapterTransformerBlock", ["self_attn.q_proj"]),
        block("FinalLayer", ["final_layer.linear"]),
    )


def sdxl() -> SdxlUNet2DConditionModel:
    return SdxlUNet2DConditionModel()


HOSTS: dict[str, Any] = {
    "sdxl": (sdxl, lambda: [TextEncoder(), TextEncoder()], ("lora_te1", "lora_te2")),
    "sdxl-infer": (InferSdxlUNet2DConditionModel, lambda: [TextEncoder(), None], ("lora_te1",)),
    "anima": (anima, lambda: [Qwen3MLP()], ("lora_te",)),
    "one": (sdxl, lambda: TextEncoder(), ("lora_te1",)),
}


def by_rules(host: str, unet: nn.Module, encoders: list[nn.Module], dim: int, args: dict[str, str]) -> dict[str, int]:
    """Layers and their ranks as sd-scripts chooses them."""
    patterns = {
        name: found if isinstance(found, list) else [found]
        for name in ("exclude_patterns", "include_patterns")
        if (found := ast.literal_eval(args.get(name, "[]"))) is not None
    }
    text, blocks = ["CLIPAttention", "CLIPMLP", "Qwen3MLP"], ["Transformer2DModel"]
    if host == "anima":
        blocks = ["Block", "PatchEmbed", "TimestepEmbedding", "FinalLayer"]
        blocks += ["LLMAdapterTransformerBlock"] if args.get("train_llm_adapter", "").lower() == "true" else []
        patterns["exclude_patterns"].append(r".*(_modulation|_norm|_embedder|final_layer).*")
    elif "conv_dim" in args:
        blocks += ["ResnetBlock2D", "Downsample2D", "Upsample2D"]
    ranks = dict(pair.split("=", 1) for pair in args.get("network_reg_dims", "").split(",") if pair)
    found = {}
    models = zip((*HOSTS[host][2], "lora_unet"), (*encoders, unet), (*(text for _ in encoders), blocks), strict=True)
    for prefix, model, classes in models:
        for outer, holder in model.named_modules():
            if type(holder).__name__ not in classes:
                continue
            for inner, layer in holder.named_modules():
                path = ".".join(filter(None, (outer, inner)))
                matched = {name: any(re.fullmatch(p, path) for p in each) for name, each in patterns.items()}
                if type(layer).__name__ not in ("Linear", "Conv2d"):
                    continue
                if matched["exclude_patterns"] and not matched["include_patterns"]:
                    continue
                small = isinstance(layer, nn.Linear) or layer.kernel_size == (1, 1)
                usual = dim if small else int(args.get("conv_dim", 0))
                rank = next((int(n) for p, n in ranks.items() if re.fullmatch(p, path)), usual)
                if rank:
                    found[f"{prefix}_{path.replace('.', '_')}"] = rank
    return found


def by_hand(sd: dict[str, Tensor], layer: str, shape: torch.Size) -> Tensor:
    """ΔW by the formulas of its modules, in float64."""
    p = {key.partition(".")[2]: t.double() for key, t in sd.items() if key.startswith(f"{layer}.")}
    if "hada_t1" in p:
        one, two = (
            torch.einsum("ijkl,jr,ip->prkl", p[f"hada_t{n}"], p[f"hada_w{n}_b"], p[f"hada_w{n}_a"]) for n in (1, 2)
        )
        return one * two * p["alpha"] / len(p["hada_w1_b"])
    if "hada_w1_a" in p:
        scale = p["alpha"] / len(p["hada_w1_b"])
        return ((p["hada_w1_a"] @ p["hada_w1_b"]) * (p["hada_w2_a"] @ p["hada_w2_b"]) * scale).reshape(shape)
    w1, scale = p["lokr_w1"], torch.tensor(1.0)
    if "lokr_w2" in p:
        w2 = p["lokr_w2"]
    elif "lokr_t2" in p:
        w2 = torch.einsum("ijkl,ip,jr->prkl", p["lokr_t2"], p["lokr_w2_a"], p["lokr_w2_b"])
        scale = p["alpha"] / len(p["lokr_w2_a"])
    else:
        w2, scale = p["lokr_w2_a"] @ p["lokr_w2_b"], p["alpha"] / len(p["lokr_w2_b"])
    w1 = w1.reshape(*w1.shape, *(1,) * (w2.dim() - 2))
    return (torch.kron(w1, w2.contiguous()) * scale).reshape(shape)


ARGS: dict[str, dict[str, str]] = {
    "plain": {},
    "conv": {"conv_dim": "3", "conv_alpha": "2"},
    "tucker": {"conv_dim": "1", "use_tucker": "True"},
    "conv of rank 0": {"conv_dim": "0"},
    "adapter": {"train_llm_adapter": "True"},
    "excludes": {
        "exclude_patterns": "['.*attn.*']",
        "include_patterns": "['.*to_q', '.*_modulation.*', '.*final_l.*']",
    },
    "ranks": {"network_reg_dims": ".*proj.*=1,.*attn.*=3,.*mlp.*=0,.*conv1=5", "conv_dim": "2"},
}


@EACH
@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("args", ARGS)
def test_layers_ranks_and_what_they_make(name: str, host: str, args: str) -> None:
    unet, text = (make() for make in HOSTS[host][:2])
    encoders = [each for each in (text if isinstance(text, list) else [text]) if each is not None]
    given = ARGS[args] | ({"factor": "2"} if name == "lokr" else {})
    network = MODULES[name].create_network(1.0, 2, 3.0, None, text, unet, neuron_dropout=None, **given)
    assert {m.lora_name: m.algorithm.rank for m in network.loras} == by_rules(host, unet, encoders, 2, given)
    assert {p.model if hasattr(p, "model") else p.prefix for p in network.parts} <= {*HOSTS[host][2], "lora_unet"}
    network.double()
    for part in network.parts:
        perturb(part.adapters, 0.2)
    sd = network.state_dict()
    for part in network.parts:
        for path in part.adapters.stacks:
            key = f"{part.prefix}_{path.replace('.', '_')}"
            module = next(m for m in network.loras if m.lora_name == key)
            shape = part.adapters.model.get_submodule(path).weight.shape
            assert relative(module.get_diff_weight()[0].reshape(shape), by_hand(sd, key, shape)) < 1e-12


@EACH
def test_sizes(name: str) -> None:
    module = MODULES[name]
    usual = module.create_network(1.0, None, None, None, [None], sdxl(), conv_dim="2").loras
    assert {(m.algorithm.rank, m.algorithm.alpha) for m in usual} == {(4, 1.0), (2, 1.0)}
    zero = module.create_network("0.5", "2", "0", None, [None], sdxl())
    assert zero.multiplier == 0.5
    assert {m.scale for m in zero.loras} == {1.0}
    only = module.create_network(1.0, 0, 1, None, [None], sdxl(), network_reg_dims=".*to_k=2")
    assert [m.lora_name for m in only.loras] == ["lora_unet_down_blocks_1_attn1_to_k"]
    drop = module.create_network(1.0, 4, 1, None, [None], sdxl(), neuron_dropout="0.3", rank_dropout="0.2")
    algorithm = drop.loras[0].algorithm
    assert (algorithm.dropout, algorithm.rank_dropout, algorithm.rank_dropout_scale) == (0.3, 0.2, True)


@EACH
@pytest.mark.parametrize("host", ["sdxl", "anima"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_a_training_run(name: str, host: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """train_network.py from --network_module to the file, --network_weights, --dim_from_weights, --base_weights."""
    unet, text = (make() for make in HOSTS[host][:2])
    module = importlib.import_module(f"lycoris.compat.sd_scripts.{name}")
    args = {"conv_dim": "2", **({"factor": "2"} if name == "lokr" else {}), "loraplus_lr_ratio": "4"}
    network = module.create_network(1.0, 2, 1.0, None, text, unet, neuron_dropout=None, **args)
    network.apply_to(text, unet, True, True)
    groups, told = network.prepare_optimizer_params_with_multiple_te_lrs([1e-2], 1e-2, 1e-2)
    numbered = ["textencoder 1", "textencoder 1 plus", "textencoder 2", "textencoder 2 plus"][
        : 4 if host == "sdxl" else 2
    ]
    assert told == [*numbered, "unet", "unet plus"]
    assert {group["lr"] for group in groups} == {1e-2, 4e-2}
    network.prepare_grad_etc(text, unet)
    network.double()
    for part in network.parts:
        perturb(part.adapters, 0.2)
    path = tmp_path / "a.safetensors"
    header = {"ss_network_module": f"networks.{name}", "ss_network_args": json.dumps(args), "ss_network_dim": "2"}
    network.save_weights(path, dtype, header)
    assert network.load_weights(path) == {}
    network.restore()
    bases = {id(m): {k: t.clone() for k, t in m.state_dict().items()} for m in (unet, *text)}
    again, sd = module.create_network_from_weights(1.0, path, None, text, unet, for_inference=True, **args)
    assert {key: t.shape for key, t in again.state_dict().items()} == {key: t.shape for key, t in sd.items()}
    again.merge_to(text, unet, sd, torch.float32, "cpu")
    for model, prefix in zip((unet, *text), ("lora_unet", *HOSTS[host][2]), strict=True):
        for key, before in bases[id(model)].items():
            layer = f"{prefix}_{key.rsplit('.', 1)[0].replace('.', '_')}"
            if key.endswith(".weight") and f"{layer}.alpha" in sd:
                change = model.state_dict()[key].double() - before.double()
                assert relative(change, by_hand(sd, layer, before.shape)) < 1e-4


WRITTEN: dict[str, dict[str, tuple[int, ...]]] = {
    "loha": {"hada_w1_a": (8, 2), "hada_w1_b": (2, 8), "hada_w2_a": (8, 2), "hada_w2_b": (2, 8)},
    "lokr": {"lokr_w1": (2, 2), "lokr_w2_a": (4, 2), "lokr_w2_b": (2, 4)},
    "lokr-whole": {"lokr_w1": (2, 2), "lokr_w2": (4, 4)},
}
"""What it writes for a convolution of 1x1: matrices."""


@pytest.mark.parametrize("kind", WRITTEN)
@pytest.mark.parametrize("alpha", [torch.tensor(3), torch.tensor(3.0), torch.tensor(3.0, dtype=torch.bfloat16)])
def test_its_files_are_read_and_written_again(kind: str, alpha: Tensor, tmp_path: Path) -> None:
    """On a convolution of 1x1. Alpha is whatever number the network was made with: whole ones are integers."""
    layer, shape = "lora_unet_down_blocks_1_proj_in", torch.Size((8, 8, 1, 1))
    sd = {f"{layer}.{key}": torch.randn(size) for key, size in WRITTEN[kind].items()} | {f"{layer}.alpha": alpha}
    path = tmp_path / "a.safetensors"
    save_file(sd, path, {"ss_network_module": f"networks.{kind[:4]}", "ss_network_args": '{"factor": "2"}'})
    wanted, unet = by_hand(sd, layer, shape), sdxl()
    assert len(read(path, model=unet).report.applied) == 1
    for make in (MODULES[kind[:4]].create_network_from_weights, create_network_from_weights):
        network, _ = make(1.0, path, None, [None], unet)
        delta = network.double().loras[0].get_diff_weight()[0]
        assert relative(delta.reshape(shape), wanted) < 1e-12
        network.save_weights(tmp_path / "b.safetensors", None, {})
        again = load_file(tmp_path / "b.safetensors")
        if make is not create_network_from_weights:
            assert {key: t.shape for key, t in again.items()} == {key: t.shape for key, t in sd.items()}
        assert again.keys() == sd.keys()
        assert all(torch.equal(again[key].double().reshape(t.shape), t.double()) for key, t in sd.items())


def test_new_adapters_on_convolutions_of_1x1_are_matrices_too() -> None:
    """Its own modules load nothing else."""
    network = lokr.create_network(1.0, 100, 1, None, [None], sdxl(), factor="2")
    assert tuple(network.state_dict()["lora_unet_down_blocks_1_proj_in.lokr_w2"].shape) == (4, 4)


@EACH
def test_wrong_models_files_and_arguments(name: str, caplog: Any) -> None:
    module = MODULES[name]
    with pytest.raises(ConfigError, match=r"SdxlUNet2DConditionModel.*Anima, not for Transformer.*Mystery"):
        module.create_network(1.0, 2, 1.0, None, None, Transformer(block("Mystery", ["q"])))
    with pytest.raises(ConfigError, match="not for NoneType, which has no layers"):
        module.create_network(1.0, 2, 1.0, None, [TextEncoder()], None)
    with pytest.raises(PlanError, match=r"no layer is left.*Transformer2DModel"):
        module.create_network(1.0, 2, 1.0, None, [None], sdxl(), exclude_patterns="['.*']")
    with pytest.raises(ConfigError, match="list of regular expressions"):
        module.create_network(1.0, 2, 1.0, None, [None], sdxl(), exclude_patterns=".*norm.*")
    other = "lokr" if name == "loha" else "loha"
    sd = MODULES[other].create_network(1.0, 2, 1.0, None, [None], sdxl()).state_dict()
    with pytest.raises(FileError, match=f"this network module is for {name}, but the file has {other}"):
        module.create_network_from_weights(1.0, None, None, [None], sdxl(), weights_sd=sd)
    caplog.clear()
    module.create_network(1.0, 2, 1.0, None, [None], sdxl(), surprise="1", exclude_patterns="['nowhere']")
    assert [text.split("; known")[0] for text in caplog.messages if "surprise" in text] == [
        "unknown option 'surprise' is ignored"
    ]
    assert [text for text in caplog.messages if text.startswith("'nowhere' in exclude_patterns matches")]


@EACH
def test_off_and_on_and_calculated_before(name: str) -> None:
    """gen_img.py with --network_pre_calc: multipliers change between restore_weights and pre_calculation."""
    unet, x = sdxl().double(), torch.randn(1, 3, 4, 4, dtype=torch.float64)
    base = unet(x)
    network = MODULES[name].create_network(1.0, 2, 1.0, None, [None], unet, conv_dim="2")
    network.apply_to([None], unet)
    network.double()
    perturb(network.adapters, 0.2)
    live = unet(x)
    network.backup_weights()
    for multiplier, wanted in ((1.0, live), (0.0, base), (1.0, live)):
        network.set_multiplier(multiplier)
        network.restore_weights()
        network.pre_calculation()
        assert torch.equal(unet(x), wanted)
    network.set_enabled(False)
    assert torch.equal(unet(x), base)
    network.set_enabled(True)
    assert torch.equal(unet(x), live)
    assert relative(live, base) > 1e-3


@EACH
def test_merging_into_tensors(name: str) -> None:
    unet = sdxl()
    args = {"factor": "2"} if name == "lokr" else {}
    network = MODULES[name].create_network(1.0, 2, 1.0, None, [None], unet, conv_dim="2", **args)
    for part in network.parts:
        perturb(part.adapters, 0.2)
    sd = network.state_dict()
    keys = set(sd)
    for key, weight in unet.state_dict().items():
        layer = "lora_unet_" + key.rsplit(".", 1)[0].replace(".", "_")
        if key.endswith(".weight"):
            new = MODULES[name].merge_weights_to_tensor(weight, layer, sd, keys, 0.5, torch.device("cpu"))
            assert (new is weight) == (f"{layer}.alpha" not in sd)
            if new is not weight:
                assert relative((new - weight).double(), 0.5 * by_hand(sd, layer, weight.shape)) < 1e-4
    assert not keys
