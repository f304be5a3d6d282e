"""Errors that the library raises on purpose. Each says what was given, what was expected, what exists, what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any


class LycorisError(ValueError):
    """Base of every error that a user can fix.

    The command line prints its message without a traceback and exits with status 2. A `ValueError`, so that code which
    knows nothing of this library can catch it.
    """


class ConfigError(LycorisError):
    """An option, a preset key or a config file has a value that cannot be used.

    The message names the option, the value that was given, and what is expected.
    """


class PlanError(LycorisError):
    """Rules and model do not fit together.

    No layer matches, an algorithm does not support a layer it was assigned to, or a plan is for another model.
    """


class NothingMeantError(PlanError):
    """No layer of a model is targeted.

    Interfaces that adapt several models (a denoiser and its text encoders) catch it and go on with the others.
    """


class AttachError(LycorisError):
    """An adapter cannot be attached, detached or merged in the state that its layer is in.

    For example: the layer was replaced, sharded or merged into since. Nothing has changed when it is raised.
    """


class FileError(LycorisError):
    """An adapter file is missing, is damaged, or does not fit the model.

    The message begins with the path of the file. Nothing is loaded or written when it is raised.
    """


class NotFiniteError(LycorisError):
    """A forward pass, a gradient or a parameter has NaN or infinity in it; see `lycoris.watch_finite`."""


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
    """Return up to `limit` of the known words that are spelled most like `word`, best first; [] when none is close."""
    return difflib.get_close_matches(word, sorted(known), n=limit, cutoff=0.55)


def unknown(what: str, given: str, known: Iterable[str]) -> str:
    """Return the message for a name that does not exist, with the nearest one that does.

    Example:
        >>> unknown("algorithm", "lorra", ["lora", "loha"])
        "unknown algorithm 'lorra'; did you mean 'lora'? Known: loha, lora"
    """
    names = sorted(known)
    close = nearest(given, names, limit=1)
    hint = f"; did you mean {close[0]!r}?" if close else "."
    return f"unknown {what} {given!r}{hint} Known: {', '.join(names)}"


def check_type(what: str, annotation: str, value: Any) -> None:
    """Check the value of a field that is annotated as bool, int or float; other annotations pass.

    Stricter than Python, which takes the string "no" as true and True as 1.

    Args:
        what: Name of the field, for the message.
        annotation: Its annotation as text, such as "float" or "int | None".
        value: The value that was given.

    Raises:
        ConfigError: The value is of another type.
    """
    words = {"bool": "True or False", "int": "a whole number", "float": "a number"}
    kind, _, optional = annotation.partition(" | ")
    if kind not in words or (optional == "None" and value is None):
        return
    fits: Mapping[str, tuple[type, ...]] = {"bool": (bool,), "int": (int,), "float": (int, float)}
    if not isinstance(value, fits[kind]) or (isinstance(value, bool) and kind != "bool"):
        raise ConfigError(f"{what} must be {words[kind]}, not {value!r}")
