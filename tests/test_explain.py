"""What `explain` says is what adapters, files and autograd have."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from benchmarks.kept import Kept
from torch import Tensor, nn

import lycoris
from cases import ALGORITHMS, LAYERS, PAIRS, PAIRS_WITH_SLICES, WITH_SLICES, One, adapt, serves
from lycoris import AdapterSet, ConfigError, DoRA, LoHa, LoRA, Rule, explain, plan
from lycoris.adapters.attach import bottom
from lycoris.algorithms.additive import Additive
from lycoris.algorithms.base import Algorithm
from lycoris.files.writing import encode
from lycoris.layers.sites import ModelSites

IDS = ["-on-".join(pair) for pair in PAIRS_WITH_SLICES]


@pytest.mark.each_value
@pytest.mark.parametrize(("name", "layer"), PAIRS, ids=["-on-".join(pair) for pair in PAIRS])
def test_parameters_and_file_are_those_of_the_adapters(name: str, layer: str) -> None:
    model = One(LAYERS[layer].layer(torch.float32))
    adapters = adapt(model, ALGORITHMS[name])
    told = explain(adapters)
    stored = encode(adapters.bundle())
    assert told.parameters == sum(p.numel() for p in adapters.parameters())
    assert told.file_bytes == sum(tensor.numel() * tensor.element_size() for tensor in stored.values())
    assert told.layers[0].frozen == sum(t.numel() for t in adapters.stacks[told.layers[0].path][0].buffers())
    planned = plan(One(LAYERS[layer].layer()), Rule(ALGORITHMS[name], kind="*"), strict=False)
    assert told.layers == explain(planned).layers


@pytest.mark.each_value
@pytest.mark.parametrize(("name", "layer"), PAIRS_WITH_SLICES, ids=IDS)
def test_no_change_has_a_higher_rank_and_some_change_has_it(name: str, layer: str) -> None:
    model = One(LAYERS[layer].layer())
    adapters = adapt(model, WITH_SLICES[name])
    ((path, (adapter,)),) = adapters.stacks.items()
    most = explain(adapters).layers[0].rank
    if most is None:
        return
    below = bottom(adapters.sites[path]).affine()
    change = (adapter.adapt_affine(below).weight - below.weight).detach()
    found = torch.linalg.matrix_rank((change if adapter.geometry.stack else change[None]).flatten(2), rtol=1e-9)
    assert (found == most).all()


def inputs(kind: str, samples: int, dtype: torch.dtype) -> Tensor:
    """128 tokens for each sample."""
    if kind == "embedding":
        return torch.randint(0, 256, (samples, 128))
    shape = (samples, 128, 256) if kind == "linear" else (samples, 64, 16, 8)
    return torch.randn(shape, dtype=dtype, requires_grad=True)


MAKE: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(256, 256),
    "conv": lambda: nn.Conv2d(64, 64, 3, padding=1),
    "embedding": lambda: nn.Embedding(256, 256),
}
HELD = [
    (name, kind) for kind in MAKE for name, algorithm in WITH_SLICES.items() if serves(One(MAKE[kind]()), algorithm)
]


def saved_per_token(algorithm: Algorithm, dtype: torch.dtype, kind: str = "linear") -> tuple[float, bool]:
    """Bytes per token that autograd keeps, beside the layer's input and output and all parameters; whether it keeps
    the input."""
    torch.manual_seed(0)
    model = One(MAKE[kind]().to(dtype)).requires_grad_(False)
    adapters = AdapterSet.build(model, plan(model, Rule(algorithm, kind="*"), strict=False)).attach()
    sizes = []
    for samples in (4, 5):
        x = inputs(kind, samples, dtype)
        kept = Kept(x, *model.parameters(), *adapters.parameters())
        with kept.during():
            y = model(x)
        needs_input = kept.holds(x)
        kept.own.add(y.untyped_storage().data_ptr())
        sizes.append(sum(t.untyped_storage().nbytes() for t in kept.tensors()))
    return (sizes[1] - sizes[0]) / 128, needs_input


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("name", "kind"), HELD, ids=["-on-".join(held) for held in HELD])
def test_what_is_kept_for_backward_is_what_autograd_keeps(name: str, kind: str, dtype: torch.dtype) -> None:
    algorithm = WITH_SLICES[name]
    planned = plan(One(MAKE[kind]()), Rule(algorithm, kind="*"), strict=False)
    told = explain(planned, tokens=512, dtype=dtype)
    found, needs_input = saved_per_token(algorithm, dtype, kind)
    if algorithm.name == "boft" and dtype == torch.float32:
        assert found < told.saved_bytes
    else:
        # Beside it: indices, split in two, and a copy of the small rotations for each sample.
        beside = 16 if kind == "embedding" else 16 if kind == "conv" and algorithm.name == "diag-oft" else 0
        assert told.saved_bytes <= found <= told.saved_bytes + beside
    if kind == "linear":
        assert told.inputs == (256 * dtype.itemsize if needs_input else 0)
    else:
        assert told.inputs == 0


def test_dense_ways_keep_nothing_per_token() -> None:
    algorithm = LoHa(rank=64)
    (layer,) = explain(plan(One(nn.Linear(256, 256)), Rule(algorithm)), tokens=128).layers
    assert (layer.way, layer.kept) == ("dense", 0)
    assert "multiplications" in layer.why
    assert saved_per_token(algorithm, torch.float32) == (0, True)
    bent = DoRA(inner=LoRA(rank=3, dropout=0.3), axis="in")
    assert saved_per_token(bent, torch.float32)[0] == explain(plan(One(nn.Linear(256, 256)), Rule(bent))).saved_bytes


def test_work_of_a_lora_is_the_textbook_one() -> None:
    (layer,) = explain(plan(One(nn.Linear(64, 128)), Rule(LoRA(rank=4)))).layers
    assert layer.base_flops == 2 * 64 * 128
    assert layer.flops == 2 * 4 * (64 + 128)
    assert layer.training_flops == 3 * layer.flops
    assert layer.ratio == layer.flops / layer.base_flops


def test_file_bytes_are_those_of_the_file(tmp_path: Path) -> None:
    model = One(nn.Linear(64, 128))
    adapters = adapt(model, LoRA(rank=4, alpha=2.0))
    lycoris.write(adapters.bundle(), tmp_path / "a.safetensors", dtype=torch.float16)
    told = explain(adapters, file_dtype=torch.float16).file_bytes
    assert told == 2 * 4 * (64 + 128) + 4
    header = int.from_bytes((tmp_path / "a.safetensors").read_bytes()[:8], "little") + 8
    assert (tmp_path / "a.safetensors").stat().st_size == told + header


def test_it_prints_layers_that_are_alike_as_one() -> None:
    model = nn.Sequential(*(nn.Linear(64, 64, bias=at > 2) for at in range(5)), nn.LayerNorm(64))
    told = explain(plan(model, [Rule(LoRA(rank=4)), Rule(lycoris.Norm(), kind="norm")]))
    assert [count for count, _ in told.groups()] == [5, 1]
    text = str(told)
    assert "linear 64x64" in text
    assert "6 layers get adapters, 0 do not" in text
    assert len(told.as_dict()["layers"]) == 6


def test_stacked_algorithms_are_a_row_each() -> None:
    told = explain(plan(One(nn.Linear(64, 64)), Rule((LoRA(rank=2), LoHa(rank=2)))))
    assert [layer.algorithm.name for layer in told.layers] == ["lora", "loha"]
    assert told.base_flops == 2 * 64 * 64
    assert explain(plan(One(nn.Linear(64, 64)), Rule(LoRA(rank=2))).placements[0]).parameters == 2 * 2 * 64


@pytest.mark.parametrize("wrong", [{"tokens": 0}, {"tokens": 1.5}, {"dtype": torch.int8}], ids=str)
def test_wrong_settings_are_refused(wrong: dict) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        explain(plan(One(nn.Linear(4, 4)), Rule(LoRA(rank=2))), **wrong)


@pytest.mark.each_value
@pytest.mark.parametrize(("name", "layer"), PAIRS, ids=["-on-".join(pair) for pair in PAIRS])
def test_the_way_that_is_told_is_the_way_that_is_gone(name: str, layer: str) -> None:
    """Factored products are told by the algorithm's own `product` being called."""
    algorithm = ALGORITHMS[name]
    ((_, _, attribute, g),) = ModelSites(One(LAYERS[layer].layer())).values()
    if attribute or not isinstance(algorithm, Additive):
        return
    # Dropout of the input keeps the layer's own product apart, in training, which is what a cost is for.
    model, x = One(LAYERS[layer].layer()).train(algorithm.dropout > 0), LAYERS[layer].input()
    adapters = adapt(model, algorithm)
    tokens = x.numel() if g.kind == "embedding" else x.numel() // g.channels_in
    gone = []
    own = type(algorithm).add_product

    def product(*args: object) -> Tensor:
        gone.append(True)
        return own(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(algorithm), "add_product", product)
        model(x)
    told = explain(adapters, tokens=tokens, dtype=torch.float64).layers[0]
    assert (told.way == "factored") == bool(gone) or told.way == "added"
