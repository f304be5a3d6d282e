"""Gradients under gradient checkpointing are those without it, whatever is set between passes and before backward."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cases import PAIRS_WITH_SLICES, WITH_SLICES, adapt, relative
from covering import select_quick
from lycoris import OFT, AdapterSet, AttachError, DoRA, LoRA, RankSchedule, TLoRA

EVERY = sorted({name for name, layer in PAIRS_WITH_SLICES if layer == "linear"})
FORMS = pytest.mark.parametrize("reentrant", [False, True], ids=["frames", "reentrant"])


class Block(nn.Module):
    """A self-attention of a kind: layers that see latents, and one that sees text alone."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.text = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        return x + torch.tanh(self.q(x)) * torch.tanh(self.text(text))


class Net(nn.Module):
    """Two blocks, each of them checkpointed in one form, in the other, or not at all (None)."""

    def __init__(self, reentrant: bool | None, **options: Any) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.reentrant, self.options = reentrant, options

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        for block in self.blocks:
            if self.reentrant is None:
                x = block(x, text)
            else:
                x = checkpoint(block, x, text, use_reentrant=self.reentrant, **self.options)
        return x


Pass = tuple[Tensor, Tensor]
Steer = Callable[[AdapterSet, nn.Module, int], None]


def gradients(model: nn.Module, passes: list[Pass], steer: Steer, *algorithms: Any, sets: int = 1) -> list[Tensor]:
    """Of all adapters, after one backward over all passes, before each of which `steer` sets what is in force."""
    torch.manual_seed(0)
    for parameter in model.double().requires_grad_(False).parameters():
        parameter.normal_(std=0.5)
    made = [adapt(model, *algorithms, name=f"set{at}") for at in range(sets)]
    for adapters in made:
        adapters.schedule = RankSchedule(max_rank=3)
    torch.manual_seed(1)
    loss = torch.zeros((), dtype=torch.float64)
    for at, (x, text) in enumerate(passes):
        for adapters in made:
            steer(adapters, model, at)
        loss = loss + (at + 1) * model(x, text).square().sum()
    for adapters in made:
        adapters.set_strength(7.0)
        adapters.set_rank_mask(None)
    model.eval()
    loss.backward()
    return [torch.zeros(1) if p.grad is None else p.grad for adapters in made for p in adapters.parameters()]


def check_same(found: list[Tensor], exact: list[Tensor]) -> None:
    for one, other in zip(found, exact, strict=True):
        assert relative(one, other) < 1e-10
    assert any(one.abs().max() > 0 for one in exact)


def inputs(passes: int, kind: str) -> list[Pass]:
    torch.manual_seed(2)
    text, x = torch.randn(2, 3, 8, dtype=torch.float64), torch.randn(2, 3, 8, dtype=torch.float64)
    found = []
    for at in range(passes):
        own = x.clone()
        if kind == "different latents":
            own = torch.randn_like(x)
        elif kind == "one element":
            own[0, 1, 3] += at
        found.append((own.requires_grad_(), text.clone().requires_grad_()))
    return found


def steer_everything(adapters: AdapterSet, model: nn.Module, at: int) -> None:
    model.train(at % 3 != 1)
    adapters.set_strength((-1) ** at * (1 + at / 7), {"blocks.0": 0.5 + at} if at % 2 else None)
    adapters.set_timesteps(torch.tensor([(at * 370) % 1000]))


@pytest.mark.sample(24)
@pytest.mark.parametrize("kind", ["equal", "different latents", "one element"])
@FORMS
@pytest.mark.parametrize("name", EVERY)
def test_every_algorithm_with_strengths_timesteps_and_modes_mixed(name: str, reentrant: bool, kind: str) -> None:
    passes = inputs(5, kind)
    exact = gradients(Net(None), passes, steer_everything, WITH_SLICES[name])
    check_same(gradients(Net(reentrant), passes, steer_everything, WITH_SLICES[name]), exact)


