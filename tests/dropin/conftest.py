"""What the drop-in keeps for the whole process is put back after every test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from lycoris import LycorisNetwork, clear_timestep_mask


@pytest.fixture(autouse=True)
def _as_in_a_fresh_process() -> Iterator[None]:
    yield
    LycorisNetwork._preset = None
    clear_timestep_mask()
