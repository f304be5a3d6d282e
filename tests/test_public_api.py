"""What users may import, and what importing it costs."""

from __future__ import annotations

import subprocess
import sys

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
    "Rule",
    "TLoRA",
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
