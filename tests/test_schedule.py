"""How many ranks count at a timestep, and reading that timestep off a call."""

from __future__ import annotations

import importlib.util
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from lycoris import (
    AdapterSet,
    ConfigError,
    FileError,
    RankSchedule,
    Rule,
    TLoRA,
    plan,
    read,
    write,
)
from lycoris.targeting.rank_schedule import TIMESTEP_UNITS, read_timestep, takes_timestep

TABLES = {
    1.0: {0: 64, 250: 48, 500: 32, 750: 16, 999: 1, 1000: 1},
    2.0: {0: 64, 250: 36, 500: 16, 750: 4, 999: 1, 1000: 1},
    0.5: {0: 64, 250: 55, 500: 45, 750: 32, 999: 2, 1000: 1},
}
"""T = 1000, 64 ranks, at least 1. By hand: alpha 2 at t = 250 is ⌊0.5625 · 63⌋ + 1 = 35 + 1."""


@pytest.mark.parametrize("alpha", TABLES)
def test_tables(alpha: float) -> None:
    schedule = RankSchedule(max_rank=64, alpha=alpha)
    assert {t: schedule.rank(t) for t in TABLES[alpha]} == TABLES[alpha]


def test_timesteps_beyond_the_range_are_clamped() -> None:
    schedule = RankSchedule(max_rank=64, min_rank=3, alpha=0.5)
    assert schedule.rank(1500) == schedule.rank(1000) == 3
    assert schedule.rank(-20) == schedule.rank(0) == 64


SCHEDULES = st.builds(
    lambda small, more, alpha, steps: RankSchedule(max_rank=small + more, min_rank=small, alpha=alpha, steps=steps),
    st.integers(0, 40),
    st.integers(1, 200),
    st.floats(0.05, 8),
    st.integers(1, 4000),
)
PLACES = st.floats(-0.5, 1.5)


@given(schedule=SCHEDULES, place=PLACES)
def test_ranks_are_within_bounds_and_by_the_formula(schedule: RankSchedule, place: float) -> None:
    t = place * schedule.steps
    rank = schedule.rank(t)
    assert schedule.min_rank <= rank <= schedule.max_rank
    if 0 <= t <= schedule.steps:
        share = (rank - schedule.min_rank) / (schedule.max_rank - schedule.min_rank)
        exact = (1 - t / schedule.steps) ** schedule.alpha
        assert share <= exact + 1e-9
        assert rank == schedule.max_rank or share + 1 / (schedule.max_rank - schedule.min_rank) > exact - 1e-9


@given(schedule=SCHEDULES, places=st.tuples(PLACES, PLACES))
def test_more_noise_never_means_more_ranks(schedule: RankSchedule, places: tuple[float, float]) -> None:
    early, late = sorted(place * schedule.steps for place in places)
    assert schedule.rank(early) >= schedule.rank(late)


@given(schedule=SCHEDULES)
def test_the_ends(schedule: RankSchedule) -> None:
    assert schedule.rank(0) == schedule.max_rank
    assert schedule.rank(schedule.steps) == schedule.min_rank


@given(schedule=SCHEDULES, places=st.lists(PLACES, min_size=1, max_size=5))
def test_masks_have_the_first_ranks_of_each_sample(schedule: RankSchedule, places: list[float]) -> None:
    timesteps = torch.tensor(places, dtype=torch.float64) * schedule.steps
    mask = schedule.mask(timesteps)
    assert mask.shape == (len(places), schedule.max_rank)
    for row, t in zip(mask, timesteps.tolist(), strict=True):
        rank = schedule.rank(t)
        assert row[:rank].eq(1).all()
        assert row[rank:].eq(0).all()


@pytest.mark.parametrize("given", [750, 750.0, torch.tensor(750), torch.tensor([750.0])])
def test_one_timestep_is_one_row(given: Any) -> None:
    assert RankSchedule(max_rank=64).mask(given).sum(1).tolist() == [16.0]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_rank": 4, "min_rank": 5}, "min rank"),
        ({"max_rank": 4, "min_rank": -1}, "min rank"),
        ({"max_rank": 4, "alpha": 0.0}, "exponent"),
        ({"max_rank": 4, "alpha": math.nan}, "exponent"),
        ({"max_rank": 4, "steps": 0}, "timesteps"),
    ],
)
def test_senseless_schedules_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        RankSchedule(**options)


class Denoiser(nn.Module):
    def forward(self, sample: Tensor, timestep: Tensor, text: Tensor | None = None) -> Tensor:
        return sample


def called(kind: str) -> nn.Module:
    """A denoiser whose class has the name of one of diffusers'."""
    return type(kind, (Denoiser,), {})()


X = torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("args", "kwargs"), [((X, torch.tensor(7)), {}), ((X,), {"timestep": 7}), ((), {"sample": X, "timestep": 7.0})]
)
def test_a_timestep_is_found_by_place_and_by_name(args: Any, kwargs: Any) -> None:
    assert read_timestep(called("UNet2DConditionModel"), args, kwargs, 1000).tolist() == [7.0]


