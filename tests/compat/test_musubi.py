"""Musubi Tuner's side: its own network modules' interface, and `lycoris.kohya` as it calls it."""

from __future__ import annotations

import hashlib
import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from cases import perturb, relative
from hosts import Transformer, block, wan
from lycoris import AttachError, ConfigError, FileError, PlanError
from lycoris.compat.musubi import loha, lokr
from lycoris.kohya import create_network, create_network_from_weights

MODULES = {"loha": loha, "lokr": lokr}
EACH = pytest.mark.parametrize("name", MODULES)
LAYERS = ("self_attn_q", "self_attn_k", "cross_attn_v", "ffn_0", "ffn_2")
SUFFIXES = {
    "loha": {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "alpha"},
    "lokr": {"lokr_w1", "lokr_w2_a", "lokr_w2_b", "alpha"},
}


@pytest.fixture
def dit() -> Transformer:
    return wan().double().eval().requires_grad_(False)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 5, 8, dtype=torch.float64)


def trained(name: str, dit: nn.Module, multiplier: float = 1.0, dim: int = 2, **args: Any) -> Any:
    network = MODULES[name].create_arch_network(
        multiplier, dim, 1.0, None, None, dit, neuron_dropout=None, **({"factor": "2"} if name == "lokr" else {}) | args
    )
    network.apply_to(None, dit, apply_text_encoder=False, apply_unet=True)
    network.to(torch.float64)
    perturb(network.adapters, 0.2)
    return network


def by_hand(name: str, sd: dict[str, Tensor], layer: str) -> Tensor:
    """ΔW by the formulas of Musubi Tuner's own modules."""
    p = {key.partition(".")[2]: t.double() for key, t in sd.items() if key.startswith(f"{layer}.")}
    if name == "loha":
        scale = p["alpha"] / p["hada_w1_b"].shape[0]
        return (p["hada_w1_a"] @ p["hada_w1_b"]) * (p["hada_w2_a"] @ p["hada_w2_b"]) * scale
    if "lokr_w2" in p:
        return torch.kron(p["lokr_w1"], p["lokr_w2"])
    return torch.kron(p["lokr_w1"], p["lokr_w2_a"] @ p["lokr_w2_b"]) * p["alpha"] / p["lokr_w2_a"].shape[1]


@EACH
def test_a_training_run(name: str, dit: Transformer, x: Tensor, tmp_path: Path) -> None:
    """trainer_base.py from --network_module to the file, and --network_weights, --base_weights, --dim_from_weights."""
    base, state = dit(x), {key: tensor.clone() for key, tensor in dit.state_dict().items()}
    module = importlib.import_module(f"lycoris.compat.musubi.{name}")
    args = {"factor": "2"} if name == "lokr" else {}
    network = module.create_arch_network(1.0, 2, 1.0, None, None, dit, neuron_dropout=None, **args)
    network.prepare_network(None)
    network.apply_to(None, dit, apply_text_encoder=False, apply_unet=True)
    assert torch.equal(dit(x), base)
    network.enable_gradient_checkpointing()
    groups, told = network.prepare_optimizer_params(unet_lr=1e-2)
    assert told == ["unet"]
    optimizer = torch.optim.SGD(groups, lr=1e-2)
    network.to(torch.float64)
    network.prepare_grad_etc(dit)
    for _ in range(2):
        network.on_epoch_start(dit)
        network.on_step_start()
        optimizer.zero_grad()
        dit(x).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(network.get_trainable_params(), 1.0)
        optimizer.step()
        network.apply_max_norm_regularization(10.0, "cpu")
    network.eval()
    live = dit(x)
    assert relative(live, base) > 1e-8
    path = str(tmp_path / "a.safetensors")
    network.save_weights(path, torch.float64, {"ss_base_model_version": "wan2.1"})
    assert network.load_weights(path) == {}
    network.restore()

    weights_sd = load_file(path)
    other = module.create_arch_network_from_weights(1.0, weights_sd, unet=dit, for_inference=True)
    other.merge_to(None, dit, weights_sd, torch.bfloat16, "cpu")
    assert relative(dit(x), live) < 2e-4
    with pytest.raises(AttachError, match="merged irreversibly"):
        other.restore()
    with pytest.raises(AttachError, match="merged irreversibly"):
        other.merge_to(None, dit, weights_sd)
    dit.load_state_dict(state)
    again, _ = module.create_arch_network_from_weights(1, weights_sd, unet=dit)
    again.apply_to(None, dit, apply_text_encoder=False, apply_unet=True)
    again.to(torch.float64)
    again.load_weights(path)
    assert relative(dit(x), live) < 1e-6


