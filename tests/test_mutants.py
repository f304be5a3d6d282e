"""Mutants of a piece of source: each kind is made, none is of what no test is about."""

from __future__ import annotations

import pytest
from tools.mutants import compiles, mutants

SOURCE = '''"""Two + two."""
from typing import Final

SCALE: Final[float] = 2.5


def area(width: int, height: int = 3, *, flat: bool = False) -> int:
    """1 + 1."""
    if flat and not width:
        raise ValueError(f"no area of {width + 1}")
    total = min(width, height)
    for each in range(total):
        if each in (2, 4) or 0 < each <= 1:
            break
        log(each)
    total += 1
    return -total if width is None else (width - 1) * height
'''
EXPECTED = {
    "float: SCALE doubled": ("SCALE: Final[float] = 2.5", "SCALE: Final[float] = 5.0"),
    "default": ("height: int = 3", "height: int = 4"),
    "bool": ("flat: bool = False", "flat: bool = True"),
    "and": ("flat and not width", "((flat) or (not width))"),
    "not": ("and not width", "and (width)"),
    "negated": ("if flat and not width", "if (not (flat and not width))"),
    "raise": ('raise ValueError(f"no area of {width + 1}")', "pass"),
    "swapped": ("min(width, height)", "min(height, width)"),
    "chain": ("0 < each <= 1", "((0) <= (each) <= (1))"),
    "break": ("break", "continue"),
    "call": ("log(each)", "pass"),
    "augmented": ("total += 1", "pass"),
    "sign": ("-total", "(total)"),
    "times": ("(width - 1) * height", "((width - 1) / (height))"),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_each_kind(name: str) -> None:
    before, after = EXPECTED[name]
    source = SOURCE.encode()
    made = [mutant.apply(source).decode() for mutant in mutants("a.py", source)]
    assert SOURCE.replace(before, after) in made


def test_messages_and_docstrings_stay() -> None:
    source = SOURCE.encode()
    for mutant in mutants("a.py", source):
        changed = mutant.apply(source).decode()
        assert '"""1 + 1."""' in changed
        assert '"""Two + two."""' in changed
        assert "no area of {width + 1}" in changed or mutant.what.startswith("removed: raise")
        assert compiles(mutant, source), mutant.what


def test_what_is_no_python_is_told() -> None:
    (mutant, *_) = mutants("a.py", b"x = 1\n")
    assert not compiles(mutant, b"x = ((\n")
