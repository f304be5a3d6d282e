"""Every Python snippet in the documents runs, and every command in them is one that exists."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lycoris.targeting.recipe import Recipe

ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), ROOT / "examples" / "emoji" / "README.md"])
FENCE = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"^(?:    |\$ )?(lycoris [a-z]+|make [a-z-]+)", re.MULTILINE)


def blocks(page: Path, language: str) -> list[str]:
    return [text for kind, text in FENCE.findall(page.read_text()) if kind == language]


@pytest.mark.filterwarnings("ignore:::transformers")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_python_snippets_run(page: Path, tmp_path: Path) -> None:
    """One after the other, as a reader would type them, from the root of a checkout."""
    code = "\n".join(blocks(page, "python"))
    if not code:
        return
    (tmp_path / "src").symlink_to(ROOT / "src")
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_json_snippets_are_configs_that_parse(page: Path) -> None:
    for text in blocks(page, "json"):
        config = json.loads(text)
        if "algo" in config:
            Recipe.parse(config)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_exist(page: Path) -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for command in COMMAND.findall(page.read_text()):
        program, word = command.split()
        if program == "make":
            assert word in targets
        else:
            run = subprocess.run([sys.executable, "-m", "lycoris", word, "--help"], capture_output=True, check=False)
            assert run.returncode == 0, f"{command} --help"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target
