"""What users may import, and what importing it costs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

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
HEAVY = ("accelerate", "diffusers", "matplotlib", "peft", "PIL", "tensorboard", "transformers", "typer")


def test_the_public_names_are_these() -> None:
    assert sorted(lycoris.__all__) == sorted(NAMES)
    assert all(getattr(lycoris, name) is not None for name in NAMES)


def test_everything_public_is_documented() -> None:
    for name in NAMES:
        if name != "__version__":
            assert getattr(lycoris, name).__doc__, name


def test_importing_it_brings_nothing_heavy() -> None:
    code = (
        "import sys, lycoris; [getattr(lycoris, name) for name in lycoris.__all__]; "
        f"print([name for name in {HEAVY} if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_importing_it_leaves_the_interfaces_of_old_clients_aside() -> None:
    code = (
        "import sys, lycoris; [getattr(lycoris, name) for name in lycoris.__all__]; "
        "print([name for name in sys.modules if name.startswith('lycoris.') and 'kohya' in name])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    # The file dialect of that name is one of the formats that are always there.
    assert found.stdout.strip() == "['lycoris.files.dialects.kohya']"


def test_importing_it_does_not_import_torch() -> None:
    code = (
        "import sys, lycoris; assert 'torch' not in sys.modules, 'torch'\n"
        "from lycoris import explain\n"
        "assert callable(explain) and lycoris.explain is explain\n"
        "from lycoris import *\n"
        "import pickle; assert pickle.loads(pickle.dumps(LoRA(rank=2))) == LoRA(rank=2)\n"
        "assert set(lycoris.__all__) <= set(dir(lycoris)); assert lycoris.files.DIALECTS\n"
        "assert not hasattr(lycoris, 'nonsense')"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr


def test_the_version_is_that_of_the_package() -> None:
    text = (Path(__file__).parent.parent / "pyproject.toml").read_text(encoding="utf-8")
    assert f'version = "{lycoris.__version__}"' in text
