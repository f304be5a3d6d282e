"""What must hold around the maths: stacks, copies, checkpointing, precisions, compilation."""

from __future__ import annotations

import copy
import io
import itertools
import pickle

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cases import LAYERS, PAIRS_WITH_SLICES, WITH_SLICES, One, adapt, dense, perturb, relative, serves
from lycoris import AdapterSet, AttachError, LoRA, PlanError, RankSchedule, Rule, TLoRA, plan
from lycoris.adapters.adapter import Adapter
from lycoris.adapters.attach import bottom, top
from lycoris.algorithms.layer_below import BareWeight
from lycoris.layers.sites import ModelSites, Site

STACKED = ["lora", "loha", "lokr-factor", "tlora", "full", "glora", "ia3-in", "oft", "dora-lora", "dora-lokr-in"]
THREE = [("lokr", "dora-loha", "lora"), ("oft", "glora", "ia3"), ("dylora", "boft", "dora-loha-high-rank")]
KINDS = ["linear", "conv2d", "conv2d-stride", "conv2d-groups"]
ON = [
    (name, layer)
    for name, layer in PAIRS_WITH_SLICES
    if layer in ("linear", "conv2d", "embedding", "rms-norm", "own-norm")
]
"""Every algorithm, each on some kinds of layers that it serves."""
EVERY = pytest.mark.parametrize(("name", "layer"), ON, ids=["-on-".join(pair) for pair in ON])


@pytest.mark.parametrize("layer", KINDS)
@pytest.mark.parametrize("stack", list(itertools.permutations(STACKED, 2)), ids="+".join)
def test_two_sets_stack_and_come_off_in_any_order(stack: tuple[str, str], layer: str) -> None:
    model, x = One(LAYERS[layer].layer()), LAYERS[layer].input()
    before = model(x)
    sets = [adapt(model, WITH_SLICES[name], name=f"set{at}") for at, name in enumerate(stack)]
    both = model(x)
    assert relative(both, top(Site.of(model.layer)).geometry.op(x, *top(Site.of(model.layer)).affine())) < 1e-10
    lower, upper = sets
    lower.detach()
    alone = model(x)
    upper.detach()
    assert torch.equal(model(x), before)
    upper.attach()
    assert torch.equal(model(x), alone)


@pytest.mark.parametrize("layer", KINDS)
@pytest.mark.parametrize("order", list(itertools.permutations(range(3))), ids=str)
@pytest.mark.parametrize("names", THREE, ids="+".join)
def test_three_sets(names: tuple[str, ...], layer: str, order: tuple[int, ...]) -> None:
    model, x = One(LAYERS[layer].layer()).eval(), LAYERS[layer].input()
    if not all(serves(model, WITH_SLICES[name]) for name in names):
        pytest.skip("one of these does not serve this layer")
    before = model(x)
    sets = [adapt(model, WITH_SLICES[name], name=f"set{at}") for at, name in enumerate(names)]
    assert relative(model(x), top(Site.of(model.layer)).geometry.op(x, *top(Site.of(model.layer)).affine())) < 1e-10
    for at in order:
        sets[at].detach()
    assert torch.equal(model(x), before)
    assert type(model.layer) is LAYERS[layer].make


@pytest.mark.parametrize("stack", list(itertools.permutations(STACKED, 2)), ids="+".join)
def test_a_rule_may_stack_algorithms(stack: tuple[str, str]) -> None:
    model, x = One(LAYERS["linear"].layer()), LAYERS["linear"].input()
    adapters = adapt(model, *(WITH_SLICES[name] for name in stack))
    attached = model(x)
    adapters.schedule = RankSchedule(max_rank=3)
    adapters.merge()
    assert relative(model(x), attached) < 1e-10


def test_merging_a_set_above_one_that_does_not_commute_is_refused() -> None:
    model = One(nn.Linear(4, 4).double())
    lower = adapt(model, WITH_SLICES["dora-lora"], name="lower")
    upper = adapt(model, LoRA(rank=2), name="upper")
    with pytest.raises(AttachError, match="do not commute"):
        upper.merge()
    attached = model(torch.eye(4).double())
    lower.merge()
    upper.merge()
    assert relative(model(torch.eye(4).double()), attached) < 1e-10
    with pytest.raises(AttachError, match="newest to oldest"):
        lower.unmerge()