@EACH
def test_keys_start_and_header(name: str, dit: Transformer, tmp_path: Path) -> None:
    args = {"factor": "2"} if name == "lokr" else {}
    network = MODULES[name].create_arch_network(1.0, 1, 0.5, None, None, dit, **args)
    sd = network.state_dict()
    wanted = {f"lora_unet_blocks_{n}_{layer}" for n in range(2) for layer in LAYERS}
    assert {key.split(".")[0] for key in sd} == wanted
    assert {key.partition(".")[2] for key in sd} == SUFFIXES[name]
    assert all(float(t) == 0.5 for key, t in sd.items() if key.endswith("alpha"))
    zeros = {key.partition(".")[2] for key, t in sd.items() if not t.any()}
    assert zeros == ({"hada_w2_a"} if name == "loha" else {"lokr_w2_b"})
    network.save_weights(tmp_path / "a.safetensors", torch.float16, {"ss_base_model_version": "wan2.1"})
    raw = (tmp_path / "a.safetensors").read_bytes()
    body = raw[8 + int.from_bytes(raw[:8], "little") :]
    assert hashlib.sha256(body).hexdigest().encode() in raw[: len(raw) - len(body)]
    assert b"sshs_legacy_hash" in raw


def test_loha_starts_with_its_spreads() -> None:
    dit = Transformer(block("WanAttentionBlock", ["q"]))
    dit.blocks[0].q = nn.Linear(400, 300)
    sd = loha.create_arch_network(1.0, 16, None, None, None, dit).state_dict()
    spread = {key.partition(".")[2]: float(t.std()) for key, t in sd.items() if t.dim()}
    assert spread["hada_w1_a"] == pytest.approx(0.1, rel=0.05)
    assert spread["hada_w1_b"] == pytest.approx(1.0, rel=0.05)
    assert spread["hada_w2_b"] == pytest.approx(1.0, rel=0.05)
    assert float(sd["lora_unet_blocks_0_q.alpha"]) == 1.0


@pytest.mark.parametrize(
    ("size", "factor", "shapes"),
    [
        ((512, 128), -1, ((16, 8), (32, 16))),
        ((128, 1024), -1, ((8, 32), (16, 32))),
        ((128, 128), 4, ((4, 4), (32, 32))),
    ],
)
def test_lokr_factors(size: tuple[int, int], factor: int, shapes: Any, caplog: Any) -> None:
    dit = Transformer(block("WanAttentionBlock", ["q"]))
    dit.blocks[0].q = nn.Linear(size[1], size[0])
    split = lokr.create_arch_network(1.0, 4, 2.0, None, None, dit, factor=str(factor)).loras[0]
    assert tuple(split.lokr_w1.shape) == shapes[0]
    assert (split.lokr_w2_a.shape[0], split.lokr_w2_b.shape[1]) == shapes[1]
    whole = lokr.create_arch_network(1.0, max(shapes[1]), 2.0, None, None, dit, factor=factor).loras[0]
    assert tuple(whole.lokr_w2.shape) == shapes[1]
    assert (whole.scale, float(whole.alpha)) == (1.0, max(shapes[1]))


