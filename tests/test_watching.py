"""Adapters that nothing calls, or that get no gradient, are named after the first backward pass and when merged."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cases import Fused, perturb
from lycoris import AdapterSet, LoRA, Rule, plan

EVERY = Rule(LoRA(rank=2), kind=("linear", "parameter"))


class Reads(nn.Module):
    """`used` is called; the weight of `read` is used without calling it."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.read, self.unused = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        self.unused(x)
        return F.linear(self.used(x), self.read.weight, self.read.bias)


class Stops(nn.Module):
    """What comes before `stop` gets no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.after = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.before(x).detach())


class Blocks(nn.Module):
    def __init__(self, reentrant: bool | None, n: int = 3) -> None:
        super().__init__()
        self.blocks, self.reentrant = nn.ModuleList([Reads() for _ in range(n)]), reentrant

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x) if self.reentrant is None else checkpoint(block, x, use_reentrant=self.reentrant)
        return x


class Outer(nn.Module):
    """Layers before and behind regions that are checkpointed inside one another."""

    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        self.first, self.inner, self.last = nn.Linear(4, 4), Blocks(reentrant), nn.Linear(4, 4)
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        def middle(x: Tensor) -> Tensor:
            return self.inner(self.inner(x))

        x = self.first(x)
        return self.last(middle(x) if self.reentrant is None else checkpoint(middle, x, use_reentrant=self.reentrant))


def on(model: nn.Module, rule: Rule = EVERY) -> AdapterSet:
    return AdapterSet.build(model.requires_grad_(False), plan(model, rule)).attach()


def said(run: Callable[[], object]) -> list[str]:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        run()
    # Checkpointing has something to say of regions inside one another.
    return [str(each.message) for each in found if "requires_grad=True" not in str(each.message)]


def test_a_layer_whose_weight_is_read_is_named_once() -> None:
    model = Reads()
    adapters = on(model)

    def step() -> None:
        model(torch.randn(2, 4)).sum().backward()

    (told,) = said(step)
    assert "1 of 3 adapted layers have not been called so far: read." in told
    assert "1 of 3 adapted layers were called and got no gradient so far: unused." in told
    assert said(step) == []
    (told,) = said(adapters.merge)
    assert "1 of 3 merged layers have not been called so far: read." in told


def test_the_report_of_a_merge_names_it() -> None:
    model = Reads()
    adapters = on(model)
    model(torch.randn(2, 4))
    with pytest.warns(UserWarning, match="not been called so far: read"):
        report = adapters.merge()
    assert report.uncalled == ("read",)
    assert "never called  read" in str(report)


def test_a_set_that_never_ran_is_merged_without_a_word() -> None:
    adapters = on(Reads())
    assert adapters.merge().uncalled == ()
    adapters.detach()
    fresh = AdapterSet.build(model := Reads(), plan(model, EVERY))
    assert fresh.merge().uncalled == ()


def test_a_model_that_calls_none_of_its_adapters_is_named_at_once() -> None:
    model = Reads()
    adapters = on(model, Rule(LoRA(rank=2), path="read"))
    with pytest.warns(UserWarning, match="a pass through Reads called none of its 1 adapted layers: read"):
        model(torch.randn(2, 4))
    assert said(lambda: model(torch.randn(2, 4))) == []
    with pytest.warns(UserWarning, match="1 of 1 merged layers have not been called"):
        adapters.merge()


def test_what_gets_no_gradient_is_named() -> None:
    model = Stops()
    on(model)
    with pytest.warns(UserWarning, match="called and got no gradient so far: before"):
        model(torch.randn(2, 4)).sum().backward()


@pytest.mark.parametrize("reentrant", [None, False, True])
@pytest.mark.parametrize("outer", [False, True])
def test_the_report_waits_for_the_end_of_backward(reentrant: bool | None, outer: bool) -> None:
    """Reentrant checkpointing nests backward passes: the end of an inner one is too early to say anything."""
    model = Outer(reentrant) if outer else Blocks(reentrant)
    on(model)
    (told,) = said(lambda: model(torch.randn(2, 4, requires_grad=True)).sum().backward())
    blocks = [f"{'inner.' if outer else ''}blocks.{at}" for at in range(3)]
    assert f"not been called so far: {', '.join(f'{block}.read' for block in blocks)}." in told
    assert f"no gradient so far: {', '.join(f'{block}.unused' for block in blocks)}." in told


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_a_model_that_uses_all_is_silent(reentrant: bool | None) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), Fused(4, 4), nn.Linear(4, 4))
    adapters = on(model)
    x = torch.randn(2, 4, requires_grad=True)
    (model(x) if reentrant is None else checkpoint(model, x, use_reentrant=reentrant)).sum().backward()
    assert all(parameter.grad is not None for parameter in adapters.parameters())
    assert adapters.merge().uncalled == ()


def test_strength_zero_frozen_adapters_and_gradients_by_request_are_silent() -> None:
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), torch.randn(2, 4)
    adapters = on(model)
    torch.autograd.grad(model(x).sum(), list(adapters.parameters()))
    adapters.set_strength(0.0, at="0")
    for parameter in adapters.stacks["1"][0].parameters():
        parameter.requires_grad_(False)
    adapters.set_strength(1.0, at="0")
    model(x).sum().backward()


def test_gradients_that_an_optimizer_takes_at_once_count() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    adapters = on(model)

    def take(parameter: Tensor) -> None:
        parameter.grad = None

    for parameter in adapters.parameters():
        parameter.register_post_accumulate_grad_hook(take)
    model(torch.randn(2, 4)).sum().backward()


def test_hooks_go_after_the_first_backward_pass_and_with_the_set() -> None:
    def hooks(model: nn.Module, adapters: AdapterSet) -> int:
        own = sum(len(parameter._post_accumulate_grad_hooks or ()) for parameter in adapters.parameters())
        return own + len(model._forward_hooks)

    model = nn.Sequential(nn.Linear(4, 4))
    adapters = on(model)
    assert hooks(model, adapters) > 0
    model(torch.randn(2, 4)).sum().backward()
    assert hooks(model, adapters) == 0
    model = nn.Sequential(nn.Linear(4, 4))
    adapters = on(model)
    adapters.detach()
    assert hooks(model, adapters) == 0


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_watched_model_is_copied(copied: Callable[[nn.Module], nn.Module]) -> None:
    model, x = nn.Sequential(nn.Linear(4, 4)), torch.randn(2, 4)
    perturb(on(model))
    assert torch.equal(copied(model)(x), model(x))


def test_a_compiled_model_is_watched_without_being_compiled_again() -> None:
    from torch._dynamo.testing import CompileCounter

    model, counter = Reads(), CompileCounter()
    adapters = on(model)
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    (told,) = said(lambda: compiled(torch.randn(2, 4)).sum().backward())
    assert "not been called so far: read." in told
    assert "got no gradient so far: unused." in told
    for _ in range(2):
        compiled(torch.randn(2, 4)).sum().backward()
    assert counter.frame_count == 1
    assert [stack[0].seen.called for stack in adapters.stacks.values()] == [True, False, True]


@pytest.mark.parametrize("strict", [False, True])
def test_a_model_is_exported_without_a_word(strict: bool) -> None:
    model, x = nn.Sequential(nn.Linear(4, 4)), torch.randn(2, 4)
    perturb(on(model))
    exported = torch.export.export(model, (x,), strict=strict).module()
    assert torch.allclose(exported(x), model(x))