@EVERY
def test_deepcopy_and_pickle_carry_the_adapters_along(name: str, layer: str) -> None:
    model, x = One(LAYERS[layer].layer()).eval(), LAYERS[layer].input()
    adapters = adapt(model, WITH_SLICES[name])
    y = model(x)
    y.sum().backward()
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    copies.append(torch.load(buffer, weights_only=False))
    perturb(adapters)
    for other in copies:
        assert torch.equal(other(x), y)
        assert other.layer.weight is not model.layer.weight


class Chain(nn.Module):
    """Two layers and a nonlinearity, optionally recomputed in backward."""

    def __init__(self, case: str) -> None:
        super().__init__()
        self.one, self.two = LAYERS[case].layer(), nn.Identity()

    def forward(self, x: Tensor, reentrant: bool | None = None) -> Tensor:
        def block(x: Tensor) -> Tensor:
            return torch.tanh(self.one(x))

        return block(x) if reentrant is None else checkpoint(block, x, use_reentrant=reentrant)


@pytest.mark.parametrize("reentrant", [True, False])
@EVERY
def test_checkpointing_gives_the_same_gradients(name: str, layer: str, reentrant: bool) -> None:
    model, x = Chain(layer), LAYERS[layer].input()
    x = x.requires_grad_() if x.is_floating_point() else x
    if reentrant and not x.requires_grad:
        pytest.skip("reentrant checkpointing wants an input with a gradient, and indices have none")
    adapters = adapt(model, WITH_SLICES[name])
    parameters = list(adapters.parameters())

    def gradients(reentrant: bool | None) -> list[Tensor]:
        # Random choices of training are drawn again in the recomputation, from the same state.
        torch.manual_seed(3)
        model.zero_grad()
        adapters.set_rank_mask(torch.tensor([[1.0, 0.0, 0.0]]))
        adapters.set_strength(0.5)
        loss = model(x, reentrant).square().sum()
        # What a trainer may do before backward must not reach the recomputation.
        adapters.set_rank_mask(None)
        adapters.set_strength(0.0)
        loss.backward()
        return [p.grad.clone() for p in parameters]

    for plain, again in zip(gradients(None), gradients(reentrant), strict=True):
        assert torch.equal(plain, again)


@pytest.mark.parametrize("reentrant", [True, False])
def test_two_forwards_before_one_backward_keep_their_own_masks(reentrant: bool) -> None:
    model = Chain("linear")
    adapters = adapt(model, TLoRA(rank=4))
    adapters.schedule = RankSchedule(max_rank=4)
    parameters = list(adapters.parameters())
    inputs = [LAYERS["linear"].input().requires_grad_() for _ in range(3)]

    def gradients(reentrant: bool | None) -> list[Tensor]:
        model.zero_grad()
        loss = torch.zeros((), dtype=torch.float64)
        for x, t in zip(inputs, (900, 500, 10), strict=True):
            adapters.set_timesteps(torch.tensor([t]))
            loss = loss + model(x, reentrant).square().sum()
        adapters.set_timesteps(None)
        loss.backward()
        return [p.grad.clone() for p in parameters]

    for plain, again in zip(gradients(None), gradients(reentrant), strict=True):
        assert relative(again, plain) < 1e-12


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@EVERY
def test_autocast(name: str, layer: str, dtype: torch.dtype) -> None:
    model, x = One(LAYERS[layer].layer(torch.float32)).eval(), LAYERS[layer].input(torch.float32)
    base = model(x)
    with torch.autocast("cpu", dtype):
        usual = model(x).dtype
    adapters = adapt(model, WITH_SLICES[name])
    exact = model(x)
    with torch.autocast("cpu", dtype):
        y = model(x)
    assert y.dtype == usual
    assert relative(y.float(), exact) < 0.05
    y.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in adapters.parameters())
    assert relative(base, exact) > 0.01


@pytest.mark.each_value
@pytest.mark.parametrize("base", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("own", [torch.float32, torch.bfloat16])
@EVERY
def test_mixed_precisions(name: str, layer: str, own: torch.dtype, base: torch.dtype) -> None:
    case = LAYERS[layer]
    model, x = One(case.layer(base)).eval(), case.input(base)
    plain = model(x)
    placed = plan(model, Rule(WITH_SLICES[name], kind="*"), strict=False)
    adapters = AdapterSet.build(model, placed, dtype=own, stochastic_rounding=True).attach()
    if own in (base, torch.float32) or not name.startswith("replace"):
        # What is put in place of a weight holds it as well as its own precision does.
        assert torch.equal(model(x), plain), "a fresh adapter changes nothing, in any precision"
    perturb(adapters, 0.1)
    y = model(x)
    assert y.dtype == base
    exact = dense(copy.deepcopy(model).double(), x.double() if x.is_floating_point() else x)
    assert relative(y.double(), exact) < (0.05 if torch.bfloat16 in (base, own) else 0.01)
    y.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == p.dtype for p in adapters.parameters())