HOSTS: dict[str, tuple[list[nn.Module], set[str]]] = {
    "wan": (
        [block("WanAttentionBlock", ["self_attn.q", "norm3", "time_projection.1"])],
        {"blocks_0_self_attn_q"},
    ),
    "qwen": ([block("QwenImageTransformerBlock", ["attn.to_q", "img_mod_.1"])], {"blocks_0_attn_to_q"}),
    "z-image": (
        [block("ZImageTransformerBlock", ["attention.to_q", "adaLN_modulation.0", "noise_refiner.w"])],
        {"blocks_0_attention_to_q"},
    ),
    "framepack": (
        [
            block("HunyuanVideoTransformerBlock", ["attn.to_q", "norm1.linear"]),
            block("HunyuanVideoSingleTransformerBlock", ["proj_mlp"]),
        ],
        {"blocks_0_attn_to_q", "blocks_1_proj_mlp"},
    ),
    "flux": (
        [
            block("DoubleStreamBlock", ["img_attn.qkv", "img_mod.lin", "txt_mod.lin", "img_attn.norm.q"]),
            block("SingleStreamBlock", ["linear1", "modulation.lin"]),
        ],
        {"blocks_0_img_attn_qkv", "blocks_1_linear1"},
    ),
    "hunyuan": (
        [
            block("MMDoubleStreamBlock", ["img_attn_qkv", "img_mod.linear"]),
            block("MMSingleStreamBlock", ["linear1", "modulation.linear"]),
        ],
        {"blocks_0_img_attn_qkv", "blocks_1_linear1"},
    ),
    "hunyuan-1.5": (
        [block("MMDoubleStreamBlock", ["img_attn_q", "txt_in.x", "img_mod.linear"])],
        {"blocks_0_img_attn_q", "blocks_0_img_mod_linear"},
    ),
}


@EACH
@pytest.mark.parametrize("host", HOSTS)
def test_architectures(name: str, host: str) -> None:
    blocks, wanted = HOSTS[host]
    network = MODULES[name].create_arch_network(1.0, 2, 1.0, None, None, Transformer(*blocks))
    assert {m.lora_name for m in network.unet_loras} == {f"lora_unet_{layer}" for layer in wanted}
    assert network.text_encoder_loras == []


def test_an_unknown_architecture_is_told_by_its_classes() -> None:
    with pytest.raises(ValueError, match=r"Mystery.*lycoris\.kohya"):
        loha.create_arch_network(1.0, 2, 1.0, None, None, Transformer(block("Mystery", ["q"])))


def test_patterns(dit: Transformer, caplog: Any) -> None:
    def names(**args: str) -> set[str]:
        network = lokr.create_arch_network(1.0, 2, 1.0, None, None, dit, **args)
        return {module.lora_name.removeprefix("lora_unet_blocks_") for module in network.loras}

    whole = {f"{n}_{layer}" for n in range(2) for layer in LAYERS}
    assert names(exclude_patterns="['.*ffn.*']") == {n for n in whole if "ffn" not in n}
    assert names(exclude_patterns="['ffn']") == whole
    assert names(exclude_patterns="['.*']", include_patterns=r"['.*\\.q', '.*time_projection.*']") == {
        *("0_self_attn_q", "1_self_attn_q", "0_time_projection_1", "1_time_projection_1")
    }
    with pytest.raises(ConfigError, match=r"exclude_patterns.*'\[' is not a regular expression"):
        names(exclude_patterns="['[']")
    with pytest.raises(ConfigError, match="list of regular expressions"):
        names(include_patterns=".*q")
    with pytest.raises(PlanError, match="no linear layer"):
        names(exclude_patterns="['.*']")
    caplog.clear()
    assert names(conv_dim="4", surprise="1") == whole
    assert any("conv_dim has no effect" in text for text in caplog.messages)
    assert any("unknown option 'surprise'" in text for text in caplog.messages)
    loha.create_arch_network(1.0, 2, 1.0, None, None, dit, factor="4")
    assert any("unknown option 'factor'" in text for text in caplog.messages)


def test_only_layers_of_the_very_class_are_taken() -> None:
    class Special(nn.Linear): ...

    dit = Transformer(block("WanAttentionBlock", ["q"], [Special(8, 8), nn.Conv2d(8, 8, 1)]))
    assert [m.lora_name for m in loha.create_arch_network(1.0, 2, 1.0, None, None, dit).loras] == [
        "lora_unet_blocks_0_q"
    ]
    network = loha.create_network(None, "lora_unet", 1.0, 2, 1.0, None, None, dit)
    assert {m.lora_name for m in network.loras} == {
        *("lora_unet_patch_embedding", "lora_unet_blocks_0_q", "lora_unet_head")
    }


