"""`verify`: every adapter on a batch, and nothing of the model changed by it."""

from __future__ import annotations

import copy
import random
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from cases import LAYERS, PAIRS_WITH_SLICES, WITH_SLICES, Experts, Fused, One, perturb
from lycoris import (
    AdapterSet,
    AttachError,
    ConfigError,
    LoRA,
    RankSchedule,
    Rule,
    TLoRA,
    Verification,
    create_lycoris,
    plan,
    verify,
)
from quantized import CPU

SOME = ("linear", "conv2d", "embedding", "layer-norm", "parameter", "experts")


def on(model: nn.Module, *rules: Rule) -> AdapterSet:
    return AdapterSet.build(model, plan(model, rules or Rule(LoRA(rank=2)))).attach()


def row(found: Verification, path: str) -> Any:
    return next(layer for layer in found.layers if layer.path == path)


class Faulty(nn.Module):
    """One layer for each thing that can be amiss."""

    def __init__(self) -> None:
        super().__init__()
        self.fine, self.twice = nn.Linear(8, 8), nn.Linear(8, 8)
        self.read, self.both = nn.Linear(8, 8), nn.Linear(8, 8)
        self.unused, self.silent, self.stopped = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.twice(self.twice(self.fine(x)))
        x = F.linear(x, self.read.weight, self.read.bias)
        x = self.both(x) + F.linear(x, self.both.weight)
        self.silent(x)
        with torch.no_grad():
            stopped = self.stopped(x)
        return x + stopped


FAULTS = {
    "fine": "",
    "twice": "",
    "read": "its weight is read and it is not called",
    "both": "its weight is used elsewhere too",
    "unused": "not called in this batch",
    "silent": "no gradient arrives",
    "stopped": "no gradient arrives",
}


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.filterwarnings("ignore:.*of 7 adapted layers")
def test_each_fault_is_found_by_name(trained: bool) -> None:
    model = Faulty().requires_grad_(False)
    adapters = on(model)
    if trained:
        perturb(adapters)
    found = verify(adapters, torch.randn(3, 8))
    assert [layer.calls for layer in found.layers] == [1, 2, 0, 1, 0, 1, 1]
    assert [layer.fresh for layer in found.layers] == [not trained or layer.effect == 0 for layer in found.layers]
    for path, fault in FAULTS.items():
        assert (fault in found.problems[path]) if fault else path not in found.problems
    assert not found.ok
    assert "7 " not in str(found).splitlines()[0]
    for path, told in found.problems.items():
        assert told in str(found)
        assert path in str(found)


def test_what_it_measures() -> None:
    """Against the same by hand."""
    model, x = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)), torch.randn(5, 8)
    adapters = on(model)
    perturb(adapters)
    found = verify(adapters, x)
    y = model(x)
    for path in ("0", "2"):
        with adapters.at():
            adapters.set_strength(0.0, at=path)
            effect = float(((y - model(x)).abs().max() / y.abs().max()).detach())
        assert row(found, path).effect == pytest.approx(effect, rel=1e-4)
        assert row(found, path).difference < 1e-5
    assert found.ok
    assert found.noise == 0
    assert found.gradient_error < 0.01


def test_the_gradient_is_that_of_a_loss_that_is_returned() -> None:
    model, x = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)), torch.randn(5, 8)
    adapters = on(model)
    perturb(adapters)
    found = verify(adapters, lambda: model(x).square().mean())
    model(x).square().mean().backward()
    for path, (adapter,) in adapters.stacks.items():
        norm = torch.cat([parameter.grad.flatten() for parameter in adapter.parameters()]).norm()
        assert row(found, path).gradient == pytest.approx(float(norm), rel=1e-4)


