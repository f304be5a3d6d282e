"""Tools on files: what they write does what they say, over every algorithm."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cases import ALGORITHMS, LAYERS, PAIRS, adapt
from lycoris import FileError, files
from lycoris.algorithms import DoRA, Full, Norm, Replace, conversion
from lycoris.algorithms.base import Entry
from lycoris.errors import ConfigError
from lycoris.files.container.model_weights import BaseWeights
from lycoris.layers.geometry import Affine
from lycoris.ops.svd import decompose, decompose_product
from lycoris.tools import Combination, Limit, Resizing, combine, inspect, resize

SHAPES = ("linear", "conv2d")
ON = [(name, kind) for name, kind in PAIRS if kind in SHAPES]
EVERY = pytest.mark.parametrize(("name", "kind"), ON, ids=["-on-".join(pair) for pair in ON])
TRUNCATED = [
    (name, kind)
    for name, kind in ON
    if not isinstance(ALGORITHMS[name], Full | Norm | DoRA)
    and not name.startswith(("glora", "ia3", "oft", "boft", "tlora", "replace"))
]
PROPORTIONAL = [(name, kind) for name, kind in TRUNCATED if not isinstance(ALGORITHMS[name], Replace)]
"""Those whose change is some of their tensors' alone: what replaces a weight changes it by as much as that differs."""
LINEAR = [name for name, kind in TRUNCATED if kind == "linear"]


