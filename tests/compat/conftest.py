"""A model to work on; what the drop-in keeps for the whole process is put back after every test."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from lycoris import LycorisNetwork, clear_timestep_mask
from lycoris.kohya import LycorisNetworkKohya
from networks import CONFIGS, MyModel
from pipelines import Host


@pytest.fixture(autouse=True)
def _as_in_a_fresh_process() -> Iterator[None]:
    yield
    LycorisNetwork.clear_preset()
    LycorisNetworkKohya.clear_preset()
    logging.getLogger("LyCORIS").setLevel(logging.NOTSET)
    clear_timestep_mask()


@pytest.fixture
def model() -> MyModel:
    """In evaluation mode, where nothing is drawn."""
    return MyModel().double().eval()


@pytest.fixture
def host() -> Host:
    """A denoiser and two text encoders."""
    return Host()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 3, 4, 4, dtype=torch.float64)


@pytest.fixture(params=CONFIGS)
def config(request: pytest.FixtureRequest) -> dict[str, Any]:
    return {"linear_dim": 2, "linear_alpha": 3.0} | CONFIGS[request.param]
