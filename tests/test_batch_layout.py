"""Masks that differ from sample to sample reach the right samples, or it is said that this cannot be known."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from cases import One, adapt, relative
from lycoris import AdapterSet, ConfigError, LoRA, RankSchedule, TLoRA, create_lycoris, set_timestep_mask
from lycoris.compat.timestep_masks import clear_timestep_mask

TIMES = torch.tensor([900, 100, 500])
SAMPLES = len(TIMES)


def made(layer: nn.Module) -> tuple[One, AdapterSet]:
    torch.manual_seed(0)
    model = One(copy.deepcopy(layer).double())
    adapters = adapt(model, TLoRA(rank=4))
    adapters.schedule = RankSchedule(max_rank=4, min_rank=0)
    return model, adapters


def one_by_one(model: One, adapters: AdapterSet, entries: list[tuple[int, Tensor]]) -> list[Tensor]:
    """What each sample's entries give under that sample's timestep alone."""
    found = []
    for sample, x in entries:
        adapters.set_timesteps(TIMES[sample])
        found.append(model(x))
    return found


class Case:
    """An input, the layout that says where its samples are, and how to take it apart."""

    def __init__(self, x: Tensor, layout: object, axis: int, owner: list[int]) -> None:
        self.x, self.layout, self.axis, self.owner = x, layout, axis, owner

    def check(self, layer: nn.Module) -> None:
        model, adapters = made(layer)
        adapters.rank_masks.batch_layout = self.layout  # type: ignore[assignment]
        adapters.set_timesteps(TIMES)
        together = model(self.x)
        parts = [(sample, self.x.narrow(self.axis, at, 1)) for at, sample in enumerate(self.owner)]
        apart = torch.cat(one_by_one(model, adapters, parts), dim=self.axis)
        assert relative(together, apart) < 1e-12
        adapters.set_timesteps(None)
        assert relative(together, model(self.x)) > 1e-3


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


PACKED = [0, 0, 0, 1, 2, 2, 0]
LINEAR = {
    "batch first": Case(normal(3, 5, 8), None, 0, [0, 1, 2]),
    "vectors": Case(normal(3, 8), None, 0, [0, 1, 2]),
    "pixels last": Case(normal(3, 4, 4, 8), None, 0, [0, 1, 2]),
    "said to be first": Case(normal(3, 3, 8), "first", 0, [0, 1, 2]),
    "sequence first": Case(normal(5, 3, 8), "second", 1, [0, 1, 2]),
    "sequence first, as long as the batch": Case(normal(3, 3, 8), "second", 1, [0, 1, 2]),
    "sequence first, a multiple of the batch": Case(normal(6, 3, 8), "second", 1, [0, 1, 2]),
    "frames in the batch": Case(normal(6, 5, 8), "repeated", 0, [0, 0, 1, 1, 2, 2]),
    "[uncond, cond]": Case(normal(6, 5, 8), "tiled", 0, [0, 1, 2, 0, 1, 2]),
    "packed": Case(normal(7, 8), torch.tensor(PACKED), 0, PACKED),
    "packed, with a batch axis": Case(normal(1, 7, 8), torch.tensor(PACKED), 1, PACKED),
}
CONV = {
    "batch": Case(normal(3, 8, 4, 4), None, 0, [0, 1, 2]),
    "frames in the batch": Case(normal(6, 8, 4, 4), "repeated", 0, [0, 0, 1, 1, 2, 2]),
    "[uncond, cond]": Case(normal(6, 8, 4, 4), "tiled", 0, [0, 1, 2, 0, 1, 2]),
}


@pytest.mark.parametrize("name", LINEAR)
def test_linear_layers(name: str) -> None:
    LINEAR[name].check(nn.Linear(8, 6))


@pytest.mark.parametrize("name", CONV)
def test_convolutions(name: str) -> None:
    CONV[name].check(nn.Conv2d(8, 6, 3, padding=1))


UNKNOWN = {
    "sequence first": (nn.Linear(8, 6), (5, 3, 8)),
    "sequence first, a multiple of the batch": (nn.Linear(8, 6), (6, 3, 8)),
    "either axis": (nn.Linear(8, 6), (3, 3, 8)),
    "a multiple of the batch": (nn.Linear(8, 6), (6, 5, 8)),
    "packed": (nn.Linear(8, 6), (1, 9, 8)),
    "one vector": (nn.Linear(8, 6), (8,)),
    "frames or [uncond, cond]": (nn.Conv2d(8, 6, 3), (6, 8, 4, 4)),
    "a convolution without a batch": (nn.Conv2d(3, 6, 3), (3, 4, 4)),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_cannot_be_known_is_refused_with_a_way_to_say_it(name: str) -> None:
    layer, shape = UNKNOWN[name]
    model, adapters = made(layer)
    adapters.set_timesteps(TIMES)
    with pytest.raises(ConfigError, match=r"for 3 samples.*batch_layout.*'first'.*'second'.*'repeated'.*'tiled'"):
        model(normal(*shape))


@pytest.mark.parametrize("name", UNKNOWN)
def test_samples_with_the_same_mask_fit_anything(name: str) -> None:
    layer, shape = UNKNOWN[name]
    model, adapters = made(layer)
    x = normal(*shape)
    adapters.set_timesteps(torch.tensor([500, 500, 500]))
    together = model(x)
    adapters.set_timesteps(torch.tensor(500))
    assert torch.equal(together, model(x))


@pytest.mark.parametrize("layout", ["first", "second", "repeated", "tiled", torch.tensor([0, 1])])
def test_an_input_that_does_not_fit_what_was_said_is_refused(layout: object) -> None:
    model, adapters = made(nn.Linear(8, 6))
    adapters.rank_masks.batch_layout = layout  # type: ignore[assignment]
    adapters.set_timesteps(TIMES)
    with pytest.raises(ConfigError, match="do not fit an input"):
        model(normal(7, 5, 8))


def test_layouts_by_layer() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).double()
    adapters = adapt(model, TLoRA(rank=4))
    adapters.schedule = RankSchedule(max_rank=4, min_rank=0)
    adapters.rank_masks.batch_layout = {"0": "repeated", "*": "tiled"}
    adapters.set_timesteps(TIMES)
    x = normal(6, 8)
    together = model(x)
    for at, (first, second) in enumerate(zip([0, 0, 1, 1, 2, 2], [0, 1, 2, 0, 1, 2], strict=True)):
        adapters.set_timesteps(TIMES[first])
        h = model[0](x[at])
        adapters.set_timesteps(TIMES[second])
        assert relative(together[at], model[1](h)) < 1e-12


@pytest.mark.parametrize(
    ("layout", "message"),
    [("fist", "did you mean 'first'"), (torch.zeros(2), "batch layout"), ({"9": "first"}, "layer with adapters '9'")],
)
def test_wrong_layouts(layout: object, message: str) -> None:
    _, adapters = made(nn.Linear(8, 6))
    with pytest.raises(ConfigError, match=message):
        adapters.rank_masks.batch_layout = layout  # type: ignore[assignment]


def test_masks_for_the_whole_process_take_it_too() -> None:
    model = nn.Sequential(nn.Linear(8, 6))
    network = create_lycoris(model, 1.0, linear_dim=4, linear_alpha=4, algo="tlora")
    network.apply_to()
    try:
        set_timestep_mask(torch.eye(4)[:2])
        with pytest.raises(ConfigError, match="batch_layout"):
            model(torch.randn(4, 5, 8))
        network.adapters.rank_masks.batch_layout = "tiled"
        model(torch.randn(4, 5, 8))
    finally:
        clear_timestep_mask()
        network.restore()


@pytest.mark.slow
def test_compiled_and_set_later() -> None:
    model, adapters = made(nn.Linear(8, 6))
    x = normal(6, 5, 8)
    adapters.set_timesteps(TIMES)
    adapters.rank_masks.batch_layout = "tiled"
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert relative(compiled(x), model(x)) < 1e-12
    adapters.rank_masks.batch_layout = "repeated"
    assert relative(compiled(x), model(x)) < 1e-12
    torch._dynamo.reset()


def test_other_algorithms_do_not_care() -> None:
    model = One(nn.Linear(8, 6).double())
    adapters = adapt(model, LoRA(rank=4))
    adapters.schedule = RankSchedule(max_rank=4)
    x = normal(5, 3, 8)
    before = model(x)
    adapters.set_timesteps(TIMES)
    assert torch.equal(model(x), before)