@pytest.mark.parametrize("where", ["layer", "code"])
def test_gradients_that_lack_a_part_are_found(where: str) -> None:
    """A way around a layer without a derivative: what lies before it gets a gradient, and a wrong one."""

    class Frozen(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.detach()).detach()

    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.before, self.frozen, self.after = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
            if where == "layer":
                self.frozen.__class__ = Frozen

        def forward(self, x: Tensor) -> Tensor:
            x = self.before(x)
            y = self.frozen(x) if where == "layer" else F.linear(x.detach(), self.frozen.weight)
            return self.after(x + 3 * y)

    model = Around().requires_grad_(False)
    adapters = on(model, Rule(LoRA(rank=2), path="before"), Rule(LoRA(rank=2), path="after"))
    perturb(adapters)
    found = verify(adapters, torch.randn(3, 8))
    assert found.gradient_error > 0.1
    assert found.cuts == (("frozen",) if where == "layer" else ())
    assert "something between adapters and loss has no derivative" in found.problems[""]


def test_a_layer_without_a_derivative_is_told_by_its_error() -> None:
    class Frozen(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).detach()

    model = nn.Sequential(nn.Linear(8, 8), Frozen(8, 8)).requires_grad_(False)
    found = verify(on(model), torch.randn(3, 8))
    assert "1 (Frozen, dense float32)" in found.problems[""]
    assert found.gradient_error is None


@pytest.mark.parametrize(("name", "layer"), [pair for pair in PAIRS_WITH_SLICES if pair[1] in SOME])
def test_every_algorithm_passes(name: str, layer: str) -> None:
    model = One(LAYERS[layer].layer()).requires_grad_(False)
    adapters = AdapterSet.build(model, plan(model, Rule(WITH_SLICES[name], kind="*"), strict=False)).attach()
    found = verify(adapters, LAYERS[layer].input())
    assert found.ok, f"{found}\n{found.problems}"
    assert all(each.effect > 0 and each.difference < 1e-4 for each in found.layers)