def test_a_call_without_timestep_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"UNet2DConditionModel was called without a timestep"):
        read_timestep(called("UNet2DConditionModel"), (X,), {}, 1000)


@pytest.mark.parametrize("kind", TIMESTEP_UNITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_units_other_than_steps_give_whole_steps_back_exactly(kind: str, dtype: torch.dtype) -> None:
    """t/1000 in float32 and back is a little off, and a little below a step of the schedule is a rank less."""
    steps = torch.arange(0, 1001)
    share = steps.to(dtype) / 1000
    handed = {"fraction": share, "reversed": 1 - share, "reversed steps": 1000 - steps.to(dtype)}[TIMESTEP_UNITS[kind]]
    assert torch.equal(read_timestep(called(kind), (X, handed), {}, 1000), steps.double())


def test_every_unit_is_of_a_class_that_diffusers_has() -> None:
    import diffusers

    assert set(TIMESTEP_UNITS) <= set(dir(diffusers))


DIVIDE_ELSEWHERE = ("LTXVideoTransformer3DModel", "SanaWMTransformer3DModel")
"""Their pipelines do so for the noise on the condition only."""


def test_every_pipeline_that_divides_its_timestep_has_its_denoiser_in_the_table() -> None:
    """From the source of the pipelines that are installed: a new one fails here until somebody has looked at it."""
    folder = Path(importlib.util.find_spec("diffusers").origin).parent / "pipelines"  # type: ignore[union-attr,arg-type]
    divides = re.compile(
        r"timestep=timestep / |timestep = \(1000 - timestep\) / 1000|current_timestep = 1 - "
        r"|\(?\[?\bt(\.float\(\)|\.expand\([^)]*\))? / (1000|self\.scheduler\.config\.num_train_timesteps)|1000 - t\b"
    )
    missing = {}
    for path in folder.rglob("pipeline_*.py"):
        text = path.read_text(encoding="utf-8")
        kind = re.search(r"^ +transformer: (\w+)", text, re.MULTILINE)
        if kind and divides.search(text) and kind[1] not in {*TIMESTEP_UNITS, *DIVIDE_ELSEWHERE}:
            missing[path.name] = kind[1]
    assert missing == {}


@pytest.mark.parametrize("t", [0.5, torch.tensor([0.1, 0.9])])
def test_fractions_for_a_class_that_is_not_listed_are_doubted(t: Any) -> None:
    with pytest.warns(UserWarning, match=r"NewTransformer.*TIMESTEP_UNITS"):
        read_timestep(called("NewTransformer"), (X, t), {}, 1000)


@pytest.mark.parametrize("t", [0, 1.0, 0.0, 500.5, torch.tensor([0.5, 500.0])])
def test_steps_are_not_doubted(t: Any) -> None:
    read_timestep(called("NewTransformer"), (X, t), {}, 1000)


def compiled(model: nn.Module) -> Any:
    return torch.compile(model, backend="eager")


class Wrapper(nn.Module):
    """As data-parallel wrappers are: any arguments, the model as `module`."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


@pytest.mark.parametrize("wrap", [compiled, Wrapper, lambda model: Wrapper(compiled(model))])
def test_wrapped_models_are_looked_into(wrap: Any) -> None:
    model = wrap(called("FluxTransformer2DModel"))
    assert takes_timestep(model)
    assert read_timestep(model, (X, torch.tensor([0.25])), {}, 1000).tolist() == [250.0]
    assert not takes_timestep(wrap(nn.Linear(2, 2)))


def test_a_file_has_the_schedule_that_its_adapters_have(tmp_path: Path) -> None:
    model, file = nn.Sequential(nn.Linear(8, 8)), tmp_path / "a.safetensors"
    schedule = RankSchedule(max_rank=4, min_rank=2, alpha=0.5, steps=500)
    adapters = AdapterSet.build(model, plan(model, Rule(TLoRA(rank=4))))
    adapters.schedule = schedule
    write(adapters.bundle(), file)
    loaded = AdapterSet.load(model, read(file, model))
    assert loaded.schedule == schedule
    loaded.schedule = None
    write(loaded.bundle(), file)
    assert AdapterSet.load(model, read(file, model)).schedule is None


def test_a_schedule_in_a_header_that_is_none(tmp_path: Path) -> None:
    model, file = nn.Sequential(nn.Linear(8, 8)), tmp_path / "a.safetensors"
    adapters = AdapterSet.build(model, plan(model, Rule(TLoRA(rank=4))))
    for value in ("{", "[]", '{"max_rank": 4}', '{"max_rank": "x", "min_rank": 1, "alpha": 1, "steps": 9}'):
        write(adapters.bundle(), file, metadata={"lycoris_schedule": value})
        with pytest.raises(FileError, match="lycoris_schedule is no schedule of ranks"):
            AdapterSet.load(model, read(file, model))