@pytest.mark.sample(4)
@FORMS
@pytest.mark.parametrize("name", ["lora", "tlora", "dora-lora", "lokr-drops"])
def test_forty_passes(name: str, reentrant: bool) -> None:
    passes = inputs(40, "equal")
    exact = gradients(Net(None), passes, steer_everything, WITH_SLICES[name])
    check_same(gradients(Net(reentrant), passes, steer_everything, WITH_SLICES[name]), exact)


STACKS = [
    (DoRA(inner=LoRA(rank=2)), TLoRA(rank=3)),
    (TLoRA(rank=3), DoRA(inner=LoRA(rank=2))),
    (OFT(block_size=2), LoRA()),
]


@FORMS
@pytest.mark.parametrize("sets", [1, 2])
@pytest.mark.parametrize("stack", STACKS, ids=["+".join(each.name for each in stack) for stack in STACKS])
def test_stacks_read_the_adapters_below_as_they_were(stack: tuple[Any, ...], sets: int, reentrant: bool) -> None:
    passes = inputs(4, "equal")
    exact = gradients(Net(None), passes, steer_everything, *stack, sets=sets)
    check_same(gradients(Net(reentrant), passes, steer_everything, *stack, sets=sets), exact)


class Nested(Net):
    """A checkpoint around everything, and the blocks' own within."""

    def __init__(self, outer: bool | None, inner: bool | None) -> None:
        super().__init__(inner)
        self.outer = outer

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        inside = super().forward
        return inside(x, text) if self.outer is None else checkpoint(inside, x, text, use_reentrant=self.outer)


@pytest.mark.parametrize("inner", [False, True])
@pytest.mark.parametrize("outer", [False, True])
@pytest.mark.parametrize("name", ["lora", "tlora", "dora-drops"])
def test_checkpoints_within_checkpoints(name: str, outer: bool, inner: bool) -> None:
    passes = inputs(4, "equal")
    exact = gradients(Nested(None, None), passes, steer_everything, WITH_SLICES[name])
    check_same(gradients(Nested(outer, inner), passes, steer_everything, WITH_SLICES[name]), exact)


class Inside(Net):
    """Sets the strength within the checkpointed part, whose layers it calls twice; one pass has no gradient."""

    adapters: AdapterSet

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        def run(x: Tensor, text: Tensor) -> Tensor:
            with self.adapters.at(strength=0.3):
                y = self.blocks[0](x, text)
            with torch.no_grad(), self.adapters.at(strength=-2.0):
                teacher = self.blocks[0](x, text)
            return y + self.blocks[0](x, text) - teacher

        return run(x, text) if self.reentrant is None else checkpoint(run, x, text, use_reentrant=self.reentrant)


@pytest.mark.filterwarnings("ignore:after the first backward pass")  # one of the blocks is left out
@FORMS
@pytest.mark.parametrize("name", ["lora", "dora-lora", "loha-drops"])
def test_what_changes_within_a_checkpointed_part(name: str, reentrant: bool) -> None:
    def steer(adapters: AdapterSet, model: nn.Module, at: int) -> None:
        model.adapters = adapters  # type: ignore[assignment]
        steer_everything(adapters, model, at)

    passes = inputs(3, "equal")
    exact = gradients(Inside(None), passes, steer, WITH_SLICES[name])
    check_same(gradients(Inside(reentrant), passes, steer, WITH_SLICES[name]), exact)


@FORMS
def test_a_pass_without_gradients_right_after_a_checkpointed_one_is_another_pass(reentrant: bool) -> None:
    """Nothing that autograd counts lies between them."""
    found = []
    for form in (None, reentrant):
        torch.manual_seed(0)
        model = Net(form).double()
        adapters = adapt(model, LoRA(rank=2))
        ((x, text),) = inputs(1, "equal")
        y = model(x, text)
        with torch.no_grad(), adapters.at(strength=0.0):
            base = model(x, text)
        (y - base).square().sum().backward()
        found.append([p.grad for p in adapters.parameters()])
    check_same(found[1], found[0])


