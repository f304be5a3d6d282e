"""Base layers whose forward has no derivative: what lies before them trains on right gradients, or not at all."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cases import ALGORITHMS, perturb, relative
from lycoris import AdapterSet, AttachError, LoRA, Rule, plan
from lycoris.layers import base_weights
from quantized import Float8Linear, float8, torchao


class NoGrad(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return super().forward(x)


class Detached(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).detach()


class Inference(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        with torch.inference_mode():
            y = super().forward(x)
        return y.clone()


class Opaque(nn.Linear):
    """As kernels of other libraries: a result that autograd knows nothing of."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.from_numpy(x.detach().numpy() @ self.weight.detach().numpy().T) + self.bias


class Int8(nn.Linear):
    """Codes that no row of the table knows."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.weight = nn.Parameter(torch.randint(-9, 9, (outputs, inputs), dtype=torch.int8), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return (x.detach() @ self.weight.to(x.dtype).T) / 64


UNREADABLE = (NoGrad, Detached, Inference, Opaque, Int8)


class Frozen8(Float8Linear):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return super().forward(x)


def frozen8(layer: nn.Linear) -> nn.Module:
    made = float8(layer, torch.float8_e4m3fn, scaled=True)
    made.__class__ = Frozen8
    return made


def dynamic(layer: nn.Linear) -> nn.Module:
    return torchao(layer, "Int8DynamicActivationInt8WeightConfig")


def frozen_conv(layer: nn.Conv2d) -> nn.Module:
    class FrozenConv(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                return self._conv_forward(x, self.weight.to(x.dtype), self.bias)

    layer.__class__ = FrozenConv
    layer.weight = nn.Parameter(layer.weight.detach().to(torch.float8_e5m2), requires_grad=False)
    return layer


def chain(make: Callable[[int, int], nn.Module], between: int = 0) -> nn.Sequential:
    """Layers with others between, all frozen."""
    middle = [layer for _ in range(between) for layer in (make(8, 8), nn.Tanh())]
    return nn.Sequential(make(8, 8), nn.Tanh(), *middle, make(8, 8)).requires_grad_(False)


def adapted(model: nn.Module, path: str = "*", algorithm: str = "lora") -> AdapterSet:
    adapters = AdapterSet.build(model, plan(model, Rule(ALGORITHMS[algorithm], path=path), strict=False)).attach()
    perturb(adapters, 0.1)
    return adapters


@pytest.mark.parametrize("layer", UNREADABLE)
@pytest.mark.parametrize("algorithm", ["lora", "ia3", "oft"])
def test_a_gradient_that_would_be_wrong_is_refused(layer: type[nn.Linear], algorithm: str) -> None:
    model = chain(layer)
    adapters = adapted(model, algorithm=algorithm)
    loss = model(torch.randn(4, 8)).square().sum()
    with pytest.raises(AttachError, match=rf"^2 \({layer.__name__}, .*\): .*has no derivative"):
        loss.backward()
    assert [row.trains for row in adapters.capabilities().rows] == [False]
    assert "its forward has no derivative" in str(adapters.capabilities())


def test_all_such_layers_of_a_pass_are_named() -> None:
    model = chain(NoGrad, between=1)
    adapted(model)
    loss = model(torch.randn(4, 8)).sum()
    with pytest.raises(AttachError, match=r"4 \(NoGrad, dense float32\), 2 \(NoGrad, dense float32\)"):
        loss.backward()


@pytest.mark.parametrize("layer", UNREADABLE)
def test_adapters_behind_such_a_layer_train(layer: type[nn.Linear]) -> None:
    model, x = chain(layer), torch.randn(4, 8)
    adapters = adapted(model, "2")
    model(x).sum().backward()
    assert all(parameter.grad is not None for parameter in adapters.parameters())


@pytest.mark.parametrize("reentrant", [None, False, True])
@pytest.mark.parametrize("layer", UNREADABLE)
def test_passes_without_a_backward_pass_are_left_alone(layer: type[nn.Linear], reentrant: bool | None) -> None:
    model, x = chain(layer), torch.randn(4, 8, requires_grad=True)
    adapted(model)

    def run() -> Tensor:
        return model(x) if reentrant is None else checkpoint(model, x, use_reentrant=reentrant)

    expected = run()
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            assert torch.equal(run(), expected)


@pytest.mark.parametrize("reentrant", [False, True])
def test_under_checkpointing(reentrant: bool) -> None:
    model, x = chain(NoGrad), torch.randn(4, 8, requires_grad=True)
    adapted(model)
    loss = checkpoint(model, x, use_reentrant=reentrant).sum()
    with pytest.raises(AttachError, match="has no derivative"):
        loss.backward()


@pytest.mark.slow
def test_a_compiled_model_is_refused_too() -> None:
    model = chain(NoGrad)
    adapted(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loss = torch.compile(model, backend="eager")(torch.randn(4, 8)).sum()
    with pytest.raises(AttachError, match="has no derivative"):
        loss.backward()


def test_a_tensor_before_such_a_layer_is_warned_of() -> None:
    """A region that is checkpointed in the reentrant way hides what trains before it; so it may be harmless."""
    model, x = chain(NoGrad), torch.randn(4, 8, requires_grad=True)
    adapted(model, "0")
    loss = model[0](x).sum()
    with pytest.warns(UserWarning, match="Gradients of tensors before it are without its part"):
        loss.backward()


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("algorithm", ["lora", "loha-high-rank", "dora-lora", "ia3", "oft", "glora"])
@pytest.mark.parametrize("make", [frozen8, dynamic])
def test_a_weight_that_is_read_stands_in(
    make: Callable[[nn.Linear], nn.Module], algorithm: str, autocast: bool
) -> None:
    """The gradient is that of dense layers with the decoded weights, up to the rounding of activations."""
    low = chain(lambda i, o: make(nn.Linear(i, o)), between=1)
    dense = chain(nn.Linear, between=1)
    for own, other in zip(dense, low, strict=True):
        if isinstance(own, nn.Linear):
            weight, bias = base_weights.read(other)
            own.weight, own.bias = (nn.Parameter(part.detach(), requires_grad=False) for part in (weight, bias))
    first, x = adapted(low, algorithm=algorithm), torch.randn(40, 8)
    second = AdapterSet.build(dense, plan(dense, Rule(ALGORITHMS[algorithm]), strict=False)).attach()
    second.load_state_dict(first.state_dict())
    for model in (low, dense):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            model(x).square().sum().backward()
    bar = 0.3 if autocast or make is dynamic else 1e-4
    for one, two in zip(first.parameters(), second.parameters(), strict=True):
        assert relative(one.grad, two.grad) < bar
    (row,) = first.capabilities().rows
    assert row.trains
    assert "backward decodes the weight" in row.remark


def test_a_convolution_that_is_read_stands_in() -> None:
    model = nn.Sequential(nn.Conv2d(4, 6, 3, padding=1), nn.Tanh(), frozen_conv(nn.Conv2d(6, 4, 3, stride=2)))
    model.requires_grad_(False)
    adapters, x = adapted(model), torch.randn(2, 4, 7, 7)
    model(x).square().sum().backward()
    found = [parameter.grad.clone() for parameter in adapters.parameters()]
    for parameter in adapters.parameters():
        parameter.grad = None
    y = model[1](model[0](x))
    (top,) = adapters.stacks["2"]
    base = nn.functional.conv2d(y, base_weights.read(model[2]).weight, model[2].bias, stride=2)
    change = top.adapt_affine(base_weights.Affine(torch.zeros(4, 6, 3, 3), None)).weight
    (base + nn.functional.conv2d(y, change, stride=2)).square().sum().backward()
    for parameter, grad in zip(adapters.parameters(), found, strict=True):
        assert relative(grad, parameter.grad) < 1e-4


def test_layers_with_a_derivative_get_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    from lycoris.layers import derivative

    monkeypatch.setattr(derivative, "supply", lambda *_: pytest.fail("nothing was missing"))
    model = chain(nn.Linear)
    adapters = adapted(model)
    for x in (torch.randn(4, 8), torch.randn(4, 8, requires_grad=True)):
        model(x).sum().backward()
        checkpoint(model, x.requires_grad_(), use_reentrant=True).sum().backward()
    assert not any(adapter.seen.cut for stack in adapters.stacks.values() for adapter in stack)


@pytest.mark.parametrize("block", [None, (8, 16), (7, 5)])
def test_the_fp8_layers_of_transformers_are_read(block: tuple[int, int] | None) -> None:
    fp8 = pytest.importorskip("transformers.integrations.finegrained_fp8")
    layer = fp8.FP8Linear(48, 32, block_size=block).requires_grad_(False)
    layer.weight.data.copy_(torch.randn(32, 48))
    layer.weight_scale_inv.data.copy_(torch.rand(layer.weight_scale_inv.shape) + 0.5)
    expected = layer.weight.float()
    for o in range(32):
        for i in range(48):
            at = () if block is None else (o // block[0], i // block[1])
            expected[o, i] *= layer.weight_scale_inv[at]
    assert torch.equal(base_weights.read(layer).weight, expected)
    model = nn.Sequential(layer)
    adapters = AdapterSet.build(model, plan(model, Rule(LoRA(rank=2))))
    (row,) = adapters.capabilities().rows
    assert (row.stored_as, row.trains, row.merges) == ("float8_e4m3fn storage", True, True)
    perturb(adapters, 1.0)
    change = adapters.stacks["0"][0].adapt_affine(base_weights.Affine(torch.zeros(32, 48), None)).weight
    adapters.merge(into_low_bit=True)
    assert relative(base_weights.read(layer).weight, expected + change) < 1 / 8


def test_a_scale_of_unknown_meaning_is_refused() -> None:
    layer = Float8Linear(16, 8)
    layer.weight = nn.Parameter(layer.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    layer.register_buffer("input_scale", torch.ones(()))
    assert base_weights.read(layer).weight.shape == (8, 16)
    layer.register_buffer("scale_2", torch.ones(8, 1))
    with pytest.raises(AttachError, match=r"scale_2 beside it is not known here; known are weight_scale"):
        base_weights.read(layer)
