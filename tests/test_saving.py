"""The warning when a library saves an adapted model without its adapters, and when there is none."""

from __future__ import annotations

import copy
import pickle
import warnings
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import save_model
from torch import nn

from lycoris import AdapterSet, LoKr, LoRA, Rule, create_lycoris, plan
from lycoris.adapters.saving import BaseOnlyWarning
from lycoris.integrations.checkpoints import checkpoint_adapters


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)).requires_grad_(False)


def adapt(model: nn.Module, name: str = "default") -> AdapterSet:
    return AdapterSet.build(model, plan(model, Rule(LoRA(rank=2))), name=name).attach()


def hooks(model: nn.Module) -> int:
    return len(model._state_dict_pre_hooks)


def test_a_library_that_saves_is_warned_of_once_and_where_it_was_called(tmp_path: Path) -> None:
    model = net()
    adapt(model)
    with pytest.warns(BaseOnlyWarning, match="save_model of safetensors saves this Sequential without its 2 ad") as got:
        save_model(model, str(tmp_path / "model.safetensors"))
    assert [warning.filename for warning in got] == [__file__]
    save_model(model, str(tmp_path / "model.safetensors"))


def test_asking_for_the_state_of_the_base_on_purpose_is_not(tmp_path: Path) -> None:
    model = net()
    before = model.state_dict(keep_vars=True)
    adapt(model)
    after = model.state_dict(keep_vars=True)
    assert list(after) == list(before)
    assert all(after[name] is before[name] for name in before)
    torch.save(model.state_dict(), tmp_path / "base.pt")


def test_a_model_without_adapters_is_not(tmp_path: Path) -> None:
    model = net()
    one, two = adapt(model), adapt(model, "other")
    assert hooks(model) == 1
    one.detach()
    assert hooks(model) == 1
    two.detach()
    assert hooks(model) == 0
    save_model(model, str(tmp_path / "model.safetensors"))


def test_a_merged_model_is_not_for_its_weights_hold_the_adapters(tmp_path: Path) -> None:
    model = net()
    adapters = adapt(model)
    adapters.merge()
    save_model(model, str(tmp_path / "model.safetensors"))
    adapters.unmerge()
    with pytest.warns(BaseOnlyWarning):
        save_model(model, str(tmp_path / "model.safetensors"))


def test_a_model_whose_state_is_that_of_its_adapters_is_not(tmp_path: Path) -> None:
    model = net()
    adapters = adapt(model)
    held = checkpoint_adapters(adapters)
    save_model(model, str(tmp_path / "model.safetensors"))
    held.remove()
    with pytest.warns(BaseOnlyWarning):
        save_model(model, str(tmp_path / "model.safetensors"))


def test_it_can_be_silenced_by_its_class(tmp_path: Path) -> None:
    model = net()
    adapt(model)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=BaseOnlyWarning)
        save_model(model, str(tmp_path / "model.safetensors"))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_of_an_adapted_model_work_and_warn_for_themselves(copied: object, tmp_path: Path) -> None:
    model = net()
    adapt(model)
    twin = copied(model)  # type: ignore[operator]
    x = torch.randn(2, 8)
    assert torch.equal(twin(x), model(x))
    for each in (model, twin):
        with pytest.warns(BaseOnlyWarning):
            save_model(each, str(tmp_path / "model.safetensors"))


class TestAccelerate:
    def test_saving_the_base_alone_is_warned_of(self, tmp_path: Path) -> None:
        model, accelerator = net(), Accelerator(cpu=True)
        adapt(model)
        accelerator.prepare(model)
        with pytest.warns(BaseOnlyWarning, match="save_state of accelerate"):
            accelerator.save_state(str(tmp_path))

    def test_adapters_that_are_registered_are_saved(self, tmp_path: Path) -> None:
        model, accelerator = net(), Accelerator(cpu=True)
        adapters = adapt(model)
        accelerator.prepare(model)
        accelerator.register_for_checkpointing(adapters)
        accelerator.save_state(str(tmp_path))

    def test_a_trainer_with_a_hook_of_its_own_sees_to_it_itself(self, tmp_path: Path) -> None:
        model, accelerator = net(), Accelerator(cpu=True)
        adapt(model)
        accelerator.prepare(model)
        accelerator.register_save_state_pre_hook(lambda models, weights, folder: weights.clear())
        accelerator.save_state(str(tmp_path))

    def test_a_network_that_is_prepared_with_its_model_is_saved(self, tmp_path: Path) -> None:
        model, accelerator = net(), Accelerator(cpu=True)
        network = create_lycoris(model, 1.0, 2, 1.0, algo="lora")
        network.apply_to()
        accelerator.prepare(model, network)
        accelerator.save_state(str(tmp_path / "both"))
        alone = Accelerator(cpu=True)
        alone.free_memory()
        alone.prepare(model)
        with pytest.warns(BaseOnlyWarning):
            alone.save_state(str(tmp_path / "one"))

    @pytest.mark.parametrize("which", ["register", "checkpoint"])
    def test_both_ways_resume_exactly(self, which: str, tmp_path: Path) -> None:
        def run(steps: int, resume: bool, save: bool) -> list[torch.Tensor]:
            torch.manual_seed(0)
            model, accelerator = net(), Accelerator(cpu=True)
            adapters = AdapterSet.build(model, plan(model, Rule(LoKr(rank=2, dropout=0.3)))).attach()
            made = torch.optim.AdamW(adapters.parameters(), lr=1e-2)
            wrapped, optimizer, rates = accelerator.prepare(model, made, torch.optim.lr_scheduler.StepLR(made, 1))
            if which == "register":
                accelerator.register_for_checkpointing(adapters)
            else:
                checkpoint_adapters(adapters)
            if resume:
                accelerator.load_state(str(tmp_path))
            for _ in range(steps):
                accelerator.backward(wrapped(torch.randn(4, 8)).square().mean())
                optimizer.step()
                rates.step()
                optimizer.zero_grad()
            if save:
                accelerator.save_state(str(tmp_path))
            return [parameter.detach().clone() for parameter in adapters.parameters()]

        six, _, resumed = run(6, False, False), run(3, False, True), run(3, True, False)
        assert all(torch.equal(a, b) for a, b in zip(six, resumed, strict=True))
