"""The words of the source, as far as a test can hold them: verbs for functions, one name for one thing, docstrings."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from lycoris.algorithms import ALGORITHMS

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "lycoris"
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/**/*.md")])

PARTICIPLES = {
    *(
        "begun",
        "bent",
        "bound",
        "bought",
        "brought",
        "built",
        "chosen",
        "cut",
        "drawn",
        "driven",
        "done",
        "found",
        "given",
        "gone",
        "grown",
        "held",
    ),
    *(
        "hidden",
        "kept",
        "known",
        "laid",
        "left",
        "lent",
        "lost",
        "made",
        "met",
        "paid",
        "put",
        "read",
        "said",
        "seen",
        "sent",
        "set",
    ),
    *(
        "shown",
        "spent",
        "split",
        "spread",
        "stood",
        "taken",
        "told",
        "thought",
        "torn",
        "understood",
        "won",
        "worn",
        "written",
    ),
}
ALSO_VERBS = frozenset({"cut", "put", "read", "set", "split", "spread", "embed", "feed", "need", "seed", "proceed"})
MOST_PARTICIPLES = 0.005
"""Share of functions and methods."""

MOST_SHARED_NAMES = 20
INTERFACES = {
    # Every module that logs has its logger, and every family the same table.
    *("logger", "FAMILY", "ARCHITECTURES", "TRANSFORMER", "UNET"),
    # Fixed by the programs that call them: sd-scripts, Musubi Tuner, and lycoris.functional of 4.1.3.
    *("create_network", "create_network_from_weights", "create_arch_network", "create_arch_network_from_weights"),
    *("merge_weights_to_tensor", "weight_gen", "diff_weight", "bypass_forward_diff"),
}
"""Names that several modules have in common on purpose."""

LEAST_EXPLAINED = 0.7
"""Share of docstrings of public names that say more than fits in a line."""

BRITISH = re.compile(
    r"(?i)(analys(?:e[sd]?|ing)|behaviour|cancelled|catalogue|centre|colour|favour|honour|labell|modell|neighbour"
    r"|(?:factori|general|initiali|normali|optimi|organi|parametri|penali|quanti|recogni|seriali|speciali|summari"
    r"|synchroni|utili|vectori)s(?:e|ing|ation))"
)
NOT_OURS = re.compile(r"bypass_|/|`")


class Name(NamedTuple):
    module: str
    name: str
    node: ast.AST
    public: bool


def names() -> Iterator[Name]:
    """Functions, classes and methods of the source."""
    for path in sorted(SOURCE.rglob("*.py")):
        module = path.relative_to(SOURCE).as_posix()
        yield from _within(ast.parse(path.read_text(encoding="utf-8")), module, True)


def _within(parent: ast.AST, module: str, public: bool) -> Iterator[Name]:
    for node in ast.iter_child_nodes(parent):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            own = public and not node.name.startswith("_")
            yield Name(module, node.name, node, own)
            if isinstance(node, ast.ClassDef):
                yield from _within(node, module, own)


ALL = list(names())


def test_functions_are_not_named_by_a_participle() -> None:
    functions = [each for each in ALL if isinstance(each.node, ast.FunctionDef)]
    found = [f"{each.module}: {each.name}" for each in functions if _is_participle(each.name.strip("_"))]
    assert len(found) <= MOST_PARTICIPLES * len(functions), found


def _is_participle(name: str) -> bool:
    return name not in ALSO_VERBS and (name in PARTICIPLES or bool(re.fullmatch(r"[a-z]{2,}ed", name)))


def test_a_name_is_defined_in_one_module() -> None:
    owners = defaultdict(set)
    for path in SOURCE.rglob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            for name in _list_names(node):
                if name not in INTERFACES and not name.startswith("__"):
                    owners[name].add(path.relative_to(SOURCE).as_posix())
    shared = {name: sorted(paths) for name, paths in owners.items() if len(paths) > 1}
    assert len(shared) <= MOST_SHARED_NAMES, shared


def _list_names(node: ast.stmt) -> list[str]:
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [target.id for target in targets if isinstance(target, ast.Name)]


def test_docstrings_say_what_a_caller_needs() -> None:
    texts = [ast.get_docstring(each.node) for each in ALL if each.public]
    written = [text for text in texts if text is not None]
    assert sum("\n" in text.strip() for text in written) >= LEAST_EXPLAINED * len(written)


@pytest.mark.parametrize("algorithm", ALGORITHMS.values(), ids=lambda algorithm: algorithm.__name__)
def test_every_algorithm_says_its_formula_its_tensors_and_its_source(algorithm: type) -> None:
    text = algorithm.__doc__ or ""
    assert re.search(r"^ {8}\S.* = |^ {4,8}\S.*: .*=|^ {8}V = ", text, re.MULTILINE), "a formula, on lines of its own"
    assert "Tensors:" in text or "LoRA" in text.split("\n")[0], "which tensors it has, with their shapes"
    own = {"full", "norm", "replace"}
    assert algorithm.name in own or "arXiv:" in text, "the paper, and its section"


def test_spelling_is_american() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in (*SOURCE.rglob("*.py"), *PAGES)
        for number, line in _lines(path)
        if BRITISH.search(line)
    ]
    assert not found, "\n".join(found)


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if "british" not in line:
            yield number, line
