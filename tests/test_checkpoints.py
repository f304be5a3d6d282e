"""A model's state that is its adapters', for trainers that save states."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DModel
from safetensors.torch import load_file
from torch import Tensor, nn

from lycoris import AdapterSet, ConfigError, DoRA, FileError, LoKr, LoRA, Rule, TLoRA, plan, read
from lycoris.integrations.checkpoints import checkpoint_adapters

ALGORITHMS = [LoKr(rank=2), DoRA(inner=LoRA(rank=2)), TLoRA(rank=2)]


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 8)).requires_grad_(False)


def adapt(model: nn.Module, algorithm: object = ALGORITHMS[0], name: str | None = "default") -> AdapterSet:
    return AdapterSet.build(model, plan(model, Rule(algorithm)), name=name).attach()  # type: ignore[arg-type]


def scramble(adapters: AdapterSet) -> None:
    for tensor in adapters.state_dict().values():
        tensor.normal_()


def tensors(adapters: AdapterSet) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in adapters.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(params=ALGORITHMS, ids=str)
def pair(request: pytest.FixtureRequest) -> tuple[nn.Module, AdapterSet, AdapterSet]:
    model = net()
    return model, adapt(model, request.param), adapt(model, LoRA(rank=1), "second")


def test_the_state_is_every_tensor_of_every_set_and_not_the_base(
    pair: tuple[nn.Module, AdapterSet, AdapterSet],
) -> None:
    model, one, two = pair
    checkpoint_adapters(one, two)
    state = model.state_dict()
    held = [name for name in state if not name.startswith("lycoris.")]
    assert held == ["1.running_mean", "1.running_var", "1.num_batches_tracked"]  # what training changes besides
    assert len(state) - len(held) == len(one.state_dict()) + len(two.state_dict())
    before, second = tensors(one), tensors(two)
    saved = copy.deepcopy(state)
    scramble(one)
    scramble(two)
    assert model.load_state_dict(saved, strict=True).missing_keys == []
    assert same(tensors(one), before)
    assert same(tensors(two), second)


def test_it_is_so_inside_another_module_whose_own_state_stays() -> None:
    around = nn.ModuleDict({"net": net(), "head": nn.Linear(8, 2)})
    adapters = adapt(around["net"])
    base = list(around["head"].state_dict())
    checkpoint_adapters(adapters)
    state = copy.deepcopy(around.state_dict())
    assert [name for name in state if name.startswith("head.")] == [f"head.{name}" for name in base]
    assert not [name for name in state if name.startswith("net.0.")]
    before = tensors(adapters)
    scramble(adapters)
    around.load_state_dict(state)
    assert same(tensors(adapters), before)
    del state["head.bias"]
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "head.bias"'):
        around.load_state_dict(state)


def test_sets_on_parts_of_what_is_saved() -> None:
    around = nn.ModuleDict({"one": net(), "two": net()}).requires_grad_(False)
    sets = adapt(around["one"]), adapt(around["two"], name="two")
    checkpoint_adapters(*sets, model=around)
    state = copy.deepcopy(around.state_dict())
    assert not [name for name in state if name.endswith(".weight")]
    before = [tensors(each) for each in sets]
    for each in sets:
        scramble(each)
    around.load_state_dict(state)
    assert all(same(tensors(each), was) for each, was in zip(sets, before, strict=True))


def test_what_else_trains_goes_along() -> None:
    model = net()
    adapters = adapt(model)
    model[2].bias.requires_grad_(True)
    checkpoint_adapters(adapters)
    state = copy.deepcopy(model.state_dict())
    assert "2.bias" in state
    assert "2.weight" not in state
    nn.init.zeros_(model[2].bias)
    model.load_state_dict(state)
    assert torch.equal(model[2].bias, state["2.bias"])


@pytest.mark.parametrize("end", ["remove", "detach"])
def test_after_it_the_state_is_the_bases_again(end: str) -> None:
    model = net()
    before = model.state_dict()
    adapters = adapt(model)
    held = checkpoint_adapters(adapters)
    (held.remove if end == "remove" else adapters.detach)()
    assert same(model.state_dict(), before)
    model.load_state_dict(before)
    held.remove()
    assert not model._state_dict_hooks
    assert not model._load_state_dict_pre_hooks
    assert not model._load_state_dict_post_hooks


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_have_a_state_of_their_own(copied: object) -> None:
    model = net()
    adapters = adapt(model)
    checkpoint_adapters(adapters)
    twin, state = copied(model), copy.deepcopy(model.state_dict())  # type: ignore[operator]
    scramble(adapters)
    assert same(twin.state_dict(), state)
    assert not same(model.state_dict(), state)


def test_a_second_call_takes_the_place_of_the_first() -> None:
    model = net()
    one, two = adapt(model), adapt(model, name="two")
    first = checkpoint_adapters(one)
    checkpoint_adapters(one, two)
    assert len(model._state_dict_hooks) == 1
    first.remove()
    assert any(name.startswith("lycoris.two:") for name in model.state_dict())


class TestMistakes:
    def test_a_state_without_adapters_is_refused(self) -> None:
        model = net()
        base = model.state_dict()
        checkpoint_adapters(adapt(model))
        with pytest.raises(FileError, match="no adapters, but the attached sets are default"):
            model.load_state_dict(base)

    def test_a_state_of_another_set_is_refused(self) -> None:
        model, other = net(), net()
        checkpoint_adapters(adapt(other, name="style"))
        checkpoint_adapters(adapt(model))
        with pytest.raises(FileError, match="adapters of style, but the attached sets are default"):
            model.load_state_dict(other.state_dict())

    def test_a_state_of_another_algorithm_is_refused(self) -> None:
        model, other = net(), net()
        checkpoint_adapters(adapt(other, LoRA(rank=3)))
        checkpoint_adapters(adapt(model))
        with pytest.raises(FileError, match="does not fit"):
            model.load_state_dict(other.state_dict())

    def test_without_it_the_state_does_not_load_unnoticed(self) -> None:
        model, other = net(), net()
        checkpoint_adapters(adapt(other))
        adapt(model)
        with pytest.raises(RuntimeError, match=r"lycoris\.default"):
            model.load_state_dict(other.state_dict())

    def test_a_set_that_was_left_out_is_an_error_when_saving(self) -> None:
        model = net()
        checkpoint_adapters(adapt(model))
        adapt(model, name="other")
        with pytest.raises(ConfigError, match=r"2 adapters would not be saved.*0\.adapter_other"):
            model.state_dict()

    def test_sets_have_to_be_of_one_model_and_of_different_names(self) -> None:
        model = net()
        one, two = adapt(model), adapt(net())
        with pytest.raises(ConfigError, match="not all on this Sequential"):
            checkpoint_adapters(one, two.__class__.build(two.model, plan(two.model, Rule(LoRA(rank=1))), "two"))
        with pytest.raises(ConfigError, match="the names are default"):
            checkpoint_adapters(one, two)
        with pytest.raises(ConfigError, match="no adapters"):
            checkpoint_adapters()
        with pytest.raises(ConfigError, match="slashes"):
            checkpoint_adapters(AdapterSet.build(model, plan(model, Rule(LoRA(rank=1))), "a/b"))

    def test_adapters_are_in_one_state_at_a_time(self) -> None:
        around = nn.ModuleDict({"net": net()})
        adapters = adapt(around["net"])
        checkpoint_adapters(adapters)
        with pytest.raises(ConfigError, match="saved with another module"):
            checkpoint_adapters(adapters, model=around)


class TestSavePretrained:
    def unet(self) -> UNet2DModel:
        return UNet2DModel(
            sample_size=8,
            block_out_channels=(8,),
            norm_num_groups=4,
            layers_per_block=1,
            down_block_types=("AttnDownBlock2D",),
            up_block_types=("AttnUpBlock2D",),
        ).requires_grad_(False)

    def test_it_writes_the_state_and_a_file_and_nothing_that_looks_like_a_base(self, tmp_path: Path) -> None:
        unet = self.unet()
        adapters = AdapterSet.build(unet, plan(unet, Rule(LoKr(rank=2), path="*attentions*"))).attach()
        scramble(adapters)
        checkpoint_adapters(adapters)
        unet.save_pretrained(tmp_path / "out", safe_serialization=True)
        names = sorted(path.name for path in (tmp_path / "out").iterdir())
        assert names == ["model.safetensors", "pytorch_lora_weights.safetensors"]
        assert same(load_file(tmp_path / "out" / "model.safetensors"), unet.state_dict())
        bundle = read(tmp_path / "out" / "pytorch_lora_weights.safetensors", unet)
        twin = self.unet()
        assert same(tensors(AdapterSet.load(twin, bundle)), tensors(adapters))

    def test_several_sets_have_a_folder_each(self, tmp_path: Path) -> None:
        unet = self.unet()
        rule = Rule(LoKr(rank=2), path="*attentions*")
        sets = [AdapterSet.build(unet, plan(unet, rule), name).attach() for name in ("one", "two")]
        checkpoint_adapters(*sets)
        unet.save_pretrained(tmp_path)
        for name in ("one", "two"):
            assert read(tmp_path / name / "pytorch_lora_weights.safetensors", unet).entries

    def test_only_the_main_process_writes(self, tmp_path: Path) -> None:
        unet = self.unet()
        checkpoint_adapters(AdapterSet.build(unet, plan(unet, Rule(LoKr(rank=2), path="*attentions*"))).attach())
        unet.save_pretrained(tmp_path, is_main_process=False)
        assert not list(tmp_path.iterdir())
        with pytest.raises(ConfigError, match="push_to_hub"):
            unet.save_pretrained(tmp_path, push_to_hub=True)

    @pytest.mark.parametrize("end", ["remove", "detach"])
    def test_afterwards_it_is_the_models_own(self, end: str, tmp_path: Path) -> None:
        unet = self.unet()
        adapters = AdapterSet.build(unet, plan(unet, Rule(LoKr(rank=2), path="*attentions*"))).attach()
        held = checkpoint_adapters(adapters)
        if end == "remove":
            held.remove()
        adapters.detach()
        unet.save_pretrained(tmp_path)
        assert (tmp_path / "config.json").is_file()
        held.remove()
        assert "save_pretrained" not in vars(unet)
