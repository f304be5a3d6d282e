"""What users may import, and what importing it costs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import lycoris

NAMES = [
    "BOFT",
    "IA3",
    "OFT",
    "AdapterSet",
    "AttachError",
    "Bundle",
    "ConfigError",
    "DoRA",
    "DyLoRA",
    "Explanation",
    "FileError",
    "Full",
    "GLoRA",
    "LoHa",
    "LoKr",
    "LoRA",
    "LycorisError",
    "LycorisNetwork",
    "Norm",
    "NotFiniteError",
    "Plan",
    "PlanError",
    "RankSchedule",
    "Replace",
    "Rule",
    "TLoRA",
    "Verification",
    "__version__",
    "clear_timestep_mask",
    "compute_timestep_mask",
    "create_lycoris",
    "create_lycoris_from_weights",
    "explain",
    "get_timestep_mask",
    "plan",
    "read",
    "set_timestep_mask",
    "verify",
    "watch_finite",
    "write",
]
HEAVY = (
    "accelerate",
    "diffusers",
    "matplotlib",
    "peft",
    "PIL",
    "tensorboard",
    "torch._dynamo",
    "transformers",
    "typer",
)


def test_the_public_names_are_these() -> None:
    assert sorted(lycoris.__all__) == sorted(NAMES)
    assert all(getattr(lycoris, name) is not None for name in NAMES)


def test_everything_public_is_documented() -> None:
    for name in NAMES:
        if name != "__version__":
            assert getattr(lycoris, name).__doc__, name


IMPORT = """
import json, pickle, sys
import lycoris

at_first = [*sys.modules]
from lycoris import explain
assert callable(explain) and lycoris.explain is explain
from lycoris import *
assert pickle.loads(pickle.dumps(LoRA(rank=2))) == LoRA(rank=2)
assert set(lycoris.__all__) <= set(dir(lycoris)); assert lycoris.files.DIALECTS
assert not hasattr(lycoris, "nonsense")
[getattr(lycoris, name) for name in lycoris.__all__]
print(json.dumps([at_first, [*sys.modules]]))
"""


@pytest.fixture(scope="module")
def module_names() -> tuple[set[str], set[str]]:
    """The modules that a new interpreter has after `import lycoris`, and after every public name was used."""
    found = subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    at_first, at_last = json.loads(found.stdout)
    return set(at_first), set(at_last)


def test_importing_it_brings_nothing_heavy(module_names: tuple[set[str], set[str]]) -> None:
    assert not {*HEAVY} & module_names[1]


def test_importing_it_leaves_the_interfaces_of_old_clients_aside(module_names: tuple[set[str], set[str]]) -> None:
    # The file dialect of that name is one of the formats that are always there.
    assert {name for name in module_names[1] if name.startswith("lycoris.") and "kohya" in name} == {
        "lycoris.files.dialects.kohya"
    }


def test_importing_it_does_not_import_torch(module_names: tuple[set[str], set[str]]) -> None:
    assert "lycoris" in module_names[0]
    assert "torch" not in module_names[0]


def test_the_version_is_that_of_the_package() -> None:
    text = (Path(__file__).parent.parent / "pyproject.toml").read_text(encoding="utf-8")
    assert f'version = "{lycoris.__version__}"' in text
