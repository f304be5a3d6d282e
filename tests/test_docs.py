"""Every Python snippet and every command in the documents runs, every link leads somewhere, every picture is there."""

from __future__ import annotations

import json
import os
import re
import shlex
import unicodedata
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from interpreters import WarmInterpreter
from lycoris.cli import app
from lycoris.targeting.options import OPTIONS, TOP
from lycoris.targeting.preset import Preset
from lycoris.targeting.recipe import Recipe
from lycoris.training.settings import Settings
from tools import site

ROOT = Path(__file__).parent.parent
WALK = ROOT / "CONTRIBUTING.md"
"""Adds a file to the library: `test_docs_contributing.py` does that on a copy."""
PAGES = sorted(
    [
        *(ROOT / name for name in ("README.md", "SECURITY.md")),
        WALK,
        *(ROOT / "docs").rglob("*.md"),
        ROOT / "examples" / "emoji" / "README.md",
    ]
)
FENCE = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"^(?:    |\$ )?(lycoris .+|make [a-z-]+)", re.MULTILINE)
LINK = re.compile(r"\]\(([^)]+)\)")
PICTURE_LIMIT = 200_000
SLOW_COMMANDS = ("demo", "train")
"""They run for minutes and have tests of their own; here only their arguments are checked."""


def blocks(page: Path, language: str) -> list[str]:
    return [text for kind, text in FENCE.findall(page.read_text()) if kind == language]


