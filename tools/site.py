"""Pages of the documentation site that are written from the code: settings, options, commands, the Python API.

`make docs` calls this through `tools/site_hooks.py`; nothing here needs mkdocs.
"""

from __future__ import annotations

import ast
import inspect
import json
import re
import textwrap
import types
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, get_args, get_origin

import annotated_types
from typer.main import get_command

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
RESULTS = ROOT / "benchmarks" / "results" / "amd-epyc-2-cores"
REPOSITORY = "https://github.com/KohakuBlueleaf/LyCORIS/blob/main/"

OPTION_TEXTS: Mapping[str, str] = {
    "dora_wd": "Train a magnitude per row on top of the algorithm: [DoRA](../algorithms/dora.md).",
    "weight_decompose": "Another name for `dora_wd`.",
    "wd_on_output": "With `dora_wd`: one magnitude per output row (`true`) or per input column (`false`).",
    "wd_on_out": "Another name for `wd_on_output`.",
    "tlora_min_rank": "Ranks that are active at the noisiest timestep; see [T-LoRA schedules](../tlora.md).",
    "tlora_alpha": "Exponent of the rank schedule; see [T-LoRA schedules](../tlora.md).",
    "bypass_mode": "Accepted for compatibility; has no effect, because every path is exact.",
    "train_norm": "Also train scale and shift of the norms that the targets match.",
    "train_llm_adapter": "Only for `lycoris.kohya`: also adapt Anima's language adapter. Elsewhere it must be false.",
    "mask_group_id": "Groups of timestep masks. Not implemented: leave it out or set it to 0.",
}
"""Texts for options that are not fields of one algorithm; the others are described by the field's docstring."""

TOP_TEXTS: Mapping[str, str] = {
    "algo": "Algorithm of every target that does not name another one.",
    "multiplier": "Strength at which the adapter is trained and loaded.",
    "linear_dim": "Rank on linear layers and 1x1 convolutions. For `lokr`, any rank of at least half the larger side "
    "of a factor, such as 10000, stores that factor as a full matrix; for `diag-oft` and `boft` it selects the block "
    "size.",
    "linear_alpha": "ΔW is multiplied by alpha / rank. `null` means alpha equals the rank.",
    "conv_dim": "Rank on convolutions with a kernel larger than 1; `null` means `linear_dim`.",
    "conv_alpha": "Alpha on those convolutions; `null` means `linear_alpha`.",
    "apply_preset": "Which layers are adapted: an object with the preset keys below.",
    "preset": "Name of a built-in preset, or path of a TOML or JSON file with preset keys.",
    "unserved": "`error`: a target layer that its algorithm cannot serve is an error. `skip`: it is left out and "
    "listed in the plan.",
}

PRESET_TEXTS: Mapping[str, str] = {
    "unet_target_name": "For `lycoris.kohya`: patterns for layer paths of the denoiser.",
    "text_encoder_target_module": "For `lycoris.kohya`: class names in the text encoders.",
    "text_encoder_target_name": "For `lycoris.kohya`: patterns for layer paths of the text encoders.",
}
"""Texts for preset keys that share the docstring of the one before them."""

DEFAULTS: Mapping[str, str] = {
    "algo": "default `lora`",
    "multiplier": "default `1.0`",
    "linear_dim": "default `4`",
    "linear_alpha": "default `1.0`",
    "unserved": "default `error`",
}

TYPES: Mapping[type, str] = {bool: "true or false", int: "integer", float: "number", str: "text", Path: "path"}


def config_page() -> str:
    """Every key of the trainer's config.json, in the order of its settings class."""
    from lycoris.training.settings import Settings

    intro = (
        "Every key that `lycoris train` reads, generated from the settings class. `lycoris train --list-settings` "
        "prints the same list. Names and meanings follow SimpleTuner where it has the option; its other keys are "
        "[translated or reported](../guides/images.md#configs-of-simpletuner). Relative paths are relative to the file."
    )
    parts = ["# config.json", "", intro]
    for name, entry in Settings.model_fields.items():
        default = "required" if entry.is_required() else f"default `{json.dumps(entry.get_default(), default=str)}`"
        values = _values(entry.annotation, entry.metadata)
        parts += _entry(name, [default, values], entry.description)
    return "\n".join([*parts, ""])


