"""Other ways to recompute a pass, and what may not be changed before it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_recomputation import FORMS, Net, check_same, inputs
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from cases import adapt
from lycoris import AttachError, LoRA, TLoRA


@pytest.mark.parametrize("form", ["compiled around", "sequential"])
def test_other_ways_to_checkpoint(form: str) -> None:
    """A compiled model with checkpoints in it, and `checkpoint_sequential`."""
    found = []
    for plain in (True, False):
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4))).double()
        adapters = adapt(model, LoRA(rank=2))

        def run(x: Tensor, model: nn.Sequential = model) -> Tensor:
            return checkpoint(model, x, use_reentrant=False)

        ways = {
            "compiled around": torch.compile(run, backend="aot_eager"),
            "sequential": lambda x, model=model: checkpoint_sequential(model, 2, x, use_reentrant=False),
        }
        loss = torch.zeros((), dtype=torch.float64)
        x = torch.ones(2, 8, dtype=torch.float64, requires_grad=True)
        for strength in (1.0, -0.5, 2.0):
            adapters.set_strength(strength)
            loss = loss + strength * (model if plain else ways[form])(x).square().sum()
        adapters.set_strength(0.0)
        loss.backward()
        found.append([p.grad for p in adapters.parameters()])
    check_same(found[1], found[0])
    torch._dynamo.reset()


class Again(torch.autograd.Function):
    """Recomputes like a checkpoint; what its first run knows of its graph is not to be seen from outside."""

    @staticmethod
    def forward(run: Any, x: Tensor) -> Tensor:
        return run(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.run, x = inputs
        ctx.save_for_backward(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor | None]:
        (x,) = ctx.saved_tensors
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            y = ctx.run(x)
        torch.autograd.backward(y, gradient)
        return None, x.grad


class Classic(torch.autograd.Function):
    """The same in the form that DeepSpeed's, Megatron's and Unsloth's have."""

    @staticmethod
    def forward(ctx: Any, run: Any, x: Tensor) -> Tensor:
        ctx.run = run
        ctx.save_for_backward(x)
        return run(x)

    backward = Again.backward


def recomputed_by(function: type[torch.autograd.Function], strengths: list[float]) -> list[list[Tensor]]:
    found = []
    for run in (lambda model, x: model(x), function.apply):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)).double()
        adapters = adapt(model, LoRA(rank=2))
        x = torch.ones(2, 8, dtype=torch.float64, requires_grad=True)
        loss = torch.zeros((), dtype=torch.float64)
        for strength in strengths:
            adapters.set_strength(strength)
            loss = loss + strength * run(model, x).square().sum()
        loss.backward()
        found.append([p.grad for p in adapters.parameters()])
    return found


def test_functions_of_other_libraries_that_recompute() -> None:
    check_same(*recomputed_by(Classic, [1.0, -1.0, 0.5]))


def test_a_recomputation_that_cannot_be_told_apart_is_refused_once_it_matters() -> None:
    check_same(*recomputed_by(Again, [1.5, 1.5]))
    with pytest.raises(AttachError, match=r"use torch\.utils\.checkpoint\.checkpoint"):
        recomputed_by(Again, [1.0, -1.0])


@FORMS
@pytest.mark.parametrize("merged_first", [False, True])
def test_merging_before_the_recomputation_is_refused(merged_first: bool, reentrant: bool) -> None:
    model = Net(reentrant).double()
    adapters = adapt(model, LoRA(rank=2))
    if merged_first:
        adapters.merge()
    ((x, text),) = inputs(1, "equal")
    loss = model(x, text).square().sum()
    adapters.unmerge() if merged_first else adapters.merge()
    with pytest.raises(AttachError, match=r"call backward\(\) first"):
        loss.backward()


@FORMS
def test_attaching_before_the_recomputation_is_refused(reentrant: bool) -> None:
    model = Net(reentrant).double()
    first = adapt(model, LoRA(rank=2), name="first")
    ((x, text),) = inputs(1, "equal")
    loss = model(x, text).square().sum()
    adapt(model, LoRA(rank=2), name="second")
    with pytest.raises((AttachError, RuntimeError), match=r"adapters are attached|different number of tensors"):
        loss.backward()
    first.detach()


def test_nothing_is_left_of_a_pass_when_its_graph_is_gone() -> None:
    import gc
    import weakref

    model = Net(False).double()
    adapters = adapt(model, TLoRA(rank=3))
    keep = torch.ones(1, 3)
    adapters.set_rank_mask(keep)
    call = weakref.ref(adapters.stacks["blocks.0.q"][0].call)
    ((x, text),) = inputs(1, "equal")
    loss = model(x, text).square().sum()
    adapters.set_rank_mask(None)
    model(x, text)
    assert call() is not None
    loss.backward()
    del loss
    gc.collect()
    adapters.stacks["blocks.0.q"][0]._history.__init__(0)  # type: ignore[misc]  # it remembers the first state
    assert call() is None