def having(language: str) -> list[Path]:
    return [page for page in PAGES if blocks(page, language)]


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def pages(chosen: list[Path]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("page", chosen, ids=name_of)


DEMO_ADAPTER = """
import json
from diffusers import UNet2DConditionModel
from torch import nn
from lycoris import AdapterSet, write
from lycoris.demo.demo import DEMO_ASSETS
from lycoris.targeting.recipe import Recipe

unet = UNet2DConditionModel.from_pretrained(DEMO_ASSETS / "base" / "unet")
recipe = Recipe.parse(json.loads((DEMO_ASSETS / "lycoris_config.json").read_text()))
adapters = AdapterSet.build(unet, recipe.plan(unet))
for parameter in adapters.parameters():
    nn.init.normal_(parameter, std=0.05)
metadata = {"lycoris_config": json.dumps(recipe.as_dict())}
write(adapters.bundle(), "pytorch_lora_weights.safetensors", metadata=metadata)
"""


@pytest.fixture(scope="session")
def adapter(tmp_path_factory: pytest.TempPathFactory, interpreter: WarmInterpreter) -> Path:
    """A file such as `lycoris demo` writes, without its training."""
    folder = tmp_path_factory.mktemp("demo")
    interpreter.run(DEMO_ADAPTER, folder).check_returncode()
    return folder / "pytorch_lora_weights.safetensors"


@pytest.fixture
def checkout(tmp_path: Path, adapter: Path) -> Path:
    """A folder that looks like a checkout in which the demo has run."""
    (tmp_path / "src").symlink_to(ROOT / "src")
    (tmp_path / "runs" / "demo").mkdir(parents=True)
    (tmp_path / "runs" / "demo" / adapter.name).symlink_to(adapter)
    return tmp_path


@pages([page for page in PAGES if page != WALK and (blocks(page, "python") or blocks(page, "bash"))])
def test_what_a_page_says_runs(
    page: Path, checkout: Path, interpreter: WarmInterpreter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its snippets one after the other, then its blocks of bash, as a reader would type them, from one folder."""
    code = "\n".join(blocks(page, "python"))
    if code:
        run = interpreter.run(code, checkout)
        assert run.returncode == 0, run.stderr
    monkeypatch.chdir(checkout)
    for line in "\n".join(blocks(page, "bash")).splitlines():
        words = shlex.split(line, comments=True)
        if words and words[1] not in SLOW_COMMANDS:
            assert words[0] == "lycoris", line
            result = CliRunner().invoke(app, words[1:])
            fine = (0, 1) if words[1] == "check" else (0,)
            assert result.exit_code in fine, f"{line}\n{result.output}"


@pages(PAGES)
def test_commands_exist(page: Path) -> None:
    """Also those with placeholders in place of files: the command and each of its options."""
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    group = get_command(app)
    for command in COMMAND.findall(page.read_text()):
        program, word, *rest = shlex.split(command.partition("  #")[0].rstrip("\\"), comments=True)
        if program == "make":
            assert word in targets
        elif not word.startswith("-"):
            known = {name for each in group.commands[word].params for name in (*each.opts, *each.secondary_opts)}
            used = {each.partition("=")[0] for each in rest if each.startswith("--")}
            assert used <= known | {"--help"}, f"{command}: no option {used - known}"


@pages(having("json"))
def test_json_snippets_are_configs_that_parse(page: Path) -> None:
    for text in blocks(page, "json"):
        config = json.loads(text)
        if "algo" in config:
            Recipe.parse(config)
        elif "instance_data_dir" in config:
            Settings.parse(config)


@cache
def generate_pages() -> dict[str, str]:
    return site.pages()


@cache
def anchors(page: Path) -> set[str]:
    """Of the headings, as the site's Markdown makes them."""
    inside = page.relative_to(ROOT / "docs").as_posix() if page.is_relative_to(ROOT / "docs") else ""
    text = FENCE.sub("", page.read_text() if page.exists() else generate_pages()[inside])
    return {slug(title) for title in re.findall(r"^#+ (.+)$", text, re.MULTILINE)}


def slug(title: str) -> str:
    title = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title)
    plain = unicodedata.normalize("NFKD", title).encode("ascii", "ignore").decode()
    return re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", plain).strip().lower())


def links(page: Path) -> Iterator[tuple[Path, str]]:
    for target in LINK.findall(FENCE.sub("", page.read_text())):
        path, _, anchor = target.partition("#")
        if not re.match(r"[a-z]+:", target):
            yield Path(os.path.normpath(page.parent / path)) if path else page, anchor


@pages(PAGES)
def test_links_lead_somewhere(page: Path) -> None:
    made = {ROOT / "docs" / path for path in generate_pages()}
    for target, anchor in links(page):
        assert target.exists() or target in made, target
        if anchor and target.suffix == ".md":
            assert anchor in anchors(target), f"{target.name}#{anchor}"


def test_every_page_is_in_the_navigation() -> None:
    listed = set(re.findall(r": ([\w/.-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE))
    own = {str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").rglob("*.md")}
    api = {path for path in generate_pages() if path.startswith("reference/api/")}
    assert listed == own | (set(generate_pages()) - api)


@pytest.mark.parametrize("picture", sorted((ROOT / "docs" / "images").iterdir()), ids=lambda path: path.name)
def test_pictures_are_small_and_used(picture: Path) -> None:
    assert picture.stat().st_size <= PICTURE_LIMIT
    assert any(picture.name in page.read_text() for page in PAGES)


class TestGeneratedPages:
    def test_every_key_of_the_trainer_has_its_meaning(self) -> None:
        self.check_entries("reference/config.md", Settings.model_fields)

    def test_every_key_of_an_adapter_config_has_its_meaning(self) -> None:
        keys = [*TOP, *OPTIONS, *Preset.__dataclass_fields__]
        self.check_entries("reference/lycoris-config.md", keys)

    def check_entries(self, page: str, keys: object) -> None:
        found = re.findall(r"^### `(\w+)`\n\n(?:\*.+\*\n\n)?(.+)$", generate_pages()[page], re.MULTILINE)
        assert [name for name, _ in found] == list(keys)  # type: ignore[call-overload]
        assert all(len(text.split()) > 1 for _, text in found)

    def test_every_command_and_option(self) -> None:
        page = generate_pages()["reference/commands.md"]
        for name, command in get_command(app).commands.items():
            assert f"## lycoris {name}\n" in page
            for option in command.params:
                assert option.param_type_name == "argument" or all(f"`{each}`" in page for each in option.opts)

    def test_every_public_name(self) -> None:
        import lycoris

        api = "\n".join(text for path, text in generate_pages().items() if path.startswith("reference/api/"))
        for name in lycoris.__all__:
            assert name == "__version__" or f'heading: "lycoris.{name}"' in api

    def test_names_are_where_the_page_says(self) -> None:
        """mkdocstrings reads the source without importing it, so a wrong place would be an empty entry."""
        assert site._home("lycoris", "AdapterSet") == "lycoris.adapters.adapter_set.AdapterSet"