def lycoris_config_page() -> str:
    """Every key of lycoris_config.json: the top level, options by algorithm, presets, and settings of one target."""
    from lycoris.targeting.options import ALGORITHMS, OPTIONS, OVERRIDE, TOP
    from lycoris.targeting.preset import PRESETS_WITH_CONV, Preset

    names = [name for name, _ in ALGORITHMS]
    intro = (
        "Every key of the adapter's config, generated from the tables that read it. The same keys are accepted by "
        "`create_lycoris(...)` and by SimpleTuner; [the two interfaces](../interface.md#lycoris_configjson) has "
        "examples and explains how targets are matched. Values may be strings. An unknown key is an error here, with "
        "the nearest known name."
    )
    parts = ["# lycoris_config.json", "", intro, "", "## Top level"]
    for key in TOP:
        parts += _entry(key, [DEFAULTS[key]] if key in DEFAULTS else [], TOP_TEXTS[key])
    known = ", ".join(f"`{name}`" for name in names)
    parts += ["", f"`algo` is one of {known}. `lora` and `locon` are the same algorithm.", "", "## Options", ""]
    parts += [
        "On the top level, or for one target. An option that the algorithm does not have is reported and ignored."
    ]
    for key, each in OPTIONS.items():
        facts = [TYPES[each.kind], _algorithms(each.algorithms, names)]
        native = [f"`{each.field}` in Python"] if each.field not in (None, key) else []
        parts += _entry(key, [*facts, *native], _option_text(key, each))
    parts += ["", "## Presets", "", "The keys of `apply_preset`, and of a preset's file."]
    for key, text in field_texts(Preset).items():
        parts += _entry(key, [], text or PRESET_TEXTS[key])
    parts += ["", "Built-in presets: " + ", ".join(f"`{name}`" for name in PRESETS_WITH_CONV) + "."]
    override = ", ".join(f"`{key}`" for key in OVERRIDE)
    parts += ["", "## Settings of one target", ""]
    parts += [
        f"The values of `module_algo_map` and `name_algo_map` are objects with any of the options above and {override}."
        " `dim` and `alpha` apply to linear layers and convolutions alike."
    ]
    return "\n".join([*parts, ""])


def _entry(name: str, facts: list[str], text: str | None) -> list[str]:
    """A key with its facts in one line and its meaning below."""
    line = ["*" + " · ".join(facts) + "*", ""] if facts else []
    return ["", f"### `{name}`", "", *line, _plain(text)]


def commands_page() -> str:
    """Every command, argument and option of the command line."""
    from lycoris.cli import app

    group: Any = get_command(app)
    parts = [
        "# Command line",
        "",
        "Generated from the commands themselves. `lycoris COMMAND --help` prints the same. Commands exit with 0 on "
        "success, with 2 on an error that is yours to fix, and `check` with 1 when a program reads the file "
        "differently. An existing file is not overwritten without `--force`, and an input file never is.",
    ]
    for name, command in group.commands.items():
        usage = " ".join(["lycoris", name, *(each.metavar or each.name.upper() for each in _arguments(command))])
        parts += ["", f"## lycoris {name}", "", _plain(command.help), "", "```text", f"{usage} [OPTIONS]", "```", ""]
        parts += ["| option | meaning |", "|---|---|"]
        parts += [f"| {_option_names(each)} | {_option_help(each)} |" for each in _options(command)]
    return "\n".join([*parts, ""])


def _arguments(command: Any) -> list[Any]:
    return [each for each in command.params if each.param_type_name == "argument"]


def _options(command: Any) -> list[Any]:
    return [each for each in command.params if each.param_type_name == "option" and each.name != "help"]


def _option_names(option: Any) -> str:
    return ", ".join(f"`{name}`" for name in (*option.opts, *option.secondary_opts))


def _option_help(option: Any) -> str:
    default, text = option.default, _cell(option.help)
    shown = (
        "" if callable(default) or default in (None, False, (), []) or option.required else f" Default: `{default}`."
    )
    needed = " Required." if option.required else ""
    return text + needed + shown


