"""Small wrong changes of a source file: what tests have to notice."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass

OPERATORS: dict[type[ast.AST], str] = {
    ast.Add: "-",
    ast.Sub: "+",
    ast.Mult: "/",
    ast.Div: "*",
    ast.FloorDiv: "*",
    ast.Mod: "*",
    ast.Pow: "*",
    ast.Lt: "<=",
    ast.LtE: "<",
    ast.Gt: ">=",
    ast.GtE: ">",
    ast.Eq: "!=",
    ast.NotEq: "==",
    ast.Is: "is not",
    ast.IsNot: "is",
    ast.In: "not in",
    ast.NotIn: "in",
    ast.And: "or",
    ast.Or: "and",
}
"""Operator → what replaces it."""
_WRITTEN: dict[type[ast.cmpop], str] = {
    ast.Lt: "<",
    ast.LtE: "<=",
    ast.Gt: ">",
    ast.GtE: ">=",
    ast.Eq: "==",
    ast.NotEq: "!=",
}
"""Comparisons that are chained."""
SKIPPED = {"annotation", "returns", "decorator_list", "bases", "keywords", "type_params"}
"""Fields of definitions that only tools read, or that no test would let pass."""


@dataclass(frozen=True)
class Mutant:
    """One edit: the bytes from `start` to `end` become `text`."""

    path: str
    line: int
    what: str
    start: int
    end: int
    text: str

    def apply(self, source: bytes) -> bytes:
        """Return the mutated file."""
        return source[: self.start] + self.text.encode() + source[self.end :]


def mutants(path: str, source: bytes) -> list[Mutant]:
    """Return every mutant of a file, in the order of the file."""
    found = _Finder(path, source).statements(ast.parse(source).body)
    return sorted(found, key=lambda each: (each.start, each.end, each.text))


def compiles(mutant: Mutant, source: bytes) -> bool:
    """Tell whether a mutant is Python, as a removed line that others continue is not."""
    try:
        ast.parse(mutant.apply(source))
    except SyntaxError:
        return False
    return True


class _Finder:
    def __init__(self, path: str, source: bytes) -> None:
        self._path, self._source = path, source
        self._lines = [0]
        for line in source.splitlines(keepends=True):
            self._lines.append(self._lines[-1] + len(line))

    def _span(self, node: ast.expr | ast.stmt) -> tuple[int, int]:
        assert node.end_lineno is not None
        assert node.end_col_offset is not None
        return (
            self._lines[node.lineno - 1] + node.col_offset,
            self._lines[node.end_lineno - 1] + node.end_col_offset,
        )

    def _text(self, node: ast.expr) -> str:
        start, end = self._span(node)
        return self._source[start:end].decode()

    def _edit(self, node: ast.expr | ast.stmt, kind: str, text: str) -> Mutant:
        start, end = self._span(node)
        before = " ".join(self._source[start:end].decode().split())
        return Mutant(self._path, node.lineno, f"{kind}: {before} -> {' '.join(text.split())}", start, end, text)

    def statements(self, body: list[ast.stmt]) -> Iterator[Mutant]:
        for at, node in enumerate(body):
            if at == 0 and isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
                continue
            yield from self._statement(node)

    def _statement(self, node: ast.stmt) -> Iterator[Mutant]:
        # The text of an error is no behavior to mutate; that it is raised is.
        if isinstance(node, ast.Raise):
            yield self._edit(node, "removed", "pass")
            return
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        if (
            (isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Attribute | ast.Subscript))
            or isinstance(node, ast.AugAssign)
            or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Call))
        ):
            yield self._edit(node, "removed", "pass")
        elif isinstance(node, ast.Break | ast.Continue):
            yield self._edit(node, "exchanged", "continue" if isinstance(node, ast.Break) else "break")
        if isinstance(node, ast.If | ast.While):
            yield self._negation(node.test)
        yield from self._children(node)

    def _children(self, node: ast.AST) -> Iterator[Mutant]:
        skipped = SKIPPED if isinstance(node, ast.stmt | ast.arg) else set()
        for name, value in ast.iter_fields(node):
            if name in skipped:
                continue
            if isinstance(value, list) and value and isinstance(value[0], ast.stmt):
                yield from self.statements(value)
                continue
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.expr):
                    yield from self._expression(child)
                elif isinstance(child, ast.AST):
                    yield from self._children(child)

    def _expression(self, node: ast.expr) -> Iterator[Mutant]:
        # Positions within formatted strings are not those of the file, and what they are for is messages.
        if isinstance(node, ast.JoinedStr):
            return
        yield from self._own(node)
        yield from self._children(node)

    def _own(self, node: ast.expr) -> Iterator[Mutant]:
        if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS and not isinstance(node.left, ast.JoinedStr):
            yield self._joined(node, "operator", [node.left, node.right], [OPERATORS[type(node.op)]])
        elif isinstance(node, ast.Compare):
            later = [_WRITTEN[type(each)] for each in node.ops[1:]]
            parts = [node.left, *node.comparators]
            yield self._joined(node, "comparison", parts, [OPERATORS[type(node.ops[0])], *later])
        elif isinstance(node, ast.BoolOp):
            yield self._joined(node, "operator", node.values, [OPERATORS[type(node.op)]] * (len(node.values) - 1))
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not | ast.USub):
            yield self._edit(node, "sign", f"({self._text(node.operand)})")
        elif isinstance(node, ast.IfExp):
            yield self._negation(node.test)
        elif isinstance(node, ast.Constant):
            yield from self._constant(node)
        elif isinstance(node, ast.Call) and len(node.args) > 1:
            yield from self._swapped(node)
        if isinstance(node, ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp):
            yield from (self._negation(test) for each in node.generators for test in each.ifs)

    def _joined(self, node: ast.expr, kind: str, parts: list[ast.expr], operators: list[str]) -> Mutant:
        text = f"({self._text(parts[0])})"
        for operator, part in zip(operators, parts[1:], strict=True):
            text += f" {operator} ({self._text(part)})"
        return self._edit(node, kind, f"({text})")

    def _negation(self, test: ast.expr) -> Mutant:
        return self._edit(test, "condition", f"(not ({self._text(test)}))")

    def _constant(self, node: ast.Constant) -> Iterator[Mutant]:
        if isinstance(node.value, bool):
            yield self._edit(node, "constant", str(not node.value))
        elif isinstance(node.value, int):
            yield self._edit(node, "constant", str(node.value + 1))
        elif isinstance(node.value, float):
            yield self._edit(node, "constant", repr(2 * node.value or 1.0))

    def _swapped(self, node: ast.Call) -> Iterator[Mutant]:
        first, second = node.args[:2]
        if isinstance(first, ast.Starred) or isinstance(second, ast.Starred):
            return
        (start, _), (_, end) = self._span(first), self._span(second)
        one, other = self._text(first), self._text(second)
        if one != other:
            what = f"arguments: {ast.unparse(node.func)}({one}, {other}) swapped"
            yield Mutant(self._path, node.lineno, what, start, end, f"{other}, {one}")