def test_dropouts_and_ratios(dit: Transformer, caplog: Any) -> None:
    args = {"rank_dropout": "0.2", "module_dropout": "0.1", "loraplus_lr_ratio": "4"}
    network = loha.create_arch_network(1.0, 2, 1.0, None, None, dit, neuron_dropout=0.3, **args)
    algorithm = network.loras[0].algorithm
    assert (algorithm.rank_dropout, algorithm.rank_dropout_scale) == (0.2, True)
    assert (algorithm.module_dropout, algorithm.dropout) == (0.1, 0.3)
    assert network.prepare_optimizer_params(unet_lr=1e-3)[1] == ["unet"]
    assert any("LoRA+ has no effect" in text for text in caplog.messages)
    assert network.prepare_optimizer_params(unet_lr=0) == ([], [])
    made = loha.create_arch_network_from_weights("0.5", network.state_dict(), unet=dit, loraplus_lr_ratio="4")
    assert (made.multiplier, made.ratios) == (0.5, network.ratios)


@EACH
@pytest.mark.parametrize(("dim", "factor", "scale"), [(1, "2", 1.0), (2, "1", 0.5), (4, "2", None)])
def test_files_mean_what_musubi_reads_in_them(
    name: str, dim: int, factor: str, scale: float | None, dit: Transformer
) -> None:
    network = trained(name, dit, 1.0, dim, **({"factor": factor} if name == "lokr" else {}))
    sd = network.state_dict()
    if scale is not None:
        assert {module.scale for module in network.loras} == {scale}, "alpha over a rank that is not it"
    for module in network.loras:
        assert relative(module.get_diff_weight()[0], by_hand(name, sd, module.lora_name)) < 1e-6


@EACH
@pytest.mark.parametrize(("dim", "args"), [(1, {}), (4, {}), (2, {"factor": "1"})], ids=["one", "whole", "split"])
@pytest.mark.parametrize("multiplier", [1.0, 0.5])
def test_merging_into_tensors(
    name: str, dim: int, args: dict[str, str], multiplier: float, dit: Transformer, x: Tensor
) -> None:
    """lora_utils.py: every weight passes a hook before the model has it."""
    base = {key: tensor.clone() for key, tensor in dit.state_dict().items()}
    network = trained(name, dit, multiplier, dim, **(args if name == "lokr" else {}))
    live, sd = dit(x), network.state_dict()
    network.restore()
    keys = set(sd)
    merge = MODULES[name].merge_weights_to_tensor
    merged = {}
    for key, weight in base.items():
        layer = "lora_unet_" + key.rsplit(".", 1)[0].replace(".", "_")
        new = merge(weight, layer, sd, keys, multiplier, torch.device("cpu")) if key.endswith(".weight") else weight
        assert new.dtype == weight.dtype
        assert (new is weight) == (f"{layer}.alpha" not in sd or not key.endswith(".weight"))
        merged[key] = new
    assert not keys
    dit.load_state_dict(merged)
    assert relative(dit(x), live) < 1e-6


@pytest.mark.parametrize("name", ["loha", "lokr", "lokr-both"])
def test_lengths_of_dora_are_read_and_merged(name: str, dit: Transformer, x: Tensor) -> None:
    """LoKr is told by any of its first factors, whole or split."""
    both = {"decompose_both": name == "lokr-both", "unbalanced_factorization": name == "lokr-both"}
    config = {"algo": name[:4], "dora_wd": True, "factor": 2, **both}
    made = create_network(0.5, 1, 2, None, None, dit, **config)
    made.to(torch.float64).apply_to(None, dit)
    perturb(made.adapters, 0.2)
    live, sd = dit(x), made.state_dict()
    assert ("lora_unet_blocks_0_ffn_0.lokr_w1_a" in sd) == (name == "lokr-both")
    made.restore()
    module, keys = MODULES[name[:4]], set(sd)
    merged = {
        key: module.merge_weights_to_tensor(
            tensor, "lora_unet_" + key.rsplit(".", 1)[0].replace(".", "_"), sd, keys, 0.5, "cpu"
        )
        for key, tensor in dit.state_dict().items()
        if key.endswith(".weight")
    }
    assert not keys
    again = module.create_arch_network_from_weights(0.5, sd, unet=dit)
    again.to(torch.float64).apply_to(None, dit)
    assert relative(dit(x), live) < 1e-6
    again.restore()
    dit.load_state_dict(merged, strict=False)
    assert relative(dit(x), live) < 1e-6


