"""Gradients against finite differences, what is kept for backward, and randomness in training."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from benchmarks.kept import Kept
from torch import nn

from cases import LAYERS, PAIRS_WITH_SLICES, WITH_SLICES, One, adapt, relative
from lycoris import AdapterSet, LoRA, Rule, plan

SMALL = [
    pair for pair in PAIRS_WITH_SLICES if pair[1] in ("linear-prime", "conv1d", "embedding", "own-norm", "experts")
]
DROPS = [
    pair
    for pair in PAIRS_WITH_SLICES
    if pair[1] in ("linear", "conv2d", "embedding") and WITH_SLICES[pair[0]].has_dropout
]


@pytest.mark.parametrize(("name", "layer"), SMALL, ids=["-on-".join(pair) for pair in SMALL])
def test_gradcheck(name: str, layer: str) -> None:
    model, x = One(LAYERS[layer].layer()).eval().requires_grad_(False), LAYERS[layer].input()
    adapters = adapt(model, WITH_SLICES[name])
    adapters.set_strength(0.6)
    inputs = [x.requires_grad_()] if x.is_floating_point() else []
    assert torch.autograd.gradcheck(lambda *_: model(x), [*inputs, *adapters.parameters()], fast_mode=True)


TOKENS, WIDTH = 320, 256
KEEPS_OUTPUT = {"ia3": 1, "oft": 1, "oft-rescale": 1, "boft": 1, "dora-lora": 1, "dora-lokr-in": 2, "dora-loha": 1}
"""Those whose parameters meet the layer's output (or, on the input axis, a bent input): how many tensors like it."""
LEAN = ["lora", "lora-scalar", "loha", "loha-high-rank", "lokr", "lokr-full-matrix", "dylora", "tlora", "glora", "full"]


@pytest.mark.parametrize("name", [*LEAN, "ia3-in", *KEEPS_OUTPUT])
def test_what_is_kept_for_backward(name: str) -> None:
    """x and tensors of rank size; the layer's output where it has to be; a weight never."""
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH)).requires_grad_(False)
    adapters = AdapterSet.build(model, plan(model, Rule(WITH_SLICES[name]), strict=False)).attach()
    with torch.no_grad():
        for parameter in adapters.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    x = torch.randn(TOKENS, WIDTH, requires_grad=True)
    kept = Kept(x, *model.parameters(), *model.buffers())
    with kept.during():
        y = model(x)
    sizes = kept.sizes()
    assert y.requires_grad
    assert WIDTH * WIDTH not in sizes, "a weight"
    like_output = sum(size // (TOKENS * WIDTH) for size in sizes)
    allowed = KEEPS_OUTPUT.get(name, 0) + (2 if name == "lokr-full-matrix" or name == "dora-lokr-in" else 0)
    allowed += 1 if name == "lokr" else 0
    assert like_output <= allowed


@pytest.mark.sample(12)
@pytest.mark.parametrize(("name", "layer"), DROPS, ids=["-on-".join(pair) for pair in DROPS])
def test_training_draws_and_evaluation_does_not(name: str, layer: str) -> None:
    model, x = One(LAYERS[layer].layer()), LAYERS[layer].input()
    adapt(model, WITH_SLICES[name])
    model.train()
    seen = [model(x) for _ in range(24)]
    assert any(not torch.equal(seen[0], other) for other in seen[1:])
    torch.manual_seed(7)
    first = model(x)
    torch.manual_seed(7)
    assert torch.equal(model(x), first), "drawn from torch's own random numbers"
    model.eval()
    assert torch.equal(model(x), model(x))
    if (name, layer) in (("lora-drops", "linear"), ("full-drops", "linear")):
        model.train()
        mean = torch.stack([model(x) for _ in range(3000)]).mean(0).detach()
        model.eval()
        base = F.linear(x, model.layer.weight, model.layer.bias)
        kept = {"lora-drops": 0.6 * 0.8, "full-drops": 0.7}[name]
        assert relative(mean - base, kept * (model(x) - base)) < 0.2, "probabilities mean what they say"


@pytest.mark.parametrize("name", ["dylora", "dylora-rs"])
def test_dylora_trains_one_block_and_scales_by_the_ranks_in_use(name: str) -> None:
    model = One(nn.Linear(6, 5).double())
    adapters = adapt(model, WITH_SLICES[name])
    (adapter,) = adapters.stacks["layer"]
    x = torch.randn(3, 6, dtype=torch.float64)
    base = F.linear(x, model.layer.weight, model.layer.bias)
    seen = set()
    for _ in range(20):
        model.zero_grad()
        y = model(x)
        y.sum().backward()
        trained = [at for at in (0, 1) if adapter.down.grad.reshape(2, 2, -1)[at].abs().sum() > 0]
        assert len(trained) == 1
        n = 2 * (trained[0] + 1)
        scale = 2.0 / n if name == "dylora" else 4.0 / n**0.5
        wanted = base + scale * x @ (adapter.up[:, :n] @ adapter.down[:n]).T
        assert relative(y, wanted) < 1e-6
        seen.add(n)
    assert seen == {2, 4}


@pytest.mark.parametrize(("scaled", "share"), [(False, 0.5), (True, 1.0)])
def test_rank_dropout_keeps_its_share_or_its_size(scaled: bool, share: float) -> None:
    model = One(nn.Linear(6, 5).double()).train()
    adapt(model, LoRA(rank=16, rank_dropout=0.5, rank_dropout_scale=scaled))
    x = torch.randn(3, 6, dtype=torch.float64)
    mean = torch.stack([model(x) for _ in range(4000)]).mean(0).detach()
    base = F.linear(x, model.layer.weight, model.layer.bias)
    assert relative(mean - base, share * (model.eval()(x) - base)) < 0.1