def field_texts(owner: type) -> dict[str, str]:
    """The docstrings under the fields of a class and of the classes that it is derived from."""
    found: dict[str, str] = {}
    for each in reversed(owner.__mro__):
        if not each.__module__.startswith("lycoris"):
            continue
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(each))).body
        assert isinstance(tree, ast.ClassDef)
        for node, after in zip(tree.body, [*tree.body[1:], None], strict=True):
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                text = (
                    after.value.value if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) else ""
                )
                if "ClassVar" not in ast.unparse(node.annotation):
                    found[node.target.id] = str(text) or found.get(node.target.id, "")
    return found


def _option_text(key: str, option: Any) -> str:
    from lycoris.targeting.options import algorithm_class

    if key in OPTION_TEXTS:
        return OPTION_TEXTS[key]
    texts = (field_texts(algorithm_class(name)).get(option.field, "") for name in option.algorithms)
    return next((text for text in texts if text), "")


def _algorithms(having: tuple[str, ...], names: list[str]) -> str:
    return "all algorithms" if set(having) == set(names) else ", ".join(having)


def _values(annotation: Any, metadata: Any = ()) -> str:
    """What a setting accepts, in words."""
    if get_origin(annotation) is types.UnionType:
        return " or ".join(_values(each) for each in get_args(annotation) if each is not type(None)) + ", or null"
    if hasattr(annotation, "__metadata__"):
        return _values(annotation.__origin__, annotation.__metadata__)
    if annotation in TYPES:
        return ", ".join([TYPES[annotation], *_bounds(metadata)])
    if get_origin(annotation) is tuple:
        return "list of text"
    return ", ".join(f"`{each}`" for each in get_args(annotation))


def _bounds(metadata: Any) -> Iterator[str]:
    signs = {annotated_types.Ge: "≥", annotated_types.Gt: ">", annotated_types.Le: "≤", annotated_types.Lt: "<"}
    for each in metadata:
        for inner in (each, *getattr(each, "metadata", ())):
            for kind, sign in signs.items():
                if isinstance(inner, kind):
                    limit = getattr(inner, kind.__name__.lower())
                    yield f"{sign} {'2⁶³' if limit == 2**63 else limit}"
            if isinstance(inner, annotated_types.MultipleOf):
                yield f"multiple of {inner.multiple_of}"


def _cell(text: str | None) -> str:
    return " ".join((text or "").split()).replace("|", "\\|")


def _plain(text: str | None) -> str:
    return " ".join((text or "").split())


# -- the Python API ----------------------------------------------------------------------------------------------------

FIRST: tuple[tuple[str, str, str], ...] = (
    ("adapters", "Adapters", "Plan, build, attach, merge, read, write and check adapters."),
    (
        "algorithms",
        "Algorithms",
        "What can be put on a layer. Formulas and file layouts: [Algorithms](../../algorithms.md).",
    ),
    ("drop-in", "Drop-in interface", "What trainers and scripts for lycoris-lora import."),
    ("errors", "Errors", "Every error that the library raises on purpose is a `LycorisError`."),
)
"""Pages for `lycoris.__all__`: file, title, what is on it."""


def api_pages() -> dict[str, str]:
    """A page for each group of public names, with what mkdocstrings fills in."""
    import lycoris

    groups: dict[str, list[str]] = {file: [] for file, _, _ in FIRST}
    for name in lycoris.__all__:
        if name != "__version__":
            groups[_group(getattr(lycoris, name))].append(name)
    pages = {
        file: _api_page(title, text, {f"lycoris.{name}": _home("lycoris", name) for name in groups[file]})
        for file, title, text in FIRST
    }
    for module, names in fronts().items():
        text = _first_line(module)
        pages[module.removeprefix("lycoris.")] = _api_page(
            module.removeprefix("lycoris."), text, {f"{module}.{n}": _home(module, n) for n in names}
        )
    titles = {file: title for file, title, _ in FIRST}
    rows = [f"- [{titles.get(name, f'lycoris.{name}')}]({name}.md)" for name in pages]
    intro = (
        "Generated from the docstrings. What `lycoris` itself exports is on the first four pages; it is imported as "
        "`from lycoris import AdapterSet`. The others are the public modules. Everything else is internal."
    )
    return {"index": "\n".join(["# Python API", "", intro, "", *rows, ""]), **pages}


