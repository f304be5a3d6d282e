"""Settings that train on a tiny pipeline, and a console to read."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from lycoris.training.settings import Settings, load_settings
from training_runs import save_images, small_run


@pytest.fixture
def base(tiny_base: Path) -> Path:
    return tiny_base


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return save_images(tmp_path / "images")


@pytest.fixture
def config(base: Path, images: Path, tmp_path: Path) -> Callable[..., Path]:
    """Write config.json and lycoris_config.json; `lycoris` and keywords change them."""

    def write(lycoris: dict[str, Any] | None = None, **changes: Any) -> Path:
        (tmp_path / "config.json").write_text(json.dumps(small_run(base, tmp_path, lycoris, **changes)))
        return tmp_path / "config.json"

    return write


@pytest.fixture
def settings(config: Callable[..., Path]) -> Callable[..., Settings]:
    return lambda *args, **changes: load_settings(config(*args, **changes))


@pytest.fixture
def console() -> Console:
    """A console whose text is `console.file.getvalue()`."""
    return Console(file=io.StringIO(), width=200)
