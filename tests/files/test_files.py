"""Adapter files that are damaged, strange or made for something else: each a clear error, and the model untouched."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cases import ALGORITHMS, PAIRS, perturb, relative
from lycoris import (
    AdapterSet,
    Bundle,
    FileError,
    Full,
    LoRA,
    Rule,
    create_lycoris,
    create_lycoris_from_weights,
    plan,
    read,
    write,
)
from lycoris.algorithms.base import Algorithm

LINEAR = [name for name, layer in PAIRS if layer == "conv2d-1x1"]
"""Those that serve layers with a plain matrix."""


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_out = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.to_out(self.to_q(x).tanh())


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks, self.head = nn.Sequential(Block(), Block()), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(x))


def adapted(model: nn.Module, algorithm: Algorithm | None = None) -> AdapterSet:
    adapters = AdapterSet.build(model, plan(model, Rule(algorithm or LoRA(rank=2, alpha=3.0)), strict=False))
    perturb(adapters)
    return adapters


@pytest.fixture
def good(tmp_path: Path) -> Path:
    """A file that fits `Model`."""
    write(adapted(Model()).bundle(), tmp_path / "good.safetensors")
    return tmp_path / "good.safetensors"


@pytest.fixture
def model() -> Iterator[Model]:
    """A model that must come out of the test as it went in."""
    made = Model()
    before = {key: value.clone() for key, value in made.state_dict().items()}
    parameters = list(made.parameters())
    yield made
    assert all(torch.equal(before[key], value) for key, value in made.state_dict().items())
    assert all(a is b for a, b in zip(parameters, made.parameters(), strict=True))
    assert {type(m) for m in made.modules()} == {Model, Block, nn.Linear, nn.Sequential}
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in made.modules())


def changed(good: Path, **replaced: Any) -> Path:
    """The good file with tensors replaced (None: removed); `__` stands for a dot."""
    tensors = load_file(good)
    for name, tensor in replaced.items():
        tensors.pop(name.replace("__", "."), None)
        if tensor is not None:
            tensors[name.replace("__", ".")] = tensor
    save_file(tensors, good.parent / "changed.safetensors")
    return good.parent / "changed.safetensors"


def refused(path: Path, model: nn.Module, *words: str) -> None:
    """Both doors refuse the file, naming it and all of `words`."""
    for door in (lambda: read(path, model), lambda: create_lycoris_from_weights(1.0, path, model)):
        with pytest.raises(FileError) as caught:
            door()
        for word in (path.name, *words):
            assert word in str(caught.value)


# -- not a file ------------------------------------------------------------------------------------------------------


def test_missing(good: Path, model: Model) -> None:
    refused(good.parent / "goood.safetensors", model, "no file", "good.safetensors")
    refused(good.parent / "nowhere" / "a.safetensors", model, "no file")
    refused(good.parent, model, "no file")


def test_cut_short_anywhere(good: Path, model: Model) -> None:
    whole = good.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    for length in (0, 1, 7, 8, 9, header // 2, header - 1, header, header + 1, len(whole) // 2, len(whole) - 1):
        (good.parent / "cut.safetensors").write_bytes(whole[:length])
        refused(good.parent / "cut.safetensors", model, "truncated")


def test_too_long_and_header_beyond_the_end(good: Path, model: Model) -> None:
    whole = good.read_bytes()
    for content in (whole + b"more", (10**9).to_bytes(8, "little") + whole[8:], (2**63).to_bytes(8, "little")):
        (good.parent / "odd.safetensors").write_bytes(content)
        refused(good.parent / "odd.safetensors", model, "cannot be read as safetensors")


@pytest.mark.parametrize("seed", range(8))
def test_random_bytes(seed: int, good: Path, model: Model) -> None:
    generator = torch.Generator().manual_seed(seed)
    noise = bytes(torch.randint(0, 256, (64 * seed + 9,), generator=generator).tolist())
    for name in ("noise.safetensors", "noise.pt", "noise.bin"):
        (good.parent / name).write_bytes(noise)
        refused(good.parent / name, model, "cannot be read")


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".ckpt"])
def test_a_pickle_with_code_is_refused_and_the_code_not_run(suffix: str, good: Path, model: Model) -> None:
    marker = good.parent / "ran"

    class Writes:
        def __reduce__(self) -> Any:
            return Path.touch, (marker,)

    path = good.parent / f"evil{suffix}"
    path.write_bytes(pickle.dumps({"lycoris_head.alpha": Writes()}))
    refused(path, model, "cannot be read safely")
    torch.save({"lycoris_head.alpha": Writes()}, path)
    refused(path, model, "cannot be read safely")
    assert not marker.exists()


def test_pickles_of_tensors_are_read_and_others_refused(good: Path, model: Model) -> None:
    path = good.parent / "plain.pt"
    torch.save(load_file(good), path)
    assert set(read(path, model).entries) == set(read(good, model).entries)
    torch.save([torch.zeros(2)], path)
    refused(path, model, "other than tensors by name")


# -- not for this model ----------------------------------------------------------------------------------------------


def test_an_empty_file(good: Path, model: Model) -> None:
    save_file({}, good.parent / "empty.safetensors")
    refused(good.parent / "empty.safetensors", model, "has no tensors")


def test_keys_of_no_known_format(good: Path, model: Model) -> None:
    save_file({"transformer.head.lora_A.wait": torch.zeros(2, 8)}, good.parent / "peft.safetensors")
    refused(good.parent / "peft.safetensors", model, "transformer.head.lora_A.wait", "lycoris_")


def test_keys_that_match_nothing(good: Path, model: Model) -> None:
    path = good.parent / "other.safetensors"
    save_file({key.replace("lycoris_", "lycoris_unet_"): value for key, value in load_file(good).items()}, path)
    refused(path, model, "none of its 5 layers", "unet_head", "Model has 5 such layers", "blocks_0_to_q")


def test_keys_that_partly_match(good: Path, model: Model) -> None:
    extra = {"lycoris_blocks_7_to_q__lora_up__weight": torch.zeros(16, 2)}
    refused(changed(good, **extra), model, "1 of its 6 layers", "blocks_7_to_q is like blocks_")


@pytest.mark.sample(24)
@pytest.mark.parametrize("algorithm", LINEAR)
def test_each_tensor_of_a_wrong_shape(algorithm: str, good: Path, model: Model) -> None:
    write(adapted(Model(), ALGORITHMS[algorithm]).bundle(), good)
    tensors = load_file(good)
    for key in [key for key in tensors if key.startswith("lycoris_head.")]:
        if "alpha" in key:
            continue
        refused(changed(good, **{key: torch.zeros(5, 3)}), model, "head", "(4, 8)")


@pytest.mark.sample(24)
@pytest.mark.parametrize("algorithm", LINEAR)
def test_each_tensor_missing(algorithm: str, good: Path, model: Model) -> None:
    write(adapted(Model(), ALGORITHMS[algorithm]).bundle(), good)
    keys = [key for key in load_file(good) if key.startswith("lycoris_head.")]
    for key in keys:
        if (
            key.endswith(("alpha", "diff", "diff_b", "dora_scale", "rescale", "on_input", "set_weight"))
            or len(keys) == 1
        ):
            continue  # what is left means something else
        refused(changed(good, **{key: None}), model, "head")


def test_broadcastable_shapes_are_not_accepted(good: Path, model: Model) -> None:
    thin = {"lycoris_head__lora_up__weight": torch.zeros(1, 2), "lycoris_head__lora_down__weight": torch.zeros(2, 1)}
    refused(changed(good, **thin), model, "head", "(1, 2)")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("key", ["lycoris_head__lora_up__weight", "lycoris_head__alpha"])
def test_not_finite(key: str, value: float, good: Path, model: Model) -> None:
    refused(changed(good, **{key: load_file(good)[key.replace("__", ".")] * value}), model, key[8:].replace("__", "."))


def test_two_algorithms_on_one_layer(good: Path, model: Model) -> None:
    refused(changed(good, lycoris_head__lokr_w1=torch.zeros(2, 2)), model, "head", "mix lokr and lora", "lokr_w1")


@pytest.mark.parametrize("suffix", ["lora_left__weight", "lora_up__wait", "x"])
def test_a_tensor_of_unknown_name(suffix: str, good: Path, model: Model) -> None:
    refused(changed(good, **{f"lycoris_head__{suffix}": torch.zeros(2)}), model, "head", suffix.replace("__", "."))


def test_a_tensor_that_has_no_place(good: Path, model: Model) -> None:
    refused(changed(good, lycoris_head__lora_mid__weight=torch.ones(2, 2, 1)), model, "head", "lora_mid")


def test_several_bad_layers_are_listed_together(good: Path, model: Model) -> None:
    bad = {f"lycoris_blocks_{n}_to_q__lora_up__weight": torch.zeros(5, 2) for n in (0, 1)}
    refused(changed(good, **bad), model, "2 of 5 layers", "blocks.0.to_q", "blocks.1.to_q")


def test_names_that_collide(tmp_path: Path) -> None:
    model = nn.Module()
    model.a, model.a_b = nn.Module(), nn.Linear(4, 4)
    model.a.b = nn.Linear(4, 4)
    with pytest.raises(FileError, match=r"a_b and a\.b|a\.b and a_b"):
        write(adapted(model).bundle(), tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())
    save_file({"lycoris_a_b.lora_up.weight": torch.zeros(4, 1)}, tmp_path / "a.safetensors")
    with pytest.raises(FileError, match="same name with underscores"):
        read(tmp_path / "a.safetensors", model)


@pytest.mark.parametrize("stack", [(Full(), LoRA(rank=2)), (LoRA(rank=2), LoRA(rank=3))], ids=repr)
def test_several_algorithms_on_a_layer_are_not_written(stack: Any, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    adapters = AdapterSet.build(model, plan(model, Rule(stack)))
    with pytest.raises(FileError, match=r"0 has \w+ and lora, and lycoris files hold one algorithm per layer"):
        write(adapters.bundle(), tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())


def test_load_weights_leaves_the_network_as_it_was(good: Path) -> None:
    network = create_lycoris(Model(), 1.0, linear_dim=2, linear_alpha=3.0)
    perturb(network.adapters)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    bad = {"lycoris_blocks_1_to_q__lora_up__weight": torch.full((12, 2), float("nan"))}
    with pytest.raises(FileError, match=r"(?s)changed\.safetensors.*blocks\.1\.to_q\.lora_up\.weight"):
        network.load_weights(changed(good, **bad))
    assert all(torch.equal(before[key], value) for key, value in network.state_dict().items())
    assert network.load_weights(good) == {}


# -- strange, and fine -----------------------------------------------------------------------------------------------


def effect(path: Path, model: nn.Module, **options: Any) -> Tensor:
    x = torch.linspace(-1, 1, 24).reshape(3, 8)
    adapters = AdapterSet.load(model, read(path, model, **options)).attach()
    out = model(x)
    adapters.detach()
    return out


@pytest.mark.sample(24)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("algorithm", LINEAR)
def test_other_precisions(algorithm: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = Model()
    bundle = adapted(model, ALGORITHMS[algorithm]).bundle()
    write(bundle, tmp_path / "whole.safetensors")
    write(bundle, tmp_path / "half.safetensors", dtype=dtype)
    whole, half = effect(tmp_path / "whole.safetensors", model), effect(tmp_path / "half.safetensors", model)
    assert relative(half, whole) < (1e-6 if dtype == torch.float64 else 0.1)
    for key, tensor in load_file(tmp_path / "half.safetensors").items():
        assert tensor.dtype == (
            torch.float32 if key.endswith(".alpha") else dtype if tensor.is_floating_point() else torch.int64
        )


def test_alpha_missing_means_the_rank(good: Path, model: Model) -> None:
    none = {key.replace(".", "__"): None for key in load_file(good) if key.endswith("alpha")}
    ranks = {key.replace(".", "__"): torch.tensor(2.0) for key in load_file(good) if key.endswith("alpha")}
    assert torch.equal(effect(changed(good, **none), model), effect(changed(good, **ranks), model))
    assert relative(effect(changed(good, **none), model), effect(good, model)) > 1e-3


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_alpha_of_any_shape_and_type(shape: tuple[int, ...], dtype: torch.dtype, good: Path, model: Model) -> None:
    alphas = {key.replace(".", "__"): torch.full(shape, 3, dtype=dtype) for key in load_file(good) if "alpha" in key}
    assert torch.equal(effect(changed(good, **alphas), model), effect(good, model))


def test_alpha_of_two_numbers_is_refused(good: Path, model: Model) -> None:
    refused(changed(good, lycoris_head__alpha=torch.ones(2)), model, "head.alpha", "one finite number")


@pytest.mark.parametrize("algorithm", LINEAR)
def test_one_by_one_convolutions_and_linear_layers_exchange_files(algorithm: str, tmp_path: Path) -> None:
    linear, conv = nn.Sequential(nn.Linear(8, 16)), nn.Sequential(nn.Conv2d(8, 16, 1))
    with torch.no_grad():
        conv[0].weight.copy_(linear[0].weight[..., None, None])
        conv[0].bias.copy_(linear[0].bias)
    x = torch.randn(2, 8, 3, 3)
    for source in (linear, conv):
        write(adapted(source, ALGORITHMS[algorithm]).bundle(), tmp_path / "a.safetensors")
        base = conv(x)
        sets = [AdapterSet.load(m.eval(), read(tmp_path / "a.safetensors", m)).attach() for m in (linear, conv)]
        assert relative(linear(x.movedim(1, -1)).movedim(-1, 1), conv(x)) < 1e-5
        assert relative(conv(x), base) > 1e-3
        for adapters in sets:
            adapters.detach()


def test_text_encoder_tensors_are_reported_and_left_out(good: Path, model: Model) -> None:
    tensors = {key.replace("lycoris_", "lora_unet_"): value for key, value in load_file(good).items()}
    for prefix in ("lora_te1", "lora_te2"):
        tensors |= {f"{prefix}_layers_0_fc.lora_up.weight": torch.ones(2, 2)}
    path = good.parent / "kohya.safetensors"
    save_file(tensors, path)
    bundle = read(path, model)
    assert len(bundle.entries) == 5
    assert bundle.remarks == ("2 tensors are for text_encoder, text_encoder_2 and were left out",)
    assert torch.equal(effect(path, model), effect(good, model))


def test_a_file_for_text_encoders_only_is_no_file_for_a_denoiser(good: Path, model: Model) -> None:
    path = good.parent / "te.safetensors"
    save_file(
        {"lora_te_head.lora_up.weight": torch.ones(4, 2), "lora_te_head.lora_down.weight": torch.ones(2, 8)}, path
    )
    refused(path, model, "nothing for this component", "text_encoder")
    assert set(read(path, model, component="text_encoder").entries) == {"head"}


@pytest.mark.parametrize("dialect", ["lycoris", "kohya"])
def test_reading_what_was_written_gives_the_bundle_back(dialect: str, tmp_path: Path, model: Model) -> None:
    bundle = adapted(Model()).bundle()
    write(bundle, tmp_path / "a.safetensors", dialect, metadata={"note": "ünï"})
    again = read(tmp_path / "a.safetensors", model)
    assert again.metadata["note"] == "ünï"
    assert list(again.entries) == sorted(bundle.entries, key=list(again.entries).index)
    for path, (entry,) in bundle.entries.items():
        assert again.entries[path][0].algorithm == entry.algorithm
        assert all(torch.equal(again.entries[path][0].tensors[name], t) for name, t in entry.tensors.items())
    with pytest.raises(FileError, match=r"'kohia'.*did you mean 'kohya'"):
        read(tmp_path / "a.safetensors", model, "kohia")


# -- writing ---------------------------------------------------------------------------------------------------------


def test_a_save_that_fails_leaves_the_old_file_and_nothing_else(good: Path) -> None:
    before = good.read_bytes()
    bundle = adapted(Model()).bundle()
    with pytest.raises(FileError, match="metadata 'steps' is 10"):
        write(bundle, good, metadata={"steps": 10})  # type: ignore[dict-item]
    entry = bundle.entries["head"][0]
    poor = {**entry.tensors, "up": torch.full_like(entry.tensors["up"], 1e6)}
    large = Bundle({"head": (entry._replace(tensors=poor),)})
    with pytest.raises(FileError, match=r"lycoris_head\.lora_up\.weight is not finite as torch\.float16"):
        write(large, good, dtype=torch.float16)
    with pytest.raises(FileError, match=r"dialect 'kohia'"):
        write(bundle, good, "kohia")
    assert good.read_bytes() == before
    assert [path.name for path in good.parent.iterdir()] == [good.name]
