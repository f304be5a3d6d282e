"""sd-scripts' side of `lycoris.kohya`: its calls, in its order, with its strings."""

from __future__ import annotations

import gc
import logging
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from torch import nn

from cases import Fused, perturb, relative
from hosts import TEXT, UNET
from lycoris import AdapterSet, AttachError, ConfigError, LoRA, Rule, plan
from lycoris.compat.parts import NetworkPart
from lycoris.kohya import LycorisNetworkKohya, create_network, create_network_from_weights
from pipelines import ARGS, Host, made, sd_scripts_header


@pytest.mark.sample(4)
@pytest.mark.filterwarnings("ignore:merging adapters that were trained:UserWarning")
@pytest.mark.parametrize("name", ARGS)
def test_a_training_run(name: str, host: Host, tmp_path: Path) -> None:
    """train_network.py, from --network_module to the saved file, and a second run with --network_weights."""
    base = host()
    args = {"neuron_dropout": None, "dropout": None, **ARGS[name]}
    network = create_network(1.0, 4, 2.0, None, host.encoders, host.unet, **args)
    network.apply_to(host.encoders, host.unet, True, True)
    assert network.train_t5xxl is False
    assert torch.equal(host(), base)
    network.enable_gradient_checkpointing()
    groups, told = network.prepare_optimizer_params_with_multiple_te_lrs([1e-2], 1e-2, 1e-3)
    assert told == ["textencoder", "unet"]
    optimizer = torch.optim.SGD(groups, lr=1e-2)
    network.to(torch.float64)
    network.prepare_grad_etc(host.encoders, host.unet)
    for _ in range(2):
        network.on_epoch_start(host.encoders, host.unet)
        network.on_step_start(host.encoders, host.unet)
        optimizer.zero_grad()
        host().square().mean().backward()
        torch.nn.utils.clip_grad_norm_(network.get_trainable_params(), 1.0)
        optimizer.step()
        count, mean, largest = network.apply_max_norm_regularization(10.0, "cpu")
        assert 0 <= count <= len(network.loras)
        assert 0 <= mean <= largest <= 10.0
    network.set_multiplier(0.0)
    assert torch.equal(host(), base)
    network.set_multiplier(1.0)
    network.eval()
    live = host()
    assert relative(live, base) > 1e-6
    network.save_weights(tmp_path / "a.safetensors", torch.float64, sd_scripts_header(name))

    second = Host()
    resumed = create_network(1.0, 4, 2.0, None, second.encoders, second.unet, **args)
    resumed.apply_to(second.encoders, second.unet, True, True)
    assert resumed.load_weights(tmp_path / "a.safetensors") == {}
    resumed.to(torch.float64)
    resumed.load_weights(tmp_path / "a.safetensors")
    assert relative(second(), live) < 1e-6


@pytest.mark.sample(6)
@pytest.mark.filterwarnings("ignore:merging adapters that were trained:UserWarning")
@pytest.mark.parametrize("multiplier", [1.0, 0.6])
@pytest.mark.parametrize("name", ARGS)
def test_live_merged_and_made_again_are_one(name: str, multiplier: float, host: Host, tmp_path: Path) -> None:
    """--base_weights with --base_weights_multiplier, and gen_img.py with and without merging."""
    base = host()
    network = made(host, name, multiplier)
    network.apply_to(host.encoders, host.unet)
    live = host()
    assert relative(live, base) > 1e-3
    path = tmp_path / "a.safetensors"
    network.save_weights(path, torch.float64, sd_scripts_header(name))
    network.onfly_merge()
    assert relative(host(), live) < 1e-10
    network.onfly_restore()
    assert torch.equal(host(), live)
    network.restore()
    assert torch.equal(host(), base)

    merged = Host()
    module, sd = create_network_from_weights(multiplier, path, None, merged.encoders, merged.unet, for_inference=True)
    assert module.is_mergeable()
    module.merge_to(merged.encoders, merged.unet, sd, torch.bfloat16, "cpu")
    assert relative(merged(), live) < 2e-4
    applied = Host()
    module, sd = create_network_from_weights(multiplier, str(path), None, applied.encoders, applied.unet)
    module.to(torch.float64)
    module.apply_to(applied.encoders, applied.unet)
    module.load_state_dict(sd, False)
    assert relative(applied(), live) < 1e-6


