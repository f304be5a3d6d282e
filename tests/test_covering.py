"""The covering set of a test's parameters: everything is in it, and little more."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest

import covering
from cases import LAYERS, PAIRS_WITH_SLICES, WITH_SLICES, algorithm_class

PRODUCT = [
    {"name": name, "layer": layer, "strength": (float, strength)}
    for name, layer in PAIRS_WITH_SLICES
    for strength in (0.5, 1.0)
]


def chosen(start: int = 0) -> list[dict]:
    return [PRODUCT[at] for at in sorted(covering.covering_set(PRODUCT, start))]


@pytest.mark.parametrize("start", [0, 1000])
def test_every_setting_and_every_layer_is_in_it(start: int) -> None:
    found = chosen(start)
    assert {case["name"] for case in found} == set(WITH_SLICES)
    assert {case["layer"] for case in found} == set(LAYERS)
    assert len(found) < len(PRODUCT) / 8


def test_every_algorithm_meets_every_kind_of_layer_and_every_strength() -> None:
    def pairs(cases: list[dict]) -> set:
        met = set()
        for case in cases:
            algorithm, kind = algorithm_class(WITH_SLICES[case["name"]]), LAYERS[case["layer"]].make
            met |= set(itertools.combinations((algorithm, kind, case["strength"]), 2))
        return met

    assert pairs(chosen()) == pairs(PRODUCT)


def test_it_is_the_same_each_time_and_another_for_another_test() -> None:
    assert chosen(5) == chosen(5)
    assert chosen(5) != chosen(1000)


def test_rows_of_a_table_all_stay() -> None:
    rows = [{"given,expected": (at % 3, at)} for at in range(50)]
    assert len(covering.covering_set(rows)) == 50


PAGES = """
import pytest
import covering

covering.register({"lora": "A", "loha": "B", "linear": "C", "conv": "D"})
each = pytest.mark.parametrize("number", range(20))
def half(x): return x / 2
def third(x): return x / 3

@each
@pytest.mark.parametrize("other", range(10))
def test_thinned(number, other): pass

@each
@pytest.mark.parametrize("other", range(10))
@pytest.mark.product
def test_all(number, other): pass

@each
@pytest.mark.parametrize("other", range(10))
@pytest.mark.covers({7})
def test_named(number, other): pass

@pytest.mark.parametrize("one", range(4))
@pytest.mark.parametrize("two", range(4))
def test_small(one, two): pass

@pytest.fixture(params=[(n, l) for n in ("lora", "loha") for l in ("linear", "conv")])
def pair(request): return request.param

@each
def test_pairs(pair, number): pass

@each
@pytest.mark.parametrize("check", [half, third])
def test_checks(check, number): pass

@pytest.mark.parametrize("one", range(5))
@pytest.mark.parametrize("two", range(5))
@pytest.mark.each_value
def test_values(one, two): pass

@each
@pytest.mark.sample(3)
def test_sampled(number): pass

@pytest.mark.parametrize("value", covering.select_quick("abc", "b"))
def test_some(value): pass

@pytest.mark.parametrize(("one", "two"), covering.spread([(a, b) for a in range(3) for b in "xy"], lambda a, b: a > 1))
def test_spread(one, two): pass
"""


def test_what_is_beyond_it_is_slow(pytester: pytest.Pytester) -> None:
    pytester.makeini("[pytest]\nmarkers =\n    slow\n    product\n    each_value\n    sample\n")
    pytester.makeconftest(
        "import covering, pytest\n"
        "@pytest.hookimpl(tryfirst=True)\n"
        "def pytest_collection_modifyitems(items): covering.mark_slow(items)\n"
    )
    pytester.makepyfile(PAGES)
    found = pytester.inline_run("--collect-only", "-m", "not slow", "-p", "no:cacheprovider", "-p", "no:xdist")
    (call,) = found.getcalls("pytest_collection_finish")
    counts = Counter(item.originalname.removeprefix("test_") for item in call.session.items)
    assert counts.pop("named") >= 10 + 20 - 1
    assert counts.pop("spread") == counts.pop("sampled") == 3
    assert counts == {"thinned": 20, "all": 200, "small": 16, "pairs": 20, "checks": 40, "values": 5, "some": 1}