def fronts() -> dict[str, list[str]]:
    """The public modules below `lycoris` with the names that they export."""
    found = {}
    source = ROOT / "src" / "lycoris"
    for path in sorted(source.glob("*/__init__.py")):
        name = f"lycoris.{path.parent.name}"
        exported = _exported(path)
        if exported and path.parent.name not in ("functional", "kernels", "modules", "utils", "algorithms"):
            found[name] = exported
    for path in sorted((source / "integrations").glob("[a-z]*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        kinds = (ast.FunctionDef, ast.ClassDef)
        found[f"lycoris.integrations.{path.stem}"] = [
            node.name for node in tree.body if isinstance(node, kinds) and not node.name.startswith("_")
        ]
    return found


def _exported(path: Path) -> list[str]:
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return list(ast.literal_eval(node.value))
    return []


def _group(value: Any) -> str:
    from lycoris.algorithms.base import Algorithm

    if inspect.isclass(value) and issubclass(value, Exception):
        return "errors"
    if inspect.isclass(value) and issubclass(value, Algorithm):
        return "algorithms"
    return "drop-in" if value.__module__.startswith("lycoris.compat") else "adapters"


def _home(module: str, name: str) -> str:
    """Where a public name is defined, which is where its docstring is. Read off the imports, without importing."""
    for node in ast.walk(_tree(module)):
        if isinstance(node, ast.ImportFrom) and name in [alias.asname or alias.name for alias in node.names]:
            assert node.module is not None
            return _home(node.module, next(each.name for each in node.names if (each.asname or each.name) == name))
    return f"{module}.{name}"


def _tree(module: str) -> ast.Module:
    path = ROOT / "src" / module.replace(".", "/")
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return ast.parse(path.read_text(encoding="utf-8"))


def _first_line(module: str) -> str:
    return (ast.get_docstring(_tree(module)) or "").splitlines()[0]


def _api_page(title: str, text: str, names: Mapping[str, str]) -> str:
    parts = [f"# {title}", "", text]
    for shown, home in names.items():
        parts += [
            "",
            f"::: {home}",
            "    options:",
            f'      heading: "{shown}"',
            f'      toc_label: "{shown.rpartition(".")[2]}"',
        ]
    return "\n".join([*parts, ""])


# -- pages that are files of the repository ----------------------------------------------------------------------------


def from_repository(path: str) -> str:
    """A Markdown file from outside docs/, its links rewritten for the site: into docs/, or to the repository."""

    def replace(found: re.Match[str]) -> str:
        text, target = found[1], found[2]
        if re.match(r"[a-z]+:|#", target):
            return found[0]
        inside = target.removeprefix("docs/")
        return f"[{text}]({inside})" if inside != target else f"[{text}]({REPOSITORY}{target})"

    return re.sub(r"\[([^\]]*)\]\(([^)]+)\)", replace, (ROOT / path).read_text(encoding="utf-8"))


def results_page() -> str:
    """The tables of the benchmark that the documents quote."""
    text = (RESULTS / "headline.md").read_text(encoding="utf-8")
    hardware, rest = text.split("\n", 1)
    return f"# Benchmark results\n\n{hardware}\n\n[How it is measured](benchmarks.md).\n{rest}"


PAGES: Mapping[str, Callable[[], str]] = {
    "reference/config.md": config_page,
    "reference/lycoris-config.md": lycoris_config_page,
    "reference/commands.md": commands_page,
    "contributing.md": lambda: from_repository("CONTRIBUTING.md"),
    "security.md": lambda: from_repository("SECURITY.md"),
    "changelog.md": lambda: from_repository("CHANGELOG.md"),
    "benchmark-results.md": results_page,
}
"""Page → what writes it; those of the API are beside them."""


def pages() -> dict[str, str]:
    """Every generated page by its path in docs/."""
    found = {path: write() for path, write in PAGES.items()}
    return found | {f"reference/api/{name}.md": text for name, text in api_pages().items()}