def test_small_updates_survive_a_bfloat16_base() -> None:
    model = One(nn.Linear(256, 256).bfloat16())
    x = torch.randn(8, 256).bfloat16()
    adapters = AdapterSet.build(model, plan(model, Rule(LoRA(rank=8)))).attach()
    with torch.no_grad():
        for stack in adapters.stacks.values():
            stack[0].up.normal_(std=1e-3)
    (adapter,) = adapters.stacks["layer"]
    wanted = x.float() @ (adapter.up @ adapter.down).T
    nothing = torch.zeros(8, 256).bfloat16()
    got = adapter.algorithm.add(nothing, adapter.tensors(), adapter.geometry, x, adapter.call)
    assert relative(got.float(), wanted) < 0.02


COMPILED = ["lora", "lora-drops", "loha", "loha-high-rank", "lokr", "lokr-full-matrix", "dylora", "tlora", "glora"]
COMPILED += ["ia3", "ia3-in", "oft", "full", "full-drops", "dora-lora", "dora-lokr-in", "dora-loha-high-rank"]
OFTEN = ("loha", "lokr", "tlora", "dora-lora")
COMPILED_ON = [pytest.param(name, "linear", marks=() if name in OFTEN else pytest.mark.slow) for name in COMPILED]
COMPILED_ON += [("boft", "conv2d"), ("lora-tucker", "conv2d"), ("norm", "rms-norm"), ("norm", "own-norm")]
COMPILED_ON += [("lora", "embedding"), ("lokr", "embedding"), ("lora", "parameter"), ("oft", "experts")]
COMPILED_ON += [("lora", "conv1d-transformers")]


@pytest.mark.sample(8)
@pytest.mark.parametrize(("name", "layer"), COMPILED_ON)
def test_compiles_whole_and_once(name: str, layer: str) -> None:
    model, x = One(LAYERS[layer].layer(torch.float32)), LAYERS[layer].input(torch.float32)
    adapters = adapt(model, WITH_SLICES[name])
    adapters.schedule = RankSchedule(max_rank=3)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for strength in (1.0, 0.5, -1.0, 0.0):
        for t in (999, 500, 0):
            adapters.set_strength(strength)
            adapters.set_timesteps(torch.tensor([t]))
            model.train()
            compiled(x).sum().backward()
            model.eval()
            assert relative(compiled(x), model(x)) < 1e-5
    assert counter.frame_count == 1
    torch._dynamo.reset()


def test_train_eval_to_and_parameters_reach_the_adapters() -> None:
    model = One(nn.Linear(4, 4))
    adapters = adapt(model, LoRA(rank=2))
    (adapter,) = adapters.stacks["layer"]
    model.eval()
    assert not adapter.training
    model.double()
    assert adapter.up.dtype == torch.float64
    assert {id(p) for p in adapters.parameters()} <= {id(p) for p in model.parameters()}


def test_a_replaced_forward_is_refused_and_nothing_is_attached() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].forward = lambda x: x
    with pytest.raises(AttachError, match=r"1: the forward of this Linear was replaced"):
        AdapterSet.build(model, plan(model, Rule(LoRA()))).attach()
    assert not model[0]._modules


def test_sequential_offload_is_refused_before_anything_is_lost() -> None:
    import accelerate

    model, x = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), torch.randn(2, 4)
    adapters = AdapterSet.build(model, plan(model, Rule(LoRA(rank=2), path="1"))).attach()
    perturb(adapters)
    y = model(x)
    with pytest.raises(AttachError, match=r"sequential CPU offload .* Merge the adapters"):
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    accelerate.hooks.remove_hook_from_module(model, recurse=True)
    assert torch.equal(model(x), y)
    # Hooks that fetch nothing are welcome, and come off again.
    accelerate.dispatch_model(model, {"": "cpu"}, main_device="cpu")
    assert torch.equal(model(x), y)
    accelerate.hooks.remove_hook_from_module(model, recurse=True)
    adapters.detach()
    assert not any("_hf_hook" in vars(layer) for layer in model)