@FORMS
@pytest.mark.parametrize("name", ["lora-drops", "oft-drops", "dora-drops", "dylora"])
def test_dropout_is_drawn_as_in_the_pass_when_the_checkpoint_does_not_care(name: str, reentrant: bool) -> None:
    passes = inputs(3, "equal")
    exact = gradients(Net(None), passes, steer_everything, WITH_SLICES[name])
    unkept = Net(reentrant, preserve_rng_state=False)
    check_same(gradients(unkept, passes, steer_everything, WITH_SLICES[name]), exact)


@FORMS
def test_a_recomputation_does_not_turn_random_numbers_back(reentrant: bool) -> None:
    model = Net(reentrant, preserve_rng_state=False).double()
    adapt(model, WITH_SLICES["lora-drops"])
    ((x, text),) = inputs(1, "equal")
    loss = model(x, text).square().sum()
    torch.rand(3)
    before = torch.get_rng_state()
    loss.backward()
    assert torch.equal(torch.get_rng_state(), before)


@contextlib.contextmanager
def on_cpu() -> Iterator[None]:
    with torch.autograd.graph.save_on_cpu():
        yield


class Hooked(Net):
    """Other hooks for saved tensors lie around the layers, within the checkpointed part."""

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        def run(x: Tensor, text: Tensor) -> Tensor:
            with on_cpu():
                return self.blocks[1](self.blocks[0](x, text), text)

        return run(x, text) if self.reentrant is None else checkpoint(run, x, text, use_reentrant=self.reentrant)


@FORMS
def test_hooks_of_others_do_not_hide_the_region(reentrant: bool) -> None:
    passes = inputs(3, "equal")
    exact = gradients(Hooked(None), passes, steer_everything, WITH_SLICES["tlora"])
    check_same(gradients(Hooked(reentrant), passes, steer_everything, WITH_SLICES["tlora"]), exact)


@FORMS
def test_two_backwards_through_one_graph(reentrant: bool) -> None:
    found = []
    for form in (None, reentrant):
        torch.manual_seed(0)
        model = Net(form).double()
        adapters = adapt(model, TLoRA(rank=3))
        adapters.set_rank_mask(torch.tensor([[1.0, 1.0, 0.0]]))
        ((x, text),) = inputs(1, "equal")
        loss = model(x, text).square().sum()
        adapters.set_rank_mask(None)
        loss.backward(retain_graph=True)
        adapters.set_strength(2.0)
        loss.backward()
        found.append([p.grad for p in adapters.parameters()])
    check_same(found[1], found[0])


# torch looks at the gradient of every input of a compiled function.
@pytest.mark.sample(1)
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@FORMS
@pytest.mark.parametrize("name", select_quick(["lora", "tlora", "dora-lora", "lora-drops"], "dora-lora"))
def test_compiled_blocks_in_checkpoints(name: str, reentrant: bool) -> None:
    """As diffusers compiles: block by block, with the checkpoint around them."""
    torch._dynamo.reset()

    def steer(adapters: AdapterSet, model: nn.Module, at: int) -> None:
        # Compiled, dropout is drawn in another order.
        model.train(not adapters.stacks["blocks.0.q"][0].algorithm.has_dropout)
        adapters.set_strength((-1) ** at * (1 + at / 7))
        adapters.set_rank_mask(torch.eye(3)[at : at + 1])

    passes = inputs(3, "equal")
    exact = gradients(Net(None), passes, steer, WITH_SLICES[name])
    model = Net(reentrant)
    for block in model.blocks:
        block.compile(backend="aot_eager")
    if name == "tlora":
        with pytest.raises(AttachError, match="leave the mask"):
            gradients(model, passes, steer, WITH_SLICES[name])
        return
    check_same(gradients(model, passes, steer, WITH_SLICES[name]), exact)
    torch._dynamo.reset()