class Two(nn.Module):
    """Two layers of a kind."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.one, self.two = LAYERS[kind].layer(), LAYERS[kind].layer()


def saved(model: nn.Module, name: str, path: Path) -> Path:
    """A file with that algorithm on every layer, changed at random."""
    adapters = adapt(model, ALGORITHMS[name])
    files.write(adapters.bundle(), path, model=model)
    adapters.detach()
    return path


def changes(path: Path, model: nn.Module) -> dict[str, Affine]:
    """ΔW and Δb of every layer, in float64, by what `read` makes of the file."""
    found = {}
    for layer, stack in files.read(path, model).entries.items():
        module = model.get_submodule(layer)
        below = Affine(module.weight.detach().double(), None if module.bias is None else module.bias.detach().double())
        above = below
        for entry in stack:
            above = conversion.adapt_affine(_wide(entry), above)
        bias = torch.zeros(1) if below.bias is None else above.bias - below.bias
        found[layer] = Affine(above.weight - below.weight, bias)
    return found


def _wide(entry: Entry) -> Entry:
    return entry._replace(tensors={name: t.double() for name, t in entry.tensors.items()})


def close(found: Tensor, wanted: Tensor, tolerance: float = 1e-5) -> bool:
    return float((found - wanted).norm()) <= tolerance * max(float(wanted.norm()), 1e-12)


@pytest.mark.parametrize(("name", "kind"), TRUNCATED)
def test_all_ranks_change_nothing(name: str, kind: str, tmp_path: Path) -> None:
    model = Two(kind)
    source = saved(model, name, tmp_path / "a.safetensors")
    result = resize(source, tmp_path / "b.safetensors", Limit(rank=10**6), base=model)
    assert result.error == pytest.approx(0, abs=1e-6)
    before, after = changes(source, model), changes(tmp_path / "b.safetensors", model)
    assert all(close(after[layer].weight, before[layer].weight) for layer in before)
    assert len(result.layers) + len(result.left_alone) == 2


@pytest.mark.parametrize("name", LINEAR)
def test_the_error_is_what_is_reported_and_the_least(name: str, tmp_path: Path) -> None:
    model = nn.ModuleDict({"one": nn.Linear(24, 20).double(), "two": nn.Linear(24, 20).double()})
    source = saved(model, name, tmp_path / "a.safetensors")
    result = resize(source, tmp_path / "b.safetensors", Limit(rank=1), base=model)
    before, after = changes(source, model), changes(tmp_path / "b.safetensors", model)
    for layer, truncation in result.layers.items():
        exact, found = before[layer.path].weight, after[layer.path].weight
        values = torch.linalg.svdvals(exact)
        least = float(values[1:].norm() / values.norm())
        assert truncation.error == pytest.approx(least, abs=1e-6)
        assert float((found - exact).norm() / exact.norm()) == pytest.approx(least, abs=1e-5)


def test_limits(tmp_path: Path) -> None:
    model = Two("linear")
    source = saved(model, "lora", tmp_path / "a.safetensors")

    def result(**limit: float) -> Resizing:
        return resize(source, tmp_path / "b.safetensors", Limit(**limit), base=model, overwrite=True)  # type: ignore[arg-type]

    assert all(each.error <= 0.3 for each in result(error=0.3).layers.values())
    assert all(1 - each.error**2 >= 0.8 for each in result(energy=0.8).layers.values())
    size = source.stat().st_size
    small = result(size=size - 150)
    assert small.bytes_after == (tmp_path / "b.safetensors").stat().st_size <= size - 150
    with pytest.raises(ConfigError, match=r"one rank for each of 2 layers takes [\d,]+ bytes"):
        result(size=100)


@pytest.mark.parametrize(
    "given", [{}, {"rank": 1, "error": 0.1}, {"rank": 0}, {"energy": 0.0}, {"error": 1.0}, {"size": 0}]
)
def test_limits_that_mean_nothing(given: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        Limit(**given)  # type: ignore[arg-type]


def test_a_size_is_shared_as_well_as_it_can_be() -> None:
    """No other ranks of as many bytes have a smaller error."""
    from lycoris.tools.limits import Truncatable

    torch.manual_seed(0)
    layers = {}
    for at in range(3):
        squares = torch.rand(4, dtype=torch.float64).sort(descending=True).values * 10**at
        layers[str(at)] = Truncatable(torch.cat([squares.flip(0).cumsum(0).flip(0), torch.zeros(1)]), 10)
    ranks = Limit(size=70).choose_ranks(layers)
    assert sum(ranks.values()) == 7
    choices = [(a, b, c) for a in range(1, 5) for b in range(1, 5) for c in range(1, 5) if a + b + c == 7]
    errors = [sum(float(layers[str(n)].energies[r]) for n, r in enumerate(choice)) for choice in choices]
    assert sum(float(layers[name].energies[r]) for name, r in ranks.items()) == pytest.approx(min(errors))


@EVERY
def test_what_cannot_be_truncated_stays_and_is_named(name: str, kind: str, tmp_path: Path) -> None:
    model = Two(kind)
    source = saved(model, name, tmp_path / "a.safetensors")
    result = resize(source, tmp_path / "b.safetensors", Limit(rank=1), base=model)
    assert {layer.path for layer in (*result.layers, *result.left_alone)} == {"one", "two"}
    before, after = load_file(source), load_file(tmp_path / "b.safetensors")
    for layer in result.left_alone:
        own = {key: tensor for key, tensor in before.items() if f"_{layer.path}." in key}
        assert own
        assert all(torch.equal(after[key], tensor) for key, tensor in own.items())


def test_the_magnitude_of_dora_is_fitted_to_what_is_left(tmp_path: Path) -> None:
    model = nn.ModuleDict({"one": nn.Linear(24, 20), "two": nn.Linear(24, 20)})
    save_file({name: t.detach() for name, t in model.state_dict().items()}, tmp_path / "base.safetensors")
    source = saved(model, "dora-lora", tmp_path / "a.safetensors")
    weights = BaseWeights.open(tmp_path / "base.safetensors")
    result = resize(source, tmp_path / "b.safetensors", Limit(rank=1), base=model, weights=weights)
    assert len(result.layers) == 2
    before, after = changes(source, model), changes(tmp_path / "b.safetensors", model)
    for layer in ("one", "two"):
        weight = model[layer].weight.detach().double()
        wanted, found = weight + before[layer].weight, weight + after[layer].weight
        # Least squares: what is left of each row is at right angles to it.
        assert float(((wanted - found) * found).sum(1).abs().max()) < 1e-4 * float(wanted.square().sum(1).max())


@EVERY
def test_one_file_at_strength_1_is_that_file(name: str, kind: str, tmp_path: Path) -> None:
    model = Two(kind)
    source = saved(model, name, tmp_path / "a.safetensors")
    combine([(source, 1.0)], tmp_path / "b.safetensors", base=model)
    before, after = load_file(source), load_file(tmp_path / "b.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) and before[key].dtype == after[key].dtype for key in before)


SUMS = [
    (one, other, kind) for one in ("lora", "loha", "lokr-full-matrix", "full", "dylora") for other, kind in PROPORTIONAL
]


@pytest.mark.parametrize(("one", "other", "kind"), SUMS)
def test_sums(one: str, other: str, kind: str, tmp_path: Path) -> None:
    model = Two(kind)
    a, b = (saved(model, name, tmp_path / f"{at}.safetensors") for at, name in enumerate((one, other)))
    combine([(a, 0.7), (b, -0.4)], tmp_path / "c.safetensors", base=model, allow_growth=True)
    first, second, found = (changes(path, model) for path in (a, b, tmp_path / "c.safetensors"))
    for layer in found:
        for part in ("weight", "bias"):
            wanted = 0.7 * getattr(first[layer], part) - 0.4 * getattr(second[layer], part)
            assert close(getattr(found[layer], part), wanted)


@pytest.mark.parametrize("name", [name for name, kind in PROPORTIONAL if kind == "linear"])
def test_one_file_at_another_strength(name: str, tmp_path: Path) -> None:
    model = Two("linear")
    source = saved(model, name, tmp_path / "a.safetensors")
    combine([(source, -0.3)], tmp_path / "b.safetensors", base=model)
    before, after = changes(source, model), changes(tmp_path / "b.safetensors", model)
    assert all(close(after[layer].weight, -0.3 * before[layer].weight) for layer in before)


def test_a_sum_of_a_given_rank(tmp_path: Path) -> None:
    model = nn.ModuleDict({"one": nn.Linear(24, 20), "two": nn.Linear(24, 20)})
    a, b = (saved(model, name, tmp_path / f"{name}.safetensors") for name in ("lora", "full"))
    result = combine([(a, 1.0), (b, 1.0)], tmp_path / "c.safetensors", rank=2, base=model)
    exact = {layer: first.weight + changes(b, model)[layer].weight for layer, first in changes(a, model).items()}
    found = changes(tmp_path / "c.safetensors", model)
    for layer, error in result.errors.items():
        values = torch.linalg.svdvals(exact[layer.path])
        assert error == pytest.approx(float(values[2:].norm() / values.norm()), rel=1e-4)
        assert close(found[layer.path].weight, exact[layer.path], tolerance=error * 1.001)
        assert found[layer.path].bias.any()


@pytest.mark.parametrize("name", ["dora-lora", "oft", "glora", "ia3"])
def test_sums_that_depend_on_the_base_are_refused(name: str, tmp_path: Path) -> None:
    model = Two("linear")
    a, b = (saved(model, each, tmp_path / f"{each}.safetensors") for each in (name, "lora"))
    with pytest.raises(FileError, match="depends on the base model's weights"):
        combine([(a, 1.0), (b, 1.0)], tmp_path / "c.safetensors", base=model)
    assert not (tmp_path / "c.safetensors").exists()


def test_nothing_is_written_over_and_nothing_grows_unasked(tmp_path: Path) -> None:
    model = nn.ModuleDict({"one": nn.Linear(64, 64), "two": nn.Linear(64, 64)})
    a, b = (saved(model, name, tmp_path / f"{name}.safetensors") for name in ("lora", "lokr-whole"))
    before = a.read_bytes()
    with pytest.raises(FileError, match="the input is never the output"):
        combine([(a, 1.0), (b, 1.0)], b, base=model, overwrite=True)
    with pytest.raises(FileError, match="exists"):
        resize(a, b, Limit(rank=1), base=model)
    with pytest.raises(FileError, match=r"the sum takes [\d,]+ bytes.*--rank.*--allow-growth"):
        combine([(a, 1.0), (b, 1.0)], tmp_path / "c.safetensors", base=model)
    grown: Combination = combine([(a, 1.0), (b, 1.0)], tmp_path / "c.safetensors", base=model, allow_growth=True)
    assert grown.bytes_after > grown.bytes_before
    assert a.read_bytes() == before


@pytest.mark.parametrize("strength", [0.0, float("nan"), float("inf")])
def test_strengths_that_mean_nothing(strength: float, tmp_path: Path) -> None:
    """Several programs take an alpha of 0 for one that is not there."""
    model = Two("linear")
    source = saved(model, "lora", tmp_path / "a.safetensors")
    with pytest.raises(ConfigError, match="give a number other than 0"):
        combine([(source, strength)], tmp_path / "b.safetensors", base=model)
    with pytest.raises(ConfigError, match="at least 1"):
        combine([(source, 1.0)], tmp_path / "b.safetensors", rank=0, base=model)


def test_ranks_that_follow_the_timestep_are_neither_truncated_nor_added(tmp_path: Path) -> None:
    model = Two("linear")
    adapters = adapt(model, ALGORITHMS["tlora"])
    entries = {layer: tuple(stack) for layer, stack in adapters.bundle().entries.items()}
    assert not conversion.needs_base(entries["one"][0])
    files.write(adapters.bundle(), tmp_path / "a.safetensors", model=model)
    adapters.detach()
    other = saved(model, "lora", tmp_path / "b.safetensors")
    result = resize(tmp_path / "a.safetensors", tmp_path / "c.safetensors", Limit(rank=1), base=model)
    assert not result.layers
    assert len(result.left_alone) == 2
    with pytest.raises(FileError, match=r"tlora (depends on|follow)|ranks of tlora follow"):
        combine([(tmp_path / "a.safetensors", 1.0), (other, 1.0)], tmp_path / "d.safetensors", base=model)


def test_weights_of_the_denoiser_do_not_matter_to_a_text_encoder(tmp_path: Path) -> None:
    """A folder with the denoiser's weights has none of the text encoder's layers."""
    keys = {"lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q": (640, 640)}
    keys["lora_te1_text_model_encoder_layers_0_self_attn_q_proj"] = (768, 768)
    tensors = {}
    for name, (o, i) in keys.items():
        tensors |= {f"{name}.lora_up.weight": torch.randn(o, 4), f"{name}.lora_down.weight": torch.randn(4, i)}
    save_file(tensors, tmp_path / "a.safetensors")
    save_file({"unrelated.weight": torch.zeros(1)}, tmp_path / "base.safetensors")
    weights = BaseWeights.open(tmp_path / "base.safetensors")
    result = resize(tmp_path / "a.safetensors", tmp_path / "b.safetensors", Limit(rank=2), weights=weights)
    assert sorted(layer.component for layer in result.layers) == ["", "text_encoder"]


def test_a_folder_holds_one_model(tmp_path: Path) -> None:
    from lycoris.tools.adapter_file import AdapterFile

    model = nn.ModuleDict({"one": nn.Linear(8, 8)})
    adapters = adapt(model, ALGORITHMS["lora"])
    files.write_peft(adapters.bundle(), tmp_path / "peft")
    adapters.detach()
    file = AdapterFile.open(tmp_path / "peft", model)
    both = file.opened._replace(bundles={"": file.opened.bundles[""], "text_encoder": file.opened.bundles[""]})
    joined = AdapterFile(file.path, both)
    with pytest.raises(FileError, match="holds the adapters of one model"):
        joined.write(tmp_path / "other", dict(joined.iterate_stacks()))
    assert not (tmp_path / "other").exists()


def test_files_of_other_models_are_not_added(tmp_path: Path) -> None:
    one, other = nn.ModuleDict({"a": nn.Linear(8, 8)}), nn.ModuleDict({"b": nn.Linear(8, 8)})
    a, b = saved(one, "lora", tmp_path / "a.safetensors"), saved(other, "lora", tmp_path / "b.safetensors")
    with pytest.raises(FileError):
        combine([(a, 1.0), (b, 1.0)], tmp_path / "c.safetensors")


@EVERY
def test_every_layer_is_measured(name: str, kind: str, tmp_path: Path) -> None:
    model = Two(kind)
    source = saved(model, name, tmp_path / "a.safetensors")
    found = inspect(source, base=model)
    exact = changes(source, model)
    assert {layer.path for layer in found.layers} == {"one", "two"}
    assert found.parameters == sum(each.parameters for each in found.layers.values()) > 0
    for layer, each in found.layers.items():
        if each.norm is not None and not isinstance(ALGORITHMS[name], Full):
            assert each.norm == pytest.approx(float(exact[layer.path].weight.norm()), rel=1e-4)
        assert not each.problem
    assert str(found).count("\n") < 15


def test_what_is_wrong_with_layers_is_named(tmp_path: Path) -> None:
    model = Two("linear")
    source = saved(model, "lora", tmp_path / "a.safetensors")
    tensors = load_file(source)
    one, two = (next(key for key in tensors if f"_{name}." in key and "up" in key) for name in ("one", "two"))
    tensors[one].zero_()
    tensors[two][0, 0] = torch.nan
    save_file(tensors, tmp_path / "b.safetensors")
    problems = inspect(tmp_path / "b.safetensors", base=model).find_problems()
    assert problems["changes nothing"] == ["one"]
    (other,) = problems.keys() - {"changes nothing"}
    assert "NaN" in other
    assert problems[other] == ["two"]


@pytest.mark.parametrize("shape", [(200, 160), (160, 200), (40, 300)])
def test_randomized_values_are_nearly_the_best_and_say_what_they_leave_out(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(n, min(shape)))[0] for n in shape)
    matrix = left * (torch.arange(min(shape)) + 1.0).pow(-0.5) @ right.mT
    found = decompose(matrix, 12)
    up, down = found.factors(12)
    error = float((matrix - up @ down).norm())
    assert error <= 1.01 * float(torch.linalg.svdvals(matrix)[12:].norm())
    assert float(found.energies()[12].sqrt()) == pytest.approx(error, rel=1e-3)


def test_a_product_is_decomposed_without_building_it() -> None:
    torch.manual_seed(0)
    up, down = torch.randn(30, 4, dtype=torch.float64), torch.randn(4, 50, dtype=torch.float64)
    found = decompose_product(up, down)
    assert torch.allclose(found.values, torch.linalg.svdvals(up @ down)[:4])
    assert torch.allclose(found.left * found.values @ found.right, up @ down)