def test_a_layer_that_shares_its_weight_is_merged_alone() -> None:
    one, two = nn.Linear(4, 4), nn.Linear(4, 4)
    two.weight = one.weight
    model, x = nn.Sequential(one, two), torch.randn(2, 4)
    adapters = AdapterSet.build(model, plan(model, Rule(LoRA(), path="1"))).attach()
    perturb(adapters)
    attached = model(x)
    with pytest.raises(AttachError, match=r"1 shares its weight with 0.weight.*untie=True"):
        adapters.merge()
    assert one.weight is two.weight
    report = adapters.merge(untie=True)
    assert report.untied == ("1 from 0.weight",)
    assert relative(model(x), attached) < 1e-5
    adapters.detach()
    assert one.weight is two.weight


def test_a_weight_cannot_follow_one_mask_per_sample() -> None:
    model = One(nn.Linear(4, 4))
    adapters = adapt(model, TLoRA(rank=2), WITH_SLICES["dora-lora"])
    adapters.set_rank_mask(torch.tensor([[1.0, 0.0], [1.0, 1.0]]))
    with pytest.raises(PlanError, match="one weight cannot follow 2 masks"):
        model(torch.randn(2, 4))


def test_a_merged_model_compiles_without_its_adapters() -> None:
    model, x = One(nn.Linear(4, 4)), torch.randn(2, 4)
    adapters = adapt(model, LoRA(rank=2))
    attached = model(x)
    adapters.merge()
    torch._dynamo.reset()
    assert relative(torch.compile(model, fullgraph=True, backend="eager")(x), attached) < 1e-5
    torch._dynamo.reset()


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_pass_without_checkpointing_does_not_mislead_a_later_one(reentrant: bool) -> None:
    model = Chain("linear")
    adapters = adapt(model, TLoRA(rank=4))
    x = LAYERS["linear"].input().requires_grad_()

    def gradient(reentrant: bool | None, mask: list[float]) -> Tensor:
        model.zero_grad()
        adapters.set_rank_mask(torch.tensor([mask]))
        loss = model(x, reentrant).square().sum()
        adapters.set_rank_mask(None)
        loss.backward()
        return next(adapters.parameters()).grad.clone()

    gradient(None, [1.0, 1.0, 1.0, 1.0])
    plain = gradient(None, [1.0, 0.0, 0.0, 0.0])
    gradient(None, [1.0, 1.0, 1.0, 0.0])
    assert torch.equal(gradient(reentrant, [1.0, 0.0, 0.0, 0.0]), plain)


def test_names_of_sets_may_have_dots() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    made = AdapterSet.build(model, plan(model, Rule(LoRA(rank=2))), name="style.v1.5").attach()
    assert [name for name, p in model.named_parameters() if p.requires_grad] == [
        "0.adapter_style_v1_5.up",
        "0.adapter_style_v1_5.down",
    ]
    with pytest.raises(AttachError, match="choose another set name"):
        AdapterSet.build(model, plan(model, Rule(LoRA(rank=2))), name="style.v1_5").attach()
    made.merge()
    made.detach()
    assert type(model[0]) is nn.Linear


@pytest.mark.each_value
@pytest.mark.parametrize("alone", [False, True], ids=["layer", "weight-alone"])
@pytest.mark.parametrize(("name", "layer"), PAIRS_WITH_SLICES, ids=["-on-".join(pair) for pair in PAIRS_WITH_SLICES])
def test_a_start_sets_every_value(name: str, layer: str, alone: bool) -> None:
    model = One(LAYERS[layer].layer())
    ((_, module, attribute, geometry),) = ModelSites(model).values()
    below = bottom(Site.of(module, attribute))
    adapter = Adapter(WITH_SLICES[name], geometry)
    for tensor in adapter.tensors().values():
        tensor.data.fill_(torch.nan)
    adapter.initialize(BareWeight(geometry, below.affine().weight) if alone else below)
    assert all(tensor.isfinite().all() for tensor in adapter.tensors().values())


def test_sets_without_a_name_take_free_ones_on_a_bare_parameter_too() -> None:
    model = One(LAYERS["parameter"].layer())
    rule = Rule(LoRA(rank=2), kind="*")
    sets = [AdapterSet.build(model, plan(model, rule), name=None, dtype=torch.float64).attach() for _ in range(3)]
    assert len({own for own in model.layer._modules if own.startswith("adapter_lycoris")}) == 3
    for own in sets:
        own.detach()
    assert not model.layer._modules