def wan_transformer() -> WanTransformer3DModel:
    return WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=16,
        ffn_dim=32,
        num_layers=2,
        rope_max_seq_len=32,
    )


@pytest.mark.parametrize("name", ["lora", "loha-scalar", "lokr", "boft"])
def test_a_real_video_transformer(name: str, tmp_path: Path) -> None:
    model = wan_transformer().eval().requires_grad_(False)
    inputs = torch.randn(1, 4, 2, 4, 4), torch.tensor([500]), torch.randn(1, 3, 16)
    base = model(*inputs)[0]
    network = create_network(0.6, 12, 3, None, None, model, preset="attn-mlp", **ARGS[name])
    blocks = [module for module in network.loras if "_blocks_" in module.lora_name]
    assert len(blocks) == 2 * (8 + 2)
    network.apply_to(None, model, False, True)
    assert torch.equal(model(*inputs)[0], base)
    perturb(network.adapters, 0.2)
    live = model(*inputs)[0]
    assert relative(live, base) > 1e-3
    network.save_weights(tmp_path / "a.safetensors", None, {})
    network.restore()
    again, sd = create_network_from_weights(0.6, tmp_path / "a.safetensors", None, None, model, for_inference=True)
    again.merge_to(None, model, sd, None, "cpu")
    assert relative(model(*inputs)[0], live) < 2e-4


def test_every_value_may_be_a_string_or_none(host: Host) -> None:
    options = {"conv_dim": None, "conv_alpha": None, "module_dropout": "0.1", "rank_dropout": "", "use_tucker": "False"}
    options["rank_dropout"] = "0.0"
    network = create_network("0.5", "8", "4", None, None, host.unet, algo="LoRA", dropout="0.2", **options)
    algorithm = network.loras[0].algorithm
    assert (network.multiplier, algorithm.rank, algorithm.alpha, algorithm.dropout) == (0.5, 8, 4.0, 0.2)
    plain = create_network(1.0, None, None, None, None, host.unet, algo=None, dropout=None).loras[0]
    assert (plain.algorithm.rank, plain.scale) == (4, 1.0)


def test_unknown_and_renamed_keywords_are_told(host: Host, caplog: Any) -> None:
    create_network(1.0, 4, 1, None, host.encoders, host.unet, algo="diag-oft", constrain="0.5", facter="3")
    assert sum("facter" in text and "did you mean 'factor'" in text for text in caplog.messages) == 1
    assert "constrain is deprecated; use constraint" in caplog.messages
    assert len(caplog.messages) == 2
    loud = create_network(1.0, 4, 1, None, None, host.unet, algo="locon", disable_conv_cp="False")
    assert next(m for m in loud.loras if m.lora_name.endswith("conv1")).algorithm.tucker


def test_one_side_of_a_pipeline(host: Host, tmp_path: Path) -> None:
    network = made(host)
    network.apply_to(host.encoders, host.unet, False, True)
    assert network.text_encoder_loras == []
    assert not any(key.startswith("lora_te") for key in network.state_dict())
    assert {id(p) for p in network.parameters()} == {id(p) for m in network.unet_loras for p in m.parameters()}
    assert network.prepare_optimizer_params(1e-4, 1e-4)[1] == ["unet"]
    assert torch.equal(host.encoders[0](host.ids), Host().encoders[0](host.ids))


