"""The steps of CONTRIBUTING.md, done with its own text on a copy of the library."""

from __future__ import annotations

import inspect
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from interpreters import WarmInterpreter

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
USES = """
import torch
from torch import nn

import lycoris
from lycoris import AdapterSet, DoRA, create_lycoris, read
from lycoris.algorithms import ALGORITHMS
from lycoris.analysis.explain import explain
from lycoris.files import check, detect
from lycoris.files.programs import PROGRAMS
from lycoris.testing import check_dialect
from lycoris.testing.layers import LAYERS

Outer = lycoris.Outer
assert ALGORITHMS["outer"] is Outer
check_algorithm(DoRA(inner=Outer()), ["linear", "conv2d"])

model = nn.Sequential(nn.Linear(8, 12), nn.Conv2d(4, 8, 3))
network = create_lycoris(model, 1.0, algo="outer", gain=0.25)
network.apply_to()
assert [type(module).__name__ for module in network.loras] == ["OuterModule"] * 2
assert network.loras[0].adapter.algorithm == Outer(gain=0.25)
with torch.no_grad():
    [parameter.add_(1) for parameter in network.parameters()]
network.save_weights("outer.safetensors", None, {})

assert detect("outer.safetensors").algorithms == {"outer": 2}
found = read("outer.safetensors", model)
assert all(entry.algorithm == Outer(gain=0.25) for (entry,) in found.entries.values())
for program in PROGRAMS:
    reads = {each.reads for each in check("outer.safetensors", program).layers.values()}
    assert reads <= {"not known", "not at all"}, (program, reads)
check_dialect("kohya", model.double(), [Outer(gain=0.5)])
assert "Outer" in str(explain(AdapterSet.load(model, found)))
"""


def block(containing: str) -> str:
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    (found,) = [text for text in blocks if containing in text]
    return found


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the library to which the algorithm of the page is added: one file, one line."""
    folder = tmp_path_factory.mktemp("library")
    shutil.copytree(ROOT / "src" / "lycoris", folder / "lycoris", ignore=shutil.ignore_patterns("__pycache__"))
    algorithms = folder / "lycoris" / "algorithms"
    (algorithms / "outer.py").write_text(block("class Outer(Additive)"), encoding="utf-8")
    table = algorithms / "__init__.py"
    text = table.read_text(encoding="utf-8")
    last = re.findall(r"^from lycoris\.algorithms\.\w+ import \w+ as \w+\n", text, re.MULTILINE)[-1]
    table.write_text(text.replace(last, last + block("as Outer")), encoding="utf-8")
    return folder


def run(interpreter: WarmInterpreter, library: Path, code: str) -> subprocess.CompletedProcess[str]:
    return interpreter.run(code, library, path=[str(library)])


def test_one_file_and_one_line_are_all_that_an_algorithm_needs(interpreter: WarmInterpreter, library: Path) -> None:
    own = block("check_algorithm(Outer(").replace(
        "from lycoris.testing", "from lycoris import Outer\nfrom lycoris.testing"
    )
    done = run(interpreter, library, own + USES)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    ("right", "wrong", "message"),
    [
        ('p["u"].unsqueeze(1)', '2 * p["u"].unsqueeze(1).detach()', "check_gradients"),
        ('torch.nn.init.zeros_(p["u"])', 'torch.nn.init.ones_(p["u"])', "initialize has to leave the output as it is"),
        ("cls(gain=1.0 if alpha is None else alpha)", "cls()", "after saving and loading the output differs"),
    ],
)
def test_a_mistake_is_named(interpreter: WarmInterpreter, library: Path, right: str, wrong: str, message: str) -> None:
    path = library / "lycoris" / "algorithms" / "outer.py"
    text = path.read_text(encoding="utf-8")
    assert right in text
    path.write_text(text.replace(right, wrong), encoding="utf-8")
    try:
        own = block("check_algorithm(Outer(").replace("0.5))", "0.5), ['linear'])")
        done = run(interpreter, library, "from lycoris import Outer\n" + own)
    finally:
        path.write_text(text, encoding="utf-8")
    assert "Outer(gain=0.5) on linear" in done.stderr
    assert message in done.stderr


def test_a_missing_line_is_named(interpreter: WarmInterpreter, library: Path) -> None:
    table = library / "lycoris" / "algorithms" / "__init__.py"
    text = table.read_text(encoding="utf-8")
    table.write_text(text.replace(block("as Outer"), ""), encoding="utf-8")
    try:
        imports = "from lycoris.algorithms.outer import Outer\nfrom lycoris.testing import check_algorithm\n"
        done = run(interpreter, library, f"{imports}check_algorithm(Outer())")
    finally:
        table.write_text(text, encoding="utf-8")
    assert "add `from lycoris.algorithms.outer import Outer as Outer` to lycoris/algorithms/__init__.py" in done.stderr


def test_every_hook_of_the_page_exists_and_every_hook_is_on_it() -> None:
    from lycoris.algorithms import additive, base, call, cost, row_selection, serialization

    def hooks(cls: type) -> set[str]:
        return {
            name
            for name in {*vars(cls), *inspect.get_annotations(cls)}
            if not name.startswith("_") and name not in {"name", "kinds", "module_dropout"}
        }

    core = {name for name in hooks(base.Algorithm) if name != "from_options"}
    assert len(core) <= 8
    wanted = {
        "base": core,
        "cost": hooks(cost.CostHooks),
        "call": hooks(call.PassHooks),
        "serialization": hooks(serialization.FileHooks),
        "row_selection": hooks(row_selection.RowHooks),
    }
    for file, names in wanted.items():
        missing = {name for name in names if f"`{name}`" not in PAGE}
        assert not missing, f"CONTRIBUTING.md lacks hooks of algorithms/{file}.py: {missing}"
    rows = PAGE[PAGE.index("| file | concern | hooks |") : PAGE.index("Without those of")]
    known = set().union(*wanted.values(), vars(additive.Additive))
    assert set(re.findall(r"`(\w+)`", rows)) <= known