@EACH
def test_merging_into_eight_bits_rounds_once(name: str, dit: Transformer) -> None:
    sd = trained(name, dit).state_dict()
    layer, weight = "lora_unet_blocks_0_ffn_0", torch.randn(8, 8).to(torch.float8_e4m3fn)
    keys = set(sd)
    merged = MODULES[name].merge_weights_to_tensor(weight, layer, sd, keys, 0.5, "cpu")
    assert torch.equal(
        merged.float(), (weight.float() + 0.5 * by_hand(name, sd, layer).float()).to(weight.dtype).float()
    )


@EACH
def test_the_other_ones_files_are_refused(name: str, dit: Transformer) -> None:
    other = "lokr" if name == "loha" else "loha"
    with pytest.raises(FileError, match=rf"for {name}, but the file has {other}"):
        MODULES[name].create_arch_network_from_weights(1.0, trained(other, dit).state_dict(), unet=wan())


@EACH
def test_create_network_from_weights_names_its_targets(name: str, dit: Transformer, x: Tensor) -> None:
    network = trained(name, dit)
    live, sd = dit(x), network.state_dict()
    network.set_enabled(False)
    assert relative(dit(x), live) > 1e-3
    network.set_enabled(True)
    assert torch.equal(dit(x), live)
    network.restore()
    again = MODULES[name].create_network_from_weights(["WanAttentionBlock"], 1.0, sd, None, dit)
    again.to(torch.float64).apply_to(None, dit)
    assert relative(dit(x), live) < 1e-6


@EACH
@pytest.mark.parametrize("multiplier", [1.0, 0.5])
def test_inference_with_lycoris(name: str, multiplier: float, dit: Transformer, x: Tensor) -> None:
    """--lycoris: the file's tensors, no text encoder, and the multiplier in the merge."""
    network = trained(name, dit, multiplier)
    live, sd = dit(x), network.state_dict()
    network.restore()
    net, _ = create_network_from_weights(
        multiplier=multiplier, file=None, weights_sd=sd, unet=dit, text_encoder=None, vae=None, for_inference=True
    )
    net.merge_to(None, dit, sd, dtype=None, device=torch.device("cpu"))
    assert relative(dit(x), live) < 1e-6


def test_training_with_lycoris_kohya(dit: Transformer, x: Tensor, tmp_path: Path) -> None:
    network = create_network(1.0, 2, 1, None, None, dit, algo="lokr", factor="2")
    network.apply_to(None, dit, apply_text_encoder=False, apply_unet=True)
    perturb(network.adapters, 0.2)
    assert {m.lora_name for m in network.loras} >= {"lora_unet_blocks_0_time_projection_1"}
    assert network.prepare_optimizer_params(unet_lr=1e-4)[1] == ["unet"]
    network.save_weights(tmp_path / "a.safetensors", torch.float32, {"ss_steps": "1"})
    assert network.load_weights(tmp_path / "a.safetensors") == {}
    assert lokr.create_arch_network_from_weights(1.0, load_file(tmp_path / "a.safetensors"), unet=dit).loras


def test_dropout_counts_beside_a_file() -> None:
    class WanAttentionBlock(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q = nn.Linear(8, 8)

    model = nn.Sequential(WanAttentionBlock())
    tensors = loha.create_arch_network(1.0, 2, 1.0, None, None, model).state_dict()
    network = loha.create_arch_network_from_weights(1.0, tensors, unet=model, rank_dropout="0.5")
    assert {module.rank_dropout for module in network.loras} == {0.5}
