"""Fixtures of the integrations' tests."""

from __future__ import annotations

from typing import Any

import pytest
from stock_pipelines import PIPELINES


@pytest.fixture(scope="session")
def made() -> dict[str, Any]:
    """Pipelines by name, each made once."""
    return {}


@pytest.fixture(params=PIPELINES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param
