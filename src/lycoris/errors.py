"""Errors that the library raises on purpose. Each says what was given, what was expected, what exists, what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any


class LycorisError(ValueError):
    """Base of every error that a user can mend; the CLI prints it without a stack trace and exits with 2."""


class ConfigError(LycorisError):
    """An option, a preset key or a config file is wrong."""


class PlanError(LycorisError):
    """Rules and model do not fit: nothing matched, or an algorithm cannot serve a layer."""


class NothingMeantError(PlanError):
    """No layer of a model is meant. Interfaces over several models go on with the others."""


class AttachError(LycorisError):
    """A layer is not in a state in which an adapter can be put on, taken off, or merged."""


class FileError(LycorisError):
    """An adapter file is missing, damaged, or does not fit the model."""


class NotFiniteError(LycorisError):
    """Training produced NaN or infinity."""


@contextmanager
def prefix_errors(where: object) -> Iterator[None]:
    """Put `where: ` before the message of a `LycorisError` raised inside, unless it begins with that already.

    For the rim of the library, where it is known which file, layer or component an error is about. None: no prefix.
    """
    try:
        yield
    except LycorisError as error:
        if where is not None and not str(error).startswith(str(where)):
            error.args = (f"{where}: {error}",)
        raise


def nearest(word: str, known: Iterable[str], limit: int = 3) -> list[str]:
    """Known words most like `word`, best first; empty when none is close."""
    return difflib.get_close_matches(word, sorted(known), n=limit, cutoff=0.55)


def unknown(what: str, given: str, known: Iterable[str]) -> str:
    """`unknown WHAT 'given'; did you mean 'x'? Known: ...`"""
    names = sorted(known)
    close = nearest(given, names, limit=1)
    hint = f"; did you mean {close[0]!r}?" if close else "."
    return f"unknown {what} {given!r}{hint} Known: {', '.join(names)}"


def check_type(what: str, annotation: str, value: Any) -> None:
    """Raise `ConfigError` unless a field of truth values, whole numbers or numbers holds one.

    Python would take "no" for true and True for 1. Fields of other types are for their classes to check.
    """
    words = {"bool": "True or False", "int": "a whole number", "float": "a number"}
    kind, _, optional = annotation.partition(" | ")
    if kind not in words or (optional == "None" and value is None):
        return
    fits: Mapping[str, tuple[type, ...]] = {"bool": (bool,), "int": (int,), "float": (int, float)}
    if not isinstance(value, fits[kind]) or (isinstance(value, bool) and kind != "bool"):
        raise ConfigError(f"{what} must be {words[kind]}, not {value!r}")
