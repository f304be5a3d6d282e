"""Merging into weights of few bits: refused unless asked for, rounded once, measured, undone exactly."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from cases import ALGORITHMS, One, perturb, relative
from lycoris import AdapterSet, AttachError, Full, LoRA, Rule, plan
from lycoris.algorithms.base import Algorithm
from lycoris.layers import base_weights
from lycoris.ops import rounding
from quantized import CPU, EVERY, gguf

SOME = ["lora", "loha", "lokr", "tlora", "dora-lora", "dora-lokr-in", "dora-loha-high-rank"]
SOME += ["glora", "ia3", "ia3-in", "oft", "boft"]
EACH = pytest.mark.parametrize("name", SOME)
STOCHASTIC = [name for name, case in CPU.items() if case.stochastic]


def made(base: str, algorithm: Algorithm, size: float = 0.1) -> tuple[One, AdapterSet, Tensor]:
    model = One(CPU[base].layer())
    adapters = AdapterSet.build(model, plan(model, Rule(algorithm), strict=False)).attach()
    perturb(adapters, size)
    return model, adapters, torch.randn(2, 5, 64)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "merging adapters that were trained with a timestep schedule")
        warnings.filterwarnings("ignore", ".*below the quantization step")
        yield


@EVERY
@EACH
def test_it_is_refused_unless_asked_for(base: str, name: str) -> None:
    model, adapters, x = made(base, ALGORITHMS[name])
    attached, own = model(x), base_weights.own(model.layer)
    with pytest.raises(AttachError, match=rf"weight of layer is stored as {CPU[base].label}.*into_low_bit=True"):
        adapters.merge()
    assert not adapters.merged
    assert all(a is b for a, b in zip(base_weights.own(model.layer), own, strict=True))
    assert torch.equal(model(x), attached)


@EVERY
@EACH
def test_it_stays_within_the_steps_of_the_format(base: str, name: str) -> None:
    model, adapters, x = made(base, ALGORITHMS[name])
    attached, before = model(x), base_weights.read(model.layer).weight.clone()
    dense = base_weights.read(model.layer).weight + 0
    with quiet():
        report = adapters.merge(into_low_bit=True)
    after = base_weights.read(model.layer).weight
    assert type(model.layer.weight) is type(CPU[base].layer().weight)
    assert base_weights.kind(model.layer) == CPU[base].label
    assert relative(after, before) > 0.02
    assert relative(model(x), attached) < 2 * CPU[base].step
    (told,) = report.layers
    assert told.path == "layer"
    assert told.stored_as == CPU[base].label
    adapters.unmerge()
    exact = _dense(adapters)
    signal, noise = (exact - dense).norm(), (after - exact).norm()
    assert told.sqnr == pytest.approx(20 * math.log10(signal / noise), abs=1e-2)


def _dense(adapters: AdapterSet) -> Tensor:
    (layer,), ((adapter,),) = (site.module for site in adapters.sites.values()), adapters.stacks.values()
    weight, bias = base_weights.read(layer)
    return adapter.adapt_affine(type(base_weights.read(layer))(weight.float(), bias)).weight.detach()


@EVERY
@EACH
def test_unmerging_puts_the_very_same_parameters_back(base: str, name: str) -> None:
    model, adapters, x = made(base, ALGORITHMS[name])
    attached, own, state = model(x), base_weights.own(model.layer), sorted(model.state_dict())
    with quiet():
        adapters.merge(into_low_bit=True)
        merged = model(x)
        assert sorted(model.state_dict()) == state
        adapters.unmerge()
        assert all(a is b for a, b in zip(base_weights.own(model.layer), own, strict=True))
        assert torch.equal(model(x), attached)
        adapters.merge(into_low_bit=True)
        assert torch.equal(model(x), merged)
        adapters.detach()
    adapters.attach()
    assert torch.equal(model(x), attached)


@EVERY
def test_what_is_merged_can_be_saved_as_a_base(base: str) -> None:
    model, adapters, x = made(base, LoRA(rank=2))
    adapters.merge(into_low_bit=True)
    merged, fresh = model(x), CPU[base].layer()
    weight = base_weights.read(model.layer).weight
    if base.startswith("bitsandbytes-int8"):
        fresh.load_state_dict(model.layer.state_dict())
        assert torch.equal(fresh(x), merged)
    assert weight.shape == (32, 64)
    adapters.detach()


@EVERY
def test_a_layer_that_nothing_was_added_to_stays_as_it_was(base: str) -> None:
    """The grid of values stays where it was, so that only updates are rounded."""
    model = One(CPU[base].layer())
    adapters = AdapterSet.build(model, plan(model, Rule(LoRA(rank=2)))).attach()
    before = base_weights.read(model.layer).weight.clone()
    with quiet():
        adapters.merge(into_low_bit=True)
    if CPU[base].stochastic:  # the others' own quantisers choose their scales anew
        assert torch.equal(base_weights.read(model.layer).weight, before)


@pytest.mark.parametrize("base", STOCHASTIC)
def test_stochastic_rounding_keeps_small_updates_in_the_mean(base: str) -> None:
    model, adapters, _ = made(base, Full(bias=False), size=0)
    with torch.no_grad():
        for parameter in adapters.parameters():
            parameter.fill_(2e-4)
    before = base_weights.read(model.layer).weight.clone()
    gained, runs = torch.zeros(()), 40
    for seed in range(runs):
        with quiet():
            adapters.merge(into_low_bit=True, stochastic_seed=seed)
        gained += (base_weights.read(model.layer).weight - before).float().mean() / runs
        adapters.unmerge()
    assert float(gained) == pytest.approx(2e-4, rel=0.25)


@pytest.mark.parametrize("base", [*STOCHASTIC, "bfloat16"])
def test_a_seed_says_what_is_drawn(base: str) -> None:
    if base == "bfloat16":
        model = One(nn.Linear(64, 32).bfloat16())
        adapters = AdapterSet.build(model, plan(model, Rule(LoRA(rank=2))))
        perturb(adapters)
    else:
        model, adapters, _ = made(base, LoRA(rank=2))
    results = []
    for seed in (1, 1, 2):
        with quiet():
            adapters.merge(into_low_bit=True, stochastic_seed=seed)
        results.append(base_weights.read(model.layer).weight.float().clone())
        adapters.unmerge()
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


@pytest.mark.parametrize("base", ["bitsandbytes-nf4", "gguf-q8"])
def test_what_only_its_own_library_rounds_is_not_rounded_stochastically(base: str) -> None:
    model, adapters, x = made(base, LoRA(rank=2))
    attached = model(x)
    with pytest.raises(AttachError, match="written by its own library, to nearest"):
        adapters.merge(into_low_bit=True, stochastic_seed=0)
    assert torch.equal(model(x), attached)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dense_half_precision_is_measured_too(dtype: torch.dtype) -> None:
    model = One(nn.Linear(64, 32).to(dtype))
    adapters = AdapterSet.build(model, plan(model, Rule(LoRA(rank=2))))
    perturb(adapters)
    report = adapters.merge()
    (told,) = report.layers
    assert 20 < told.sqnr < 90
    assert not report.lost_layers
    assert f"{told.sqnr:.1f} dB  dense {str(dtype)[6:]}  layer" in str(report)


def test_full_precision_loses_nothing() -> None:
    model = One(nn.Linear(64, 32))
    adapters = AdapterSet.build(model, plan(model, Rule(LoRA(rank=2))))
    perturb(adapters)
    report = adapters.merge(0.5)
    assert report.layers[0].sqnr == math.inf
    assert str(report) == "merged 1 layers at strength 0.5; in 1 of them nothing was rounded"


def test_updates_below_the_step_are_told() -> None:
    _, adapters, _ = made("float8-e4m3", Full(bias=False), size=0)
    with torch.no_grad():
        for parameter in adapters.parameters():
            parameter.fill_(1e-6)
    with pytest.warns(UserWarning, match=r"quantization step: layer \(float8_e4m3fn storage, -?0\.0 dB\)"):
        report = adapters.merge(into_low_bit=True)
    assert report.lost_layers == report.layers


def test_one_layer_that_refuses_stops_the_merge_before_it_begins() -> None:
    model = nn.Sequential(nn.Linear(64, 64), gguf(nn.Linear(64, 64), "Q8_0"), nn.Linear(64, 64))
    adapters = AdapterSet.build(model, plan(model, Rule(LoRA(rank=2)))).attach()
    own = [base_weights.own(layer).weight for layer in model]
    with pytest.raises(AttachError, match="weight of 1 is stored as GGUF Q8_0"):
        adapters.merge()
    assert all(base_weights.own(layer).weight is weight for layer, weight in zip(model, own, strict=True))


def test_types_that_gguf_cannot_write_are_named() -> None:
    import gguf as library
    from diffusers.quantizers.gguf.utils import GGUFLinear, GGUFParameter

    kind = library.GGMLQuantizationType.Q4_K
    layer = GGUFLinear(256, 8, bias=True, compute_dtype=torch.float32)
    layer.weight = GGUFParameter(torch.zeros(8, 144, dtype=torch.uint8), quant_type=kind)
    model = One(layer)
    adapters = AdapterSet.build(model, plan(model, Rule(LoRA(rank=2))))
    with pytest.raises(AttachError, match="reads Q4_K and cannot write it"):
        adapters.merge(into_low_bit=True)


def test_a_weight_with_something_beside_it_is_not_unmerged_elsewhere() -> None:
    model, adapters, x = made("torchao-int4", LoRA(rank=2))
    attached = model(x)
    adapters.merge(into_low_bit=True)
    model.to(torch.bfloat16)
    with pytest.raises(AttachError, match=r"move it back to cpu, torch\.float32 first"):
        adapters.unmerge()
    model.to(torch.float32)
    adapters.unmerge()
    assert relative(model(x), attached) < 0.02


class TestRounding:
    FORMATS = (torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2)
    each = pytest.mark.parametrize("dtype", FORMATS)

    @each
    def test_representable_numbers_stay(self, dtype: torch.dtype) -> None:
        x = (torch.randn(500) * 3).to(dtype).float()
        x = torch.cat([x, torch.tensor([0.0, torch.finfo(dtype).tiny, torch.finfo(dtype).tiny / 2, -1.0])])
        for generator in (None, torch.Generator().manual_seed(0)):
            assert torch.equal(rounding.to_dtype(x, dtype, generator).float(), x)

    @each
    def test_stochastic_takes_a_neighbour_and_the_right_mean(self, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(0)
        for value in (0.3, -1.7, 1e-3, float(torch.finfo(dtype).tiny) * 0.3):
            drawn = rounding.to_dtype(torch.full((20000,), value), dtype, generator).float()
            low, high = drawn.min(), drawn.max()
            assert low <= value <= high
            assert len(drawn.unique()) <= 2
            assert float(drawn.mean()) == pytest.approx(value, abs=5 * float(high - low) / math.sqrt(20000))

    @pytest.mark.parametrize("dtype", FORMATS[2:])
    def test_eight_bits_saturate(self, dtype: torch.dtype) -> None:
        largest = torch.finfo(dtype).max
        for generator in (None, torch.Generator().manual_seed(0)):
            y = rounding.to_dtype(torch.tensor([1e6, -1e6]), dtype, generator).float()
            assert y.tolist() == [largest, -largest]

    def test_whole_numbers(self) -> None:
        x = torch.tensor([2.3, -2.6, 300.0])
        assert rounding.to_integers(x, -127, 127).tolist() == [2.0, -3.0, 127.0]
        drawn = rounding.to_integers(x.expand(4000, 3), -127, 127, torch.Generator().manual_seed(0))
        assert float(drawn[:, 0].mean()) == pytest.approx(2.3, abs=0.05)
        assert set(drawn[:, 1].tolist()) == {-3.0, -2.0}
