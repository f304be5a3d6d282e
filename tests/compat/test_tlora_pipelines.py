"""A rank schedule on a pipeline: found where the pipeline calls its denoiser, and searched for once."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cases import perturb
from lycoris import ConfigError, RankSchedule, create_lycoris
from lycoris.compat import timestep_masks

RANK, STEPS = 4, 5
OWN, OTHER = RankSchedule(max_rank=RANK), RankSchedule(max_rank=RANK, alpha=2.0)
CONFIG = {"alpha": 2.0}
"""Of a pipeline that asks for `OTHER`."""


class Denoiser(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor, timestep: float) -> Tensor:
        return x + self.linear(x)


class Pipeline:
    """Calls its denoiser as a pipeline does, with a rank schedule if one is given."""

    def __init__(self, model: nn.Module, config: dict[str, Any] | None = None) -> None:
        self.model = model
        if config is not None:
            self._tlora_config = config

    def __call__(self, steps: int = 1) -> None:
        for _ in range(steps):
            self.model(torch.zeros(1, 4), 500)


class Outer:
    """Has the schedule, while another object calls the denoiser, as in modular pipelines."""

    def __init__(self, inner: Pipeline) -> None:
        self.inner = inner

    def __call__(self) -> None:
        self.inner()


@pytest.fixture
def model() -> Denoiser:
    return Denoiser().requires_grad_(False)


@pytest.fixture
def adapters(model: Denoiser) -> Any:
    network = create_lycoris(model, 1.0, RANK, 3.0, algo="tlora")
    perturb(network.adapters)
    network.apply_to()
    return network.adapters


def test_the_configuration_of_a_pipeline_is_checked_and_completed(model: Denoiser, adapters: Any) -> None:
    Pipeline(model, {"alpha": 2.0})()
    assert adapters.schedule == OTHER
    with pytest.raises(ConfigError, match=r"unknown key of _tlora_config 'max_ranks'; did you mean 'max_rank'"):
        Pipeline(model, {"max_ranks": RANK})()


def test_pipelines_that_share_a_denoiser_each_have_their_own_schedule(model: Denoiser, adapters: Any) -> None:
    scheduled, unscheduled = Pipeline(model, CONFIG), Pipeline(model)
    for _ in range(2):
        scheduled()
        assert adapters.schedule == OTHER
        unscheduled()
        assert adapters.schedule == OWN


def test_a_direct_call_has_the_schedule_of_the_adapters(model: Denoiser, adapters: Any) -> None:
    pipe = Pipeline(model, CONFIG)
    pipe()
    model(torch.zeros(1, 4), 500)
    assert adapters.schedule == OWN
    pipe()
    assert adapters.schedule == OTHER


def test_a_configuration_is_found_whenever_it_is_set(model: Denoiser, adapters: Any) -> None:
    pipe = Pipeline(model)
    for _ in range(2):
        pipe()
        assert adapters.schedule == OWN
        pipe._tlora_config = CONFIG
        pipe()
        assert adapters.schedule == OTHER
        del pipe._tlora_config


def test_a_configuration_further_out_is_found(model: Denoiser, adapters: Any) -> None:
    outer: Any = Outer(Pipeline(model))
    outer()
    assert adapters.schedule == OWN
    outer._tlora_config = CONFIG
    outer()
    assert adapters.schedule == OTHER


def test_a_pipeline_is_not_kept_alive(model: Denoiser, adapters: Any) -> None:
    Pipeline(model, CONFIG)()
    hook = next(each for each in model._forward_pre_hooks.values() if isinstance(each, timestep_masks._ScheduleHook))
    assert hook._callers[0]() is None
    model(torch.zeros(1, 4), 500)
    assert adapters.schedule == OWN


@pytest.mark.parametrize("config", [None, CONFIG])
def test_the_stack_is_searched_once_for_a_pipeline(
    config: dict[str, Any] | None, model: Denoiser, adapters: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[Any] = []
    iterate = timestep_masks._iterate_callers

    def count(frame: Any) -> Any:
        for caller in iterate(frame):
            found.append(caller)
            yield caller

    monkeypatch.setattr(timestep_masks, "_iterate_callers", count)
    pipe = Pipeline(model, config)
    pipe()
    assert len(found) > 2, "the test runner is on the stack too"
    found.clear()
    pipe(STEPS)
    assert found == [pipe] * STEPS


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_made_after_a_call_finds_its_own_pipeline(copied: Any, model: Denoiser, adapters: Any) -> None:
    pipe = Pipeline(model, CONFIG)
    pipe()
    again = copied(model)
    other = Pipeline(again)
    other()
    schedules = [each.adapters.schedule for each in again._forward_pre_hooks.values() if hasattr(each, "adapters")]
    assert schedules == [OWN]
    assert adapters.schedule == OTHER
