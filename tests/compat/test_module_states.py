"""Every module class on every kind of layer, and on parameters: all that it says and does of its change agrees."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from cases import Fused, relative
from lycoris import (
    AdapterSet,
    AttachError,
    ConfigError,
    LoRA,
    Rule,
    create_lycoris,
    create_lycoris_from_weights,
    files,
    plan,
)
from lycoris.modules import (
    MODULE_LIST,
    FullModule,
    LoConModule,
    LohaModule,
    LokrModule,
    LycorisBaseModule,
    NormModule,
    TLoraModule,
    get_module,
    make_module,
)
from lycoris.modules.tlora import clear_timestep_mask, compute_timestep_mask, set_timestep_mask

LAYERS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(12, 8), (3, 12)),
    "linear-plain": (lambda: nn.Linear(12, 8, bias=False), (3, 12)),
    "conv1d": (lambda: nn.Conv1d(6, 8, 3, padding=1), (2, 6, 7)),
    "conv2d": (lambda: nn.Conv2d(6, 8, (3, 1), stride=2), (2, 6, 7, 7)),
    "conv3d": (lambda: nn.Conv3d(4, 8, 2), (1, 4, 3, 3, 3)),
    "norm": (lambda: nn.LayerNorm(8), (3, 8)),
}
EVERY = pytest.mark.parametrize("cls", MODULE_LIST, ids=lambda cls: cls.__name__)
MASKED = pytest.mark.filterwarnings("ignore:merging adapters that were trained:UserWarning")
DROPS = {"dropout": 0.4, "rank_dropout": 0.4, "module_dropout": 0.4}
DROPPING = (LoConModule, LohaModule, LokrModule, TLoraModule)


@torch.no_grad()
def stir(module: nn.Module, size: float = 0.1) -> None:
    for parameter in module.parameters():
        parameter.add_(size * torch.randn_like(parameter))


def made(cls: type[LycorisBaseModule], layer: nn.Module, **options: Any) -> LycorisBaseModule:
    net: Any = cls("a", layer, 0.8, **({} if cls is NormModule else {"lora_dim": 4, "alpha": 2.0}), **options)
    stir(net)
    return net


@MASKED
@EVERY
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_all_that_a_module_says_of_its_change_agrees(
    cls: type[LycorisBaseModule], layer: str, dtype: torch.dtype
) -> None:
    """Made and merged in training mode, with dropout: weights are never drawn."""
    if (cls is NormModule) != (layer == "norm"):
        with pytest.raises(ConfigError):
            made(cls, LAYERS[layer][0]())
        return
    base, full = LAYERS[layer][0]().to(dtype), torch.promote_types(dtype, torch.float32)
    # Weights: exact but for the order of sums. Outputs: rounded to the layer's precision on the way.
    close, out = (1e-9, 1e-9) if dtype == torch.float64 else (1e-6, 2e-2)
    net = made(cls, base, **(DROPS if cls in DROPPING else {"module_dropout": 0.4}))
    base.train()
    own, x = copy.deepcopy(dict(base.named_parameters())), torch.randn(LAYERS[layer][1], dtype=dtype)

    weight, bias = net.get_merged_weight(0.5)
    delta, moved = net.get_diff_weight(0.5)
    assert weight.dtype == delta.dtype == full
    assert relative(weight, own["weight"].to(full) + delta) < close
    assert (moved is None) or relative(bias, own["bias"].to(full) + moved) < close

    net.multiplier = 0.5
    live = net.eval()(x)
    plain = copy.deepcopy(base)
    plain.weight, plain.bias = (None if t is None else nn.Parameter(t.to(dtype)) for t in (weight, bias))
    assert relative(live, plain(x)) < out
    assert relative(net.bypass_forward(x, 0.5), live) < out
    assert relative(base(x) + net.bypass_forward_diff(x, 0.5), live) < out

    net.train().apply_to()
    net.merge_to(0.5)
    assert relative(base.weight, own["weight"].to(full) + delta * 0.5) < (close if dtype == torch.float64 else 4e-3)
    assert net.multiplier == 0.5
    with pytest.raises(AttachError, match="merged"):
        net.merge_to()
    net.restore()
    assert all(torch.equal(parameter, own[name]) for name, parameter in base.named_parameters())
    assert type(base) is type(LAYERS[layer][0]())
    assert torch.equal(net.get_merged_weight(0.5)[0], weight)
    net.merge_to()
    assert torch.equal(base.weight, weight.to(dtype)), "computed in full, rounded once"


@MASKED
@EVERY
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_all_states_of_a_parametrized_weight(cls: type[LycorisBaseModule], dtype: torch.dtype) -> None:
    if cls in (FullModule, NormModule):
        return
    base = nn.Linear(12, 8).to(dtype).train()
    parameter, before = base.weight, base.weight.detach().clone()
    drops = DROPS if cls in DROPPING else {"module_dropout": 0.4}
    net: Any = cls.parametrize(base, "weight", 0.8, 4, 2.0, **drops)
    assert torch.equal(base.eval().weight, before)
    stir(net)
    live = base.weight
    assert live.dtype == dtype
    assert torch.equal(live, net.get_merged_weight(0.8)[0].to(dtype)), "computed in full, rounded once"
    assert relative(net.get_merged_weight(0.8)[0], before + net.get_diff_weight(0.8)[0]) < 1e-6

    base.train()
    for _ in range(4):
        net.merge_to()
        assert type(base) is nn.Linear
        assert torch.equal(base.weight, live), "without dropout"
        with pytest.raises(AttachError, match="already merged into weight"):
            net.merge_to()
        with pytest.raises(AttachError, match="before changing its multiplier"):
            net.multiplier = 1.0
        assert torch.equal(net.get_merged_weight(0.8)[0].to(dtype), live)
        net.onfly_restore()
        assert parametrize.is_parametrized(base, "weight")
    net.merge_to(0.5)
    assert torch.equal(base.weight, net.get_merged_weight(0.4)[0].to(dtype))
    net.restore()
    assert base.weight is parameter
    assert torch.equal(base.weight, before)
    assert type(base) is nn.Linear
    net.apply_to()
    net.apply_to()
    assert torch.equal(base.eval().weight, live)
    net.merge_to()
    base.weight.data.add_(1.0)
    with torch.no_grad():
        base.weight.add_(1.0)
    with pytest.raises(AttachError, match="written to after this merge"):
        net.restore()


def test_parametrizations_stack_and_come_off_in_any_order() -> None:
    base = parametrizations.weight_norm(nn.Linear(12, 8))
    before = base.weight.detach().clone()
    first, second = (LokrModule.parametrize(base, "weight", 1.0, 2, 2.0) for _ in range(2))
    stir(first)
    alone = base.weight.detach().clone()
    stir(second)
    both = base.weight.detach().clone()
    assert relative(second.get_merged_weight()[0], both) < 1e-6
    assert relative(second.get_diff_weight()[0], both - alone) < 1e-5
    assert relative(first.get_merged_weight()[0], alone) < 1e-6
    with pytest.raises(AttachError, match="other parametrizations"):
        first.merge_to()
    with pytest.raises(ConfigError, match="several parameters"):
        _ = first.org_weight
    assert torch.equal(base.weight, both)
    first.restore()
    assert relative(base.weight, before + second.get_diff_weight()[0]) < 1e-6
    second.restore()
    second.restore()
    assert relative(base.weight, before) < 1e-6
    for name, told in (("weigth", "no parameter 'weigth'; it has"), ("bias", "not a tensor of shape")):
        with pytest.raises(ConfigError, match=told):
            LoConModule.parametrize(base, name)
    with pytest.raises(RuntimeError, match="apply_to"):
        LoConModule.parametrize(nn.Linear(4, 4).to(torch.float8_e4m3fn), "weight")


def test_a_layer_whose_weight_is_parametrized_is_not_merged_into() -> None:
    base, x = parametrizations.weight_norm(nn.Linear(12, 8)), torch.randn(3, 12)
    net, before, state = made(LoConModule, base), base(x), copy.deepcopy(base.state_dict())
    assert relative(net(x), before) > 1e-3
    for merge in (
        net.merge_to,
        create_lycoris(nn.Sequential(base), apply_preset={"target_module": ["Sequential"]}).adapters.merge,
    ):
        with pytest.raises((RuntimeError, AttachError), match="remove_parametrizations"):
            merge()
    assert torch.equal(base(x), before)
    assert all(torch.equal(tensor, state[key]) for key, tensor in base.state_dict().items())
    net.apply_to()
    assert relative(base(x), net(x)) < 1e-6
    net.restore()
    assert torch.equal(base(x), before)


def test_a_parametrization_takes_only_tensors_that_mean_the_same() -> None:
    net = LoConModule.parametrize(nn.Linear(12, 8), "weight", 1.0, 4, 2.0)
    stir(net)
    state = net.state_dict()
    with pytest.raises(RuntimeError, match="the file has"):
        net.load_state_dict(state | {"alpha": torch.tensor(8.0)})


def test_some_tensors_of_a_module_are_loaded_too() -> None:
    net = LoConModule("a", nn.Linear(12, 8), 1.0, 4, 2.0)
    stir(net)
    down, up = net.lora_down.weight.detach().clone(), torch.randn(8, 4)
    missing, unexpected = net.load_state_dict({"lora_up.weight": up, "other": up}, strict=False)
    assert (sorted(missing), unexpected) == (["alpha", "lora_down.weight"], ["other"])
    assert torch.equal(net.lora_up.weight, up)
    assert torch.equal(net.lora_down.weight, down)


@MASKED
@pytest.mark.parametrize("copied", [False, True])
def test_masks_reach_a_single_module(copied: bool) -> None:
    layer, x = nn.Linear(12, 8).double(), torch.randn(3, 12, dtype=torch.float64)
    net = TLoraModule("a", layer, 0.8, 4, 4.0).double()
    stir(net)
    net = copy.deepcopy(net) if copied else net
    whole, base = net(x), net.org_module[0](x)
    net.apply_to()
    one = compute_timestep_mask(999, 1000, 4)
    set_timestep_mask(one)
    masked = net.org_module[0](x)
    assert torch.equal(net(x), masked)
    assert relative(masked - base, whole - base) > 1e-2
    net.multiplier = 0.4
    assert relative(net.org_module[0](x) - base, (masked - base) * 0.5) < 1e-9
    set_timestep_mask(one.expand(3, 4))
    assert relative(net(x) - base, (masked - base) * 0.5) < 1e-9
    clear_timestep_mask()
    assert relative(net(x) - base, (whole - base) * 0.5) < 1e-9
    net.merge_to(2.0)
    set_timestep_mask(one)
    assert relative(net.org_module[0](x), masked) < 1e-9
    net.restore()
    assert torch.equal(net.org_module[0](x), base)
    assert relative(net(x) - base, (masked - base) * 0.5) < 1e-9, "not applied, and asked all the same"


def test_masks_reach_a_parametrized_weight_and_one_made_from_a_file() -> None:
    layer = nn.Linear(12, 8)
    net = TLoraModule.parametrize(layer, "weight", 1.0, 4, 4.0)
    stir(net)
    whole = layer.weight.detach().clone()
    tensors = {f"a.{key}": tensor for key, tensor in net.state_dict().items()}
    set_timestep_mask(compute_timestep_mask(999, 1000, 4))
    masked = layer.weight.detach().clone()
    assert relative(masked, whole) > 1e-3
    net.restore()
    again = make_module(*get_module(tensors, "a"), "a", layer)
    again.apply_to()
    x = torch.randn(3, 12)
    assert relative(layer(x), nn.functional.linear(x, masked, layer.bias)) < 1e-5
    clear_timestep_mask()
    assert relative(layer(x), nn.functional.linear(x, whole, layer.bias)) < 1e-5


def test_a_member_hears_of_masks_from_its_network_alone() -> None:
    layer, x = nn.Linear(12, 8), torch.randn(3, 12)
    network = create_lycoris(layer, 0.5, 4, 4.0, algo="tlora")
    stir(network)
    network.loras[0].apply_to()
    network.apply_to()
    network.set_multiplier(0.25)
    live = layer(x)
    set_timestep_mask(torch.ones(1, 4))
    assert relative(layer(x), live) < 1e-6
    with pytest.raises(ConfigError, match="by its network"):
        network.loras[0].merge_to()
    with pytest.raises(ConfigError, match="by its network"):
        network.loras[0].restore()


def test_a_merged_network_still_tells_its_multipliers() -> None:
    layer = nn.Linear(12, 8)
    network = create_lycoris(layer, 0.5, 4, 4.0, algo="diag-oft")
    network.merge_to()
    member = network.loras[0]
    assert (network.multiplier, member.multiplier) == (0.5, 0.5)
    for ask in (member.get_merged_weight, member.get_diff_weight):
        with pytest.raises(AttachError, match="is merged"):
            ask()
    with pytest.raises(ConfigError, match="by its network"):
        member.merge_to()
    with pytest.raises(ConfigError, match="by its network"):
        member.onfly_restore()
    network.restore()
    member.onfly_restore()


def test_a_member_on_a_bare_parameter() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Fused(6, 4))
    weight = model[0].weight_in.detach().clone()
    adapters = AdapterSet.build(model, plan(model, Rule(LoRA(rank=2), kind="parameter")))
    tensors = files.encode(adapters.bundle())
    tensors["lycoris_0_weight_in.lora_up.weight"] += 0.1
    member = create_lycoris_from_weights(0.5, None, model, tensors)[0].loras[0]
    assert (member.bypass_mode, member.is_quant) == (False, False)
    assert torch.equal(member.org_weight, weight)
    member.merge_to()
    assert relative(model[0].weight_in, weight + member.get_diff_weight(0.5)[0]) < 1e-6
    member.restore()
    assert torch.equal(model[0].weight_in, weight)
    member.apply_to()
    assert relative(model[0].weight_in, member.get_merged_weight(0.5)[0]) < 1e-6


@MASKED
@pytest.mark.parametrize("member", [False, True])
def test_a_mask_set_by_hand_before_a_module_is_applied_stays(member: bool) -> None:
    layer, x = nn.Linear(12, 8).double(), torch.randn(3, 12, dtype=torch.float64)
    if member:
        network = create_lycoris(layer, 1.0, 4, 4.0, algo="tlora")
        net: Any = network.loras[0]
    else:
        net = TLoraModule("a", layer, 1.0, 4, 4.0)
    stir(net)
    whole = net(x)
    net.set_rank_mask(torch.tensor([[1.0, 0.0, 0.0, 0.0]]))
    masked = net(x)
    assert relative(masked, whole) > 1e-3
    net.apply_to()
    assert torch.equal(layer(x), masked)
    net.restore()
    net.set_rank_mask(torch.tensor([[1.0, 0.0, 0.0, 0.0]]))
    net.merge_to()
    assert relative(layer(x), masked) < 1e-9


def test_nothing_is_loaded_into_a_merged_module() -> None:
    layer, parameter = nn.Linear(12, 8), nn.Linear(12, 8)
    for net in (made(LoConModule, layer), LoConModule.parametrize(parameter, "weight")):
        stir(net)
        state = {key: tensor.clone() for key, tensor in net.state_dict().items()}
        net.merge_to()
        other = {key: tensor if key == "alpha" else tensor + 1 for key, tensor in state.items()}
        with pytest.raises(AttachError, match="merged"):
            net.load_state_dict(other)
        assert all(torch.equal(tensor, state[key]) for key, tensor in net.state_dict().items())
        net.onfly_restore()
        net.load_state_dict(other)


def test_a_parametrization_is_still_on_after_a_merge_that_a_warning_stopped() -> None:
    base = nn.Linear(12, 8).bfloat16()
    net: Any = LoConModule.parametrize(base, "weight")
    nn.init.constant_(net.lora_up.weight, 1e-6)
    with pytest.raises(UserWarning, match="below the quantization step"):
        net.merge_to()
    assert parametrize.is_parametrized(base, "weight")
    net.restore()


def test_what_no_module_can_take_is_told() -> None:
    net: Any = FullModule("a", nn.Linear(12, 8, bias=False))
    with pytest.raises(ConfigError, match="has no tensor bias"):
        net.bias = nn.Parameter(torch.ones(8))
    lora = LoConModule("a", nn.Linear(12, 8))
    with pytest.raises(ConfigError, match="finite"):
        lora.multiplier = float("nan")
    assert lora.multiplier == 1.0
