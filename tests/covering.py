"""Which combinations of a test's parameters are quick: a covering set of them, another for each test.

A test that is parametrized along several axes, or by settings and layers of `cases.py`, has a product of cases, and a
few of them run everything that all of them do. Those few have, together,

- every value along every axis, and every setting and every layer;
- every pair of classes of two axes: of an algorithm and a kind of layer, of an algorithm and a dtype.

The other combinations are marked slow. `product` says that a test needs all of them; `each_value`, that values do and
pairs need not be there, as in tests of tables. `sample` is for tests whose cases each take long and run the same code
on other data: some, evenly spaced, are quick. `covers` names values of a parameter that have to be among the quick
ones, where something else than its class determines what a case runs.
"""

from __future__ import annotations

import heapq
import inspect
import itertools
import zlib
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import pytest

SMALL = 16
"""Cases of a test of which none is left out."""
FEW = 16
"""Values along an axis that are each a class of their own; of a longer axis only the registered ones have classes."""
Feature = tuple[Hashable, ...]
_CLASSES: dict[Hashable, Hashable] = {}


def register(classes: Mapping[Any, Hashable]) -> None:
    """Say which values of parameters are alike: value → class. Each is an axis of its own wherever it is found."""
    _CLASSES.update(classes)


def spread(rows: Sequence[tuple[Any, ...]], *classes: Callable[..., Hashable]) -> list[Any]:
    """Return the rows of a `parametrize`, all slow but some that have each value of each column.

    For rows that each take long, and that `mark_slow` sees as one axis. A function of a row adds another column.
    """
    columns = [(*row, *(each(*row) for each in classes)) for row in rows]
    chosen = covering_set([{str(at): value for at, value in enumerate(row)} for row in columns], pairs=False)
    return [pytest.param(*row, marks=() if at in chosen else pytest.mark.slow) for at, row in enumerate(rows)]


def select_quick(values: Iterable[Any], *quick: Any) -> list[Any]:
    """Return the values of a `parametrize`, all slow but the `quick` ones, for values that each take long."""
    return [pytest.param(value, marks=() if value in quick else pytest.mark.slow) for value in values]


def mark_slow(items: Iterable[pytest.Item]) -> None:
    """Mark what is beyond the covering set of each test."""
    tests: dict[tuple[Hashable, ...], list[pytest.Function]] = defaultdict(list)
    for item in items:
        if isinstance(item, pytest.Function) and hasattr(item, "callspec") and not is_exempt(item):
            # A function that a test is handed is what it checks, so that each of them has a set of its own.
            checks = [value.__qualname__ for value in item.callspec.params.values() if inspect.isfunction(value)]
            tests[(item.nodeid.partition("[")[0], *checks)].append(item)
    for name, cases in tests.items():
        if sample := cases[0].get_closest_marker("sample"):
            chosen = space_evenly(len(cases), *sample.args)
        elif len(cases) <= SMALL:
            continue
        else:
            start = zlib.crc32(repr(name).encode()) % len(cases)
            pairs = cases[0].get_closest_marker("each_value") is None
            chosen = covering_set([axes_of(case) for case in cases], start, pairs=pairs)
        for at, case in enumerate(cases):
            if at not in chosen and not is_named(case):
                case.add_marker(pytest.mark.slow)


def space_evenly(count: int, wanted: int) -> set[int]:
    """Return `wanted` of so many places, or all there are, evenly spaced."""
    return {at * count // min(wanted, count) for at in range(min(wanted, count))}


def is_exempt(item: pytest.Item) -> bool:
    """Whether a case is slow anyway, or its test asks for the whole product."""
    return any(item.get_closest_marker(name) for name in ("slow", "product"))


def is_named(item: pytest.Function) -> bool:
    """Whether `covers` names the case."""
    mark = item.get_closest_marker("covers")
    return mark is not None and any(value in mark.args[0] for value in item.callspec.params.values())


def axes_of(item: pytest.Function) -> dict[str, Hashable]:
    """Axis → value. The arguments of one `parametrize` are one axis, as a table's row is, but for registered values."""
    params = {name: _hashable(value) for name, value in item.callspec.params.items()}
    rows = [_names(mark.args[0]) for mark in item.iter_markers("parametrize")]
    found: dict[str, Hashable] = {}
    for row in rows + [(name,) for name in params if not any(name in row for row in rows)]:
        values = {name: params[name] for name in row if name in params}
        # A fixture may hand a pair as one parameter.
        if len(values) == 1 and isinstance(value := next(iter(values.values())), tuple):
            values = {f"{row[0]}.{at}": each for at, each in enumerate(value)}
        own = {name: value for name, value in values.items() if value in _CLASSES}
        rest = tuple(value for name, value in values.items() if name not in own)
        found |= own | ({",".join(row): rest} if rest else {})
    return found


def _names(names: str | Sequence[str]) -> tuple[str, ...]:
    return tuple(name.strip() for name in names.split(",")) if isinstance(names, str) else tuple(names)


def _hashable(value: Any) -> Hashable:
    """The value, or who it is: 1 is not True, and a list is another than one like it."""
    try:
        hash(value)
    except TypeError:
        return ("object", id(value))
    return value if value in _CLASSES or isinstance(value, tuple) else (type(value), value)


def covering_set(cases: Sequence[Mapping[str, Hashable]], start: int = 0, *, pairs: bool = True) -> set[int]:
    """Return which cases have every feature that any has: greedily the one that adds most, from `start` on.

    Without `pairs`, features are only the values.
    """
    shown = list(features(cases)) if pairs else [{*case.items()} for case in cases]
    missing: set[Feature] = set().union(*shown)
    order = [(-len(shown[at]), (at - start) % len(cases), at) for at in range(len(cases))]
    heapq.heapify(order)
    chosen = set()
    while missing:
        gain, place, at = heapq.heappop(order)
        fresh = len(shown[at] & missing)
        if fresh < -gain:
            # Others were taken since this was counted.
            heapq.heappush(order, (-fresh, place, at))
            continue
        chosen.add(at)
        missing -= shown[at]
    return chosen


def features(cases: Sequence[Mapping[str, Hashable]]) -> Iterator[set[Feature]]:
    """What each case shows: its values, and the pairs of their classes."""
    values: dict[str, set[Hashable]] = defaultdict(set)
    for case in cases:
        for axis, value in case.items():
            values[axis].add(value)
    for case in cases:
        classes = [
            (axis, _CLASSES.get(value, value))
            for axis, value in case.items()
            if value in _CLASSES or len(values[axis]) <= FEW
        ]
        yield {*case.items(), *itertools.combinations(classes, 2)}
