"""The shape of the source: who may import whom, how long things may be, and no state that a process shares."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

SOURCE = Path(__file__).parent.parent / "src" / "lycoris"
ORDER = (
    {"errors", "json_io"},
    {"ops"},
    {"layers"},
    {"algorithms"},
    {"models"},
    {"targeting"},
    {"adapters"},
    {"analysis"},
    {"files"},
    {"training", "tools"},
    {"compat"},
    {"integrations"},
    {"testing"},
    # What old clients import, one line each over compat.
    {"config", "config_sdk", "functional", "kernels", "kohya", "logging", "modules", "utils", "wrapper"},
    {"demo"},
    {"cli"},
    {"__main__"},
)
"""Earlier rows are to the left: a module imports from its own row and from rows before it."""

FILE_LIMIT, FUNCTION_LIMIT = 400, 60
SHARED_STATE = {("compat/timestep_masks.py", "_masks"), ("compat/timestep_masks.py", "_tracked")}
"""What trainers set for the whole process is kept there and nowhere else."""

IMMUTABLE = ("Mapping", "Sequence", "tuple", "frozenset", "Final", "ClassVar")
FILES = sorted(SOURCE.rglob("*.py"))


@cache
def parse_file(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def rank(name: str) -> int:
    return next((at for at, row in enumerate(ORDER) if name in row), -1)


def owner(path: Path) -> str:
    parts = path.relative_to(SOURCE).parts
    return parts[0].removesuffix(".py")


def imports(tree: ast.AST) -> set[str]:
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "lycoris":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lycoris."):
            found.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("lycoris.")}
    return found


def test_imports_point_left() -> None:
    wrong = []
    for path in FILES:
        own = owner(path)
        if own != "__init__":
            assert rank(own) >= 0, f"{own} has no place in the import order"
            others = imports(parse_file(path)) - {"__version__"}
            wrong += [f"{path}: {own} may not import {other}" for other in others if not 0 <= rank(other) <= rank(own)]
    assert not wrong, "\n".join(wrong)


def test_files_and_functions_are_of_a_size_to_read() -> None:
    wrong = [str(path) for path in FILES if len(path.read_text().splitlines()) > FILE_LIMIT]
    for path in FILES:
        functions = [node for node in ast.walk(parse_file(path)) if isinstance(node, ast.FunctionDef)]
        wrong += [f"{path}: {node.name}" for node in functions if node.end_lineno - node.lineno >= FUNCTION_LIMIT]
    assert not wrong, "\n".join(wrong)


def test_every_file_has_a_docstring() -> None:
    assert [path for path in FILES if not ast.get_docstring(parse_file(path))] == []


def test_no_file_keeps_state_for_the_process() -> None:
    wrong = [f"{path}: {label}" for path in FILES for label in find_mutable_names(path)]
    assert not wrong, "annotate as Mapping or Sequence, or wrap:\n" + "\n".join(wrong)


def find_mutable_names(path: Path) -> Iterator[str]:
    """Module-level names of mutable values that are not annotated as immutable."""
    name = path.relative_to(SOURCE).as_posix()
    for node in parse_file(path).body:
        if not isinstance(node, ast.Assign | ast.AnnAssign) or node.value is None:
            continue
        target = node.targets[0] if isinstance(node, ast.Assign) else node.target
        annotation = ast.unparse(node.annotation) if isinstance(node, ast.AnnAssign) else ""
        label = ast.unparse(target)
        if label == "__all__" or (name, label) in SHARED_STATE or annotation.startswith(IMMUTABLE):
            continue
        if _mutable(node.value):
            yield label


def _mutable(value: ast.expr) -> bool:
    if isinstance(value, ast.List | ast.Dict | ast.Set | ast.ListComp | ast.DictComp | ast.SetComp):
        return True
    call = ast.unparse(value.func).split(".")[-1].split("[")[0] if isinstance(value, ast.Call) else ""
    return call in {"dict", "list", "set", "defaultdict", "Counter", "deque", "WeakKeyDictionary", "WeakSet"}


def test_tests_are_of_a_size_to_read() -> None:
    tests = {path.name: len(path.read_text().splitlines()) for path in Path(__file__).parent.rglob("*.py")}
    assert {name: lines for name, lines in tests.items() if lines > FILE_LIMIT} == {}
