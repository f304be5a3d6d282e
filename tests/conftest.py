"""Shared by all tests: one thread, fixed random numbers, and patience with a busy machine."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

import covering
from interpreters import WarmInterpreter

torch.set_num_threads(1)
# The first draw of a process reads the source for constants, and a busy machine is slow at any draw.
settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy")


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random pipeline for 32-pixel images, as `save_pretrained` writes it."""
    from training_runs import save_base

    return save_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="session")
def interpreter() -> Iterator[WarmInterpreter]:
    """Runs code in processes of their own that have the heavy libraries loaded."""
    warm = WarmInterpreter()
    yield warm
    warm.close()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    # torch.manual_seed formats the stack for each kind of device that is not there: it took longer than most tests.
    torch.default_generator.manual_seed(0)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(0)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Before `-m` looks at the marks."""
    covering.mark_slow(items)


def pytest_collection_finish() -> None:
    """Spare the garbage collector what stays to the end: the libraries, and tens of thousands of tests."""
    gc.collect()
    gc.freeze()
