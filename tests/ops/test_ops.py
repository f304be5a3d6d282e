"""Each function that has its own backward against the same by plain autograd, odd sizes included."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from benchmarks.kept import Kept
from torch import Tensor, nn

from cases import relative
from lycoris.algorithms import rebuilt_weight
from lycoris.layers.geometry import describe
from lycoris.ops import channel_scale, kronecker, low_rank, rotation


def parameter(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).requires_grad_()


def same(fast: Tensor, slow: Tensor, inputs: list[Tensor]) -> None:
    assert relative(fast, slow) < 1e-12
    weights = torch.randn_like(slow)
    for a, b in zip(
        torch.autograd.grad((fast * weights).sum(), inputs, retain_graph=True),
        torch.autograd.grad((slow * weights).sum(), inputs, retain_graph=True),
        strict=True,
    ):
        assert relative(a, b) < 1e-11


@pytest.mark.parametrize("shape", [(700, 512), (3, 300, 512), (1, 65, 5000)])
@pytest.mark.parametrize("biased", [True, False])
def test_bend(shape: tuple[int, ...], biased: bool) -> None:
    y, w = parameter(*shape), parameter(shape[-1])
    bias = parameter(shape[-1]) if biased else None
    inputs = [y, w] if bias is None else [y, w, bias]
    fast = channel_scale.bend(y, w, -1, bias)
    assert "_Bend" in str(fast.grad_fn), "the size at which it pays"
    same(fast, channel_scale.reference(y, w, -1, bias), inputs)


@pytest.mark.parametrize(("n", "s", "tokens"), [(3, 4, 1), (5, 6, 700), (1, 8, 256)])
@pytest.mark.parametrize("shifted", [True, False])
def test_turn_blocks(n: int, s: int, tokens: int, shifted: bool) -> None:
    y, turn, shift = parameter(tokens, n * s), parameter(n, s, s), parameter(n * s) if shifted else None
    rows = y.reshape(-1, n, s)
    slow = (rows + torch.einsum("tns,nsk->tnk", rows, turn)).reshape(y.shape)
    inputs = [y, turn] if shift is None else [y, turn, shift]
    same(rotation.turn_blocks(y, turn, -1, shift), slow if shift is None else slow + shift, inputs)


@pytest.mark.parametrize(("o", "s"), [(2, 2), (12, 12), (24, 6), (64, 4), (96, 12)])
@pytest.mark.parametrize("stretched", [True, False])
def test_butterfly_joins_stages_into_the_same(o: int, s: int, stretched: bool) -> None:
    n = o // s
    y, stages, shift = parameter(300, o), parameter(n.bit_length(), n, s, s), parameter(o)
    length = parameter(o) if stretched else None
    rows = y.T
    for i, turn in enumerate(stages):
        rows = rotation.stage(rows, turn, i)
    slow = rows.T if length is None else rows.T * length
    inputs = [y, stages] if length is None else [y, stages, length]
    butterfly = rotation.joined_butterfly(stages, length)
    same(rotation.turn_all(y, butterfly), slow, inputs)
    same(rotation.turn_all(y, butterfly, shift), slow + shift, [*inputs, shift])


@pytest.mark.parametrize("bound", [0.0, 0.3, 1e9])
def test_cayley(bound: float) -> None:
    blocks = parameter(3, 5, 5)
    turn = rotation.cayley(blocks, bound)
    whole = turn + torch.eye(5)
    assert relative(whole @ whole.mT, torch.eye(5).expand(3, 5, 5)) < 1e-12, "a rotation"
    assert torch.autograd.gradcheck(lambda b: rotation.cayley(b, bound), (blocks,))
    small = 1e-9 * torch.randn(2, 4, 4)
    assert relative(rotation.cayley(small), 2 * (small - small.mT)) < 1e-6, "small turns keep their digits"
    assert torch.equal(rotation.cayley(torch.zeros(2, 4, 4)), torch.zeros(2, 4, 4))


@pytest.mark.parametrize(("ol", "im", "ok", "inner"), [(4, 3, 5, 2), (2, 16, 9, 1), (1, 1, 6, 7), (8, 2, 3, 40)])
def test_kronecker(ol: int, im: int, ok: int, inner: int) -> None:
    w1, w2, x, y = parameter(ol, im), parameter(ok, inner), parameter(2, 70, im * inner), parameter(2, 70, ol * ok)
    slow = y + x @ kronecker.kron(w1, w2).T
    same(kronecker.add_linear(y, x, w1, w2), slow, [w1, w2, x, y])
    a, b = parameter(ok, 2), parameter(2, inner)
    same(kronecker.add_linear_split(y, x, w1, a, b), y + x @ kronecker.kron(w1, a @ b).T, [w1, a, b, x, y])


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("kernel", [(), (3,), (2, 3)])
def test_norms_from_factors(axis: int, kernel: tuple[int, ...]) -> None:
    weight = torch.randn(12, 6, *kernel, dtype=torch.float64)
    others = [at for at in range(weight.dim()) if at != axis]
    out, into = parameter(12, 2), parameter(2, 6, *kernel)
    w1, w2 = parameter(3, 2), parameter(4, 3, *kernel)
    cases = [
        (low_rank.low_rank_gram(weight, out, into, axis), (out @ into.flatten(1)).reshape(weight.shape), [out, into]),
        (kronecker.kron_gram(weight, w1, w2, axis), kronecker.kron(w1, w2), [w1, w2]),
    ]
    for (inner, square), delta, inputs in cases:
        same(inner, (weight * delta).sum(others), inputs)
        same(square, delta.square().sum(others), inputs)


LAYERS = [
    nn.Linear(5, 7),
    nn.Conv1d(3, 4, 3, padding=1),
    nn.Conv2d(4, 6, (2, 3), stride=2, dilation=2, padding=1, groups=2),
    nn.Conv2d(3, 4, 2, padding="same"),
    nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"),
    nn.Conv3d(2, 3, 2),
]


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("layer", LAYERS, ids=str)
@pytest.mark.parametrize("based", [True, False])
def test_rebuilt_is_the_same_and_keeps_no_weight(layer: nn.Module, based: bool) -> None:
    g = describe(layer.double())
    assert g is not None
    factors = [parameter(g.out_features, 2), parameter(2, g.fan_in)]
    x = parameter(2, g.in_features * g.groups, *(6 for _ in g.kernel)) if g.kernel else parameter(2, 3, 5)
    base = (layer.weight, layer.bias) if based else (None, None)
    inputs = [x, *factors, *(t for t in base if t is not None)]

    def build(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b).reshape(g.shape)

    kept = Kept(x, layer.weight)
    with kept.during():
        fast = rebuilt_weight.apply_rebuilt(build, g, x, *base, factors)
    assert g.size not in kept.sizes()
    same(fast, rebuilt_weight.apply_by_autograd(build, g, x, *base, factors), inputs)


def test_rebuilt_passes_gradcheck() -> None:
    g = replace(describe(nn.Linear(4, 3)), has_bias=False)
    a, b, x, weight = parameter(3, 2), parameter(2, 4), parameter(5, 4), parameter(3, 4)
    assert torch.autograd.gradcheck(
        lambda *t: rebuilt_weight.apply_rebuilt(lambda p, q: torch.tanh(p @ q), g, t[2], t[3], None, list(t[:2])),
        (a, b, x, weight),
    )