class Varied(nn.Module):
    """Dropout, running statistics, shared and bare weights, randomness of every source."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.drop = nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.5)
        self.fused, self.embed, self.head = Fused(8, 8), nn.Embedding(8, 8), nn.Linear(8, 8)
        self.head.weight = self.embed.weight
        self.experts = Experts(2, 8, 8)

    def forward(self, x: Tensor, *, scale: float = 1.0) -> dict[str, Any]:
        x = checkpoint(self.a, self.drop(self.norm(x)), use_reentrant=True)
        x = x + random.random() + float(np.random.rand()) + torch.rand(())
        y = self.experts(self.fused(x).expand(2, *x.shape)).sum(0)
        return {"out": (self.head(y) * scale, [x]), "ids": torch.arange(3), "none": None}


def _everything(model: nn.Module, adapters: AdapterSet) -> dict[str, Any]:
    return {
        "state": {key: value.clone() for key, value in model.state_dict().items()},
        "adapters": adapters.state_dict(),
        "identities": [(id(parameter), parameter.requires_grad) for parameter in model.parameters()],
        "grads": [None if parameter.grad is None else parameter.grad.clone() for parameter in model.parameters()],
        "modes": [module.training for module in model.modules()],
        "hooks": [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()],
        "classes": [type(module) for module in model.modules()],
        "strengths": (adapters.strength, dict(adapters.strengths.blocks)),
        "calls": [(adapter.call.strength, adapter.call.rank_mask) for _, _, adapter in adapters._each()],
        "seen": [
            tuple(getattr(adapter.seen, name) for name in adapter.seen.__slots__) for _, _, adapter in adapters._each()
        ],
        "random": (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()),
    }


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return bool((a == b).all())
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, tuple | list):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


@pytest.mark.parametrize("attached", [True, False])
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True:UserWarning")
def test_everything_is_as_it_was(attached: bool) -> None:
    model, x = Varied(), torch.randn(3, 8)
    rules = Rule(LoRA(rank=2), path="head"), Rule(LoRA(rank=2, dropout=0.3), path="a"), Rule(LoRA(rank=2), kind="*")
    adapters = on(model, *rules)
    model.requires_grad_(True)  # reentrant checkpointing wants an input with a gradient
    perturb(adapters)
    adapters.set_strength(0.7, {"fused": 0.5})
    model(x)["out"][0].sum().backward()
    stepped: list[Tensor] = []
    for parameter in filter(lambda parameter: parameter.requires_grad, model.parameters()):
        parameter.register_post_accumulate_grad_hook(stepped.append)
    model.norm.eval()
    if not attached:
        adapters.detach()
    before = _everything(model, adapters)
    found = verify(adapters, lambda: model(x, scale=2.0))
    after = _everything(model, adapters)
    assert not stepped, "optimizers that work in hooks have nothing to do with it"
    assert adapters.attached is attached
    for what, value in before.items():
        assert _same(value, after[what]), what
    assert {each.path for each in found.layers} == {"a", "fused.weight_in", "head", "experts.experts"}
    assert found.noise == 0
    assert found.ok, found


def test_everything_is_as_it_was_after_an_error() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Dropout())
    adapters = on(model)
    perturb(adapters)
    x, other = torch.randn(3, 8), torch.randn(3, 5)
    before = _everything(model, adapters)
    for batch in (other, lambda: model(x).detach()):
        with pytest.raises((RuntimeError, AttachError)):
            verify(adapters, batch)
        after = _everything(model, adapters)
        assert [what for what, value in before.items() if not _same(value, after[what])] == []


def test_batches_of_every_form() -> None:
    model, x = nn.Sequential(nn.Linear(8, 8)), torch.randn(3, 8)
    adapters = on(model)
    forms = [x, (x,), [x], {"input": x}, lambda: model(x)]
    assert len({str(verify(adapters, form)) for form in forms}) == 1


def test_networks_of_one_and_of_nothing() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    network = create_lycoris(model, linear_dim=2, algo="loha")
    assert verify(network, torch.randn(3, 8)).ok
    with pytest.raises(ConfigError, match="takes an AdapterSet or a network of create_lycoris, not Sequential"):
        verify(model, torch.randn(3, 8))


def test_merged_adapters_are_refused() -> None:
    adapters = on(nn.Sequential(nn.Linear(8, 8)))
    adapters.merge()
    with pytest.raises(AttachError, match="unmerge them first"):
        verify(adapters, torch.randn(3, 8))


def test_timestep_masks_are_off_and_come_back() -> None:
    model = One(nn.Linear(8, 8))
    adapters = on(model, Rule(TLoRA(rank=4)))
    perturb(adapters)
    adapters.schedule = RankSchedule(max_rank=4)
    adapters.rank_masks.follow()
    adapters.set_rank_mask(keep := torch.tensor([[1.0, 1.0, 0.0, 0.0]]))
    assert verify(adapters, torch.randn(3, 8)).ok
    assert torch.equal(adapters.stacks["layer"][0].call.rank_mask, keep)
    assert len(model._forward_pre_hooks) == 1


def test_layers_that_are_not_merged_into_pass_attached() -> None:
    model = nn.Sequential(CPU["bitsandbytes-nf4"].layer(64, 64), parametrizations.weight_norm(nn.Linear(64, 8)))
    found = verify(on(model.requires_grad_(False)), torch.randn(3, 64))
    assert found.ok
    assert [each.difference for each in found.layers] == [None, None]
    assert "ok, attached" in str(found)
    assert "stored as bitsandbytes nf4" in row(found, "0").remark


@pytest.mark.filterwarnings("ignore:after the first backward pass:UserWarning")
def test_half_precision_has_a_wider_tolerance() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64)).bfloat16().requires_grad_(False)
    adapters = on(model)
    found = verify(adapters, torch.randn(3, 64, dtype=torch.bfloat16))
    assert found.ok
    assert found.gradient_error is None
    assert found.tolerance > 0.01


def test_passes_that_differ_are_told() -> None:
    model, draws = nn.Sequential(nn.Linear(8, 8)), iter(torch.randn(99, 3, 8))
    found = verify(on(model), lambda: model(next(draws)))
    assert found.noise > 0
    assert "two equal passes differ by" in str(found)


def test_a_copy_of_the_model_gives_the_same() -> None:
    model, x = nn.Sequential(nn.Linear(8, 8)), torch.randn(3, 8)
    adapters = on(model)
    perturb(adapters)
    first = str(verify(adapters, x))
    copy.deepcopy(model)
    assert str(verify(adapters, x)) == first
