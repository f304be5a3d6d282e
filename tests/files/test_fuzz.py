"""Thousands of broken files: each is read or refused with the library's own error, in little memory, by a live process.

The files are read in a process of its own: a crash or a hang is told from a refusal there, its address space is
limited to a little more than good files take, and the growth of its resident memory is measured.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent.parent
QUICK = {"structure": 150, "bytes": 150, "zips": 60, "legacy": 60, "adapters": 60}
LONG = {"structure": 12000, "bytes": 8000, "zips": 3000, "legacy": 3000, "adapters": 3000}
GROWN = 64 * 2**20
"""Bytes that a batch of files of a few thousand bytes each may add to the process."""

LONGEST = 4000

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memory is limited and measured as Linux does it")


def batch(asked: dict[str, int], seconds: int) -> dict[str, Any]:
    here = os.pathsep.join([str(ROOT / "src"), str(ROOT / "tests")])
    script = str(Path(__file__).parent / "batch.py")
    done = subprocess.run(
        [sys.executable, script, *(f"{kind}={count}" for kind, count in asked.items())],
        env=os.environ | {"PYTHONPATH": here},
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def quick() -> dict[str, Any]:
    return batch(QUICK, 300)


def check(kind: str, count: int, told: dict[str, Any]) -> None:
    assert not told["wrong"], "\n".join(told["wrong"][:20])
    assert told["read"] + told["refused"] >= count
    assert told["refused"] > count // 2
    assert told["read"] > 0
    assert told["grown"] < GROWN
    # Of characters in an error: names of keys may have any length.
    assert told["longest"] < LONGEST


@pytest.mark.parametrize("kind", QUICK)
def test_broken_files_are_read_or_refused(kind: str, quick: dict[str, Any]) -> None:
    check(kind, QUICK[kind], quick[kind])


@pytest.mark.slow
def test_ten_times_as_many() -> None:
    for kind, told in batch(LONG, 3000).items():
        check(kind, LONG[kind], told)