def test_learning_rates(host: Host, caplog: Any) -> None:
    network = made(host, loraplus_lr_ratio="4", loraplus_unet_lr_ratio="16")
    groups, told = network.prepare_optimizer_params(1e-4, 1e-3, None)
    assert told == ["textencoder", "textencoder plus", "unet", "unet plus"]
    assert [group["lr"] for group in groups] == pytest.approx([1e-4, 4e-4, 1e-3, 16e-3])
    assert [len(list(group["params"])) for group in groups] == [12, 12, len(UNET), len(UNET)]
    assert network.prepare_optimizer_params(0, None, 1e-3)[1] == ["unet", "unet plus"]
    assert network.prepare_optimizer_params(None, None, None) == ([], [])
    assert network.prepare_optimizer_params(None, 0, 1e-3)[1] == ["textencoder", "textencoder plus"]
    groups, told = network.prepare_optimizer_params_with_multiple_te_lrs([1e-4, 2e-4], 1e-3, None)
    assert told[:4] == ["textencoder 1", "textencoder 1 plus", "textencoder 2", "textencoder 2 plus"]
    assert [group["lr"] for group in groups[:4]] == pytest.approx([1e-4, 4e-4, 2e-4, 8e-4])
    assert not caplog.messages


@pytest.mark.parametrize("name", ["lora", "lora-scalar", "loha-scalar", "lokr", "lokr-whole", "dylora", "diag-oft"])
def test_max_norm_is_what_the_layer_then_has(name: str, host: Host) -> None:
    network = made(host, name)
    norms = [module.apply_max_norm(1e9)[1] for module in network.loras]
    limit = sorted(norms)[len(norms) // 2]
    count, mean, largest = network.apply_max_norm_regularization(limit, "cpu")
    assert count == sum(norm > limit for norm in norms) > 0
    assert largest == pytest.approx(limit)
    assert mean == pytest.approx(sum(min(norm, limit) for norm in norms) / len(norms))
    if name != "diag-oft":
        deltas = [float(module.get_diff_weight()[0].detach().norm()) for module in network.loras]
        assert deltas == pytest.approx([min(norm, limit) for norm in norms])
    assert network.apply_max_norm_regularization(limit * 1.001, "cpu")[0] == 0


def test_a_merge_for_inference_keeps_no_copy_of_the_weights(host: Host) -> None:
    network = made(host)
    network.apply_to(host.encoders, host.unet)
    live, sd, weight = host().detach(), network.state_dict(), weakref.ref(host.unet.conv_in.weight)
    network.restore()
    network, sd = create_network_from_weights(
        1.0, None, None, host.encoders, host.unet, weights_sd=sd, for_inference=True
    )
    network.merge_to(host.encoders, host.unet, sd, None, "cpu")
    gc.collect()
    assert weight() is None
    assert relative(host(), live) < 1e-6
    assert type(host.unet.conv_in) is nn.Conv2d
    with pytest.raises(AttachError, match="merged irreversibly"):
        network.restore()


def test_utils_merge_and_back(host: Host) -> None:
    from lycoris.utils import merge

    base, network = host(), made(host)
    network.set_multiplier(0.7)
    network.apply_to(host.encoders, host.unet)
    live, sd = host(), network.state_dict()
    network.restore()
    done = merge(host.encoders, host.unet, sd, 0.7)
    assert relative(host(), live) < 1e-6
    done.restore()
    assert torch.equal(host(), base)
    single = {key.replace("lora_te1", "lora_te"): t for key, t in sd.items() if "lora_te2" not in key}
    assert len(merge([host.encoders[0]], host.unet, single).loras) == len(UNET) + len(TEXT)


def test_tlora_masks_reach_the_denoiser_alone(host: Host) -> None:
    from lycoris.modules.tlora import clear_timestep_mask, set_timestep_mask

    network = made(host, "tlora")
    logging.getLogger("LyCORIS").setLevel(logging.ERROR)
    network.apply_to(host.encoders, host.unet)
    whole, told = host.unet(host.x), host.encoders[0](host.ids)
    set_timestep_mask(torch.tensor([[1.0, 0, 0, 0], [1.0, 1, 0, 0]]))
    assert relative(host.unet(host.x), whole) > 1e-3
    assert torch.equal(host.encoders[0](host.ids), told)
    clear_timestep_mask()
    assert torch.equal(host.unet(host.x), whole)


@pytest.mark.parametrize("te1", [True, False])
def test_rates_of_text_encoders_go_by_their_number(te1: bool, host: Host) -> None:
    network = made(host)
    if not te1:
        sd = {key: t for key, t in network.state_dict().items() if not key.startswith("lora_te1")}
        network, _ = create_network_from_weights(1.0, None, None, host.encoders, host.unet, weights_sd=sd)
    groups, told = network.prepare_optimizer_params_with_multiple_te_lrs(["1e-4", "2e-4"], "1e-3", None)
    rates = dict(zip(told, (group["lr"] for group in groups), strict=True))
    assert rates == pytest.approx(({"textencoder 1": 1e-4} if te1 else {}) | {"textencoder 2": 2e-4, "unet": 1e-3})


@pytest.mark.parametrize("merge", ["merge_to", "onfly_merge"])
def test_members_have_strengths_of_their_own(merge: str, host: Host) -> None:
    """Also of a network whose other members are off, and in a merge."""
    network = made(host)
    network.set_multiplier(0)
    for at, module in enumerate(network.loras):
        module.multiplier = 0.1 * at
    network.apply_to(host.encoders, host.unet)
    live = host()
    getattr(network, merge)()
    assert relative(host(), live) < 1e-10
    with pytest.raises(AttachError, match="merged"):
        network.loras[0].multiplier = 1.0
    network.restore()
    network.for_inference = True
    network.merge_to()
    assert relative(host(), live) < 1e-10


def test_wrong_numbers_are_told(host: Host) -> None:
    network = made(host)
    network.set_multiplier("0.5")
    assert network.multiplier == 0.5
    with pytest.raises(ConfigError, match="multiplier must be a number, not 'much'"):
        network.set_multiplier("much")
    with pytest.raises(ConfigError, match="a learning rate must be a number, not 'fast'"):
        network.prepare_optimizer_params("fast")
    with pytest.raises(ConfigError, match="multiplier must be a number, not 'much'"):
        create_network_from_weights("much", None, None, None, host.unet, weights_sd=network.state_dict())


def test_a_side_that_leaves_takes_modules_along_that_were_used_by_themselves(host: Host) -> None:
    base = host()
    network = made(host, "lora")
    first, last = network.text_encoder_loras[0], network.text_encoder_loras[-1]
    first.apply_to()
    last.merge_to()
    before, layer = host(), first.org_module[0]
    nn.utils.parametrize.register_parametrization(layer, "weight", nn.Identity())
    for leave in (lambda: network.apply_to(None, None, False, True), network.restore):
        with pytest.raises(AttachError, match="after its adapters were attached"):
            leave()
        assert torch.equal(host(), before), "all or none"
        assert network.text_encoder_loras
    nn.utils.parametrize.remove_parametrizations(layer, "weight")
    network.apply_to(host.encoders, host.unet, apply_text_encoder=False)
    assert type(layer) is nn.Linear
    assert relative(host(), before) > 1e-6
    network.restore()
    assert torch.equal(host(), base)


def for_good(network: Any) -> Any:
    network.for_inference = True
    return network


def test_a_merge_for_good_is_whole_or_not_at_all() -> None:
    model = nn.Sequential(nn.Linear(8, 8), Fused(8, 8))
    rules = [Rule(LoRA(rank=2)), Rule(LoRA(rank=2), kind="parameter")]
    adapters = AdapterSet.build(model, plan(model, rules), name=None)
    perturb(adapters)
    weight = model[0].weight.detach().clone()
    model[1].weight_in.data = model[1].weight_in.data.to(torch.float8_e4m3fn)
    with pytest.raises(RuntimeError, match="weight_in stores its weight as"):
        for_good(LycorisNetworkKohya.from_parts([NetworkPart("lora_unet", adapters)])).merge_to()
    assert torch.equal(model[0].weight, weight)


def test_a_merge_for_good_is_whole_where_warnings_are_errors() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).bfloat16()
    adapters = AdapterSet.build(model, plan(model, Rule(LoRA(rank=2))), name=None)
    perturb(adapters)
    adapters.stacks["0"][0].up.data.fill_(1e-6)
    weight = model[1].weight.detach().clone()
    with pytest.raises(UserWarning, match="the update is below"):
        for_good(LycorisNetworkKohya.from_parts([NetworkPart("lora_unet", adapters)])).merge_to()
    assert not torch.equal(model[1].weight, weight)
