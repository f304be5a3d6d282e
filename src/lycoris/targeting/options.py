"""The options of `lycoris_config.json`: which algorithm knows which, and how a value is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lycoris.errors import ConfigError, unknown
from lycoris.targeting.remarks import Remark

if TYPE_CHECKING:
    from lycoris.algorithms.base import Algorithm


class Option(NamedTuple):
    """How a config's option reaches an algorithm: its field, the algorithms that know it, and the type of its value.

    `algorithms` are names as in configs.
    """

    field: str | None
    """The algorithm's own name for it; None: not a field of an algorithm."""
    algorithms: tuple[str, ...]
    kind: type
    built: bool = True
    """False: known to some mode that is not built yet; only a value that leaves it off is accepted."""


ALGORITHMS: tuple[tuple[str, str], ...] = (
    ("lora", "LoRA"),
    ("locon", "LoRA"),
    ("loha", "LoHa"),
    ("lokr", "LoKr"),
    ("full", "Full"),
    ("tlora", "TLoRA"),
    ("dylora", "DyLoRA"),
    ("glora", "GLoRA"),
    ("diag-oft", "OFT"),
    ("boft", "BOFT"),
    ("ia3", "IA3"),
)
"""Names in configs, and the classes, which are not imported before one is used: a config is checked without torch."""

RANKED = ("lora", "locon", "loha", "lokr", "tlora", "dylora", "glora")
FACTORED = ("lora", "locon", "loha", "lokr")
WITH_DORA = (*FACTORED, "dylora")
DROPPING = (*FACTORED, "tlora", "glora")
ADDING = (*WITH_DORA, "tlora", "full")
ALL = tuple(name for name, _ in ALGORITHMS)

OPTIONS: Mapping[str, Option] = {
    "use_tucker": Option("tucker", FACTORED, bool),
    "use_scalar": Option("use_scalar", (*FACTORED, "glora"), bool),
    "rs_lora": Option("rs_lora", RANKED, bool),
    "factor": Option("factor", ("lokr",), int),
    "full_matrix": Option("full_matrix", ("lokr",), bool),
    "decompose_both": Option("decompose_both", ("lokr",), bool),
    "unbalanced_factorization": Option("unbalanced", ("lokr",), bool),
    "stable_init": Option("stable_init", ("loha", "lokr"), bool),
    "sig_type": Option("vectors", ("tlora",), str),
    "use_data_init": Option("data_init", ("tlora",), bool),
    "dora_wd": Option(None, WITH_DORA, bool),
    "weight_decompose": Option(None, WITH_DORA, bool),
    "wd_on_output": Option(None, WITH_DORA, bool),
    "wd_on_out": Option(None, WITH_DORA, bool),
    "tlora_min_rank": Option(None, ("tlora",), int),
    "tlora_alpha": Option(None, ("tlora",), float),
    "bypass_mode": Option(None, ALL, bool),
    "dropout": Option("dropout", ADDING, float),
    "rank_dropout": Option("rank_dropout", DROPPING, float),
    "rank_dropout_scale": Option("rank_dropout_scale", DROPPING, bool),
    "module_dropout": Option("module_dropout", ALL, float),
    "train_norm": Option(None, ALL, bool),
    "train_llm_adapter": Option(None, ALL, bool, built=False),
    "block_size": Option("block_size", ("dylora",), int),
    "constraint": Option("constraint", ("diag-oft", "boft"), float),
    "rescaled": Option("rescale", ("diag-oft", "boft"), bool),
    "train_on_input": Option("on_input", ("ia3",), bool),
    "mask_group_id": Option(None, ("tlora",), int, built=False),
}
"""Options that any algorithm of the format knows."""

KINDS: Mapping[str, type] = {"bool": bool, "int": int, "float": float, "str": str}
"""Annotations of settings that a config can give."""

SCHEDULE = ("tlora_min_rank", "tlora_alpha")
"""Options of the one schedule that all T-LoRA layers of a recipe share."""

SIZES = ("linear_dim", "linear_alpha", "conv_dim", "conv_alpha")
UNUSED_SIZES: Mapping[str, tuple[str, ...]] = {
    "full": SIZES,
    "ia3": SIZES,
    "diag-oft": ("linear_alpha", "conv_alpha"),
    "boft": ("linear_alpha", "conv_alpha"),
}
"""Sizes that say nothing to an algorithm."""

TOP = ("algo", "multiplier", *SIZES, "apply_preset", "preset", "unserved")
OVERRIDE = ("algo", "dim", "alpha", "linear_dim", "linear_alpha", "conv_dim", "conv_alpha")


def unknown_options(given: Mapping[str, Any]) -> list[Remark]:
    """Return a remark for each top-level option that no algorithm of the format knows, in the order given.

    Options that only some algorithms know are no concern of it; `parse_options` is for those.
    """
    strange = [name for name in given if name not in OPTIONS and name not in TOP]
    return [unknown_option(name, "") for name in strange]


def unknown_option(name: str, where: str) -> Remark:
    text = unknown("option", name, [*OPTIONS, *(OVERRIDE if where else TOP)])
    return Remark(f"{text}{where}; it was ignored", "unknown")


def check_algorithm_name(name: str) -> None:
    """Raise `ConfigError` for a name that no algorithm has.

    An algorithm that lycoris-lora 4.1.3 did not have needs no entry here: its name is that of its module, and its
    options are its settings.
    """
    known = dict(ALGORITHMS)
    if name not in known and not (name.isidentifier() and _has_module(name)):
        raise ConfigError(unknown("algorithm", name, known))


def _has_module(name: str) -> bool:
    # By its file first: a wrong name is to be refused before torch is imported.
    if not (Path(__file__).parents[1] / "algorithms" / f"{name}.py").exists():
        return False
    from lycoris import algorithms

    return name in algorithms.ALGORITHMS


def algorithm_class(name: str) -> type[Algorithm]:
    """Return the class of an algorithm by its name in configs; the first call imports torch.

    Raises:
        ConfigError: No algorithm has the name.
    """
    from lycoris import algorithms

    check_algorithm_name(name)
    known = dict(ALGORITHMS)
    found: type[Algorithm] = getattr(algorithms, known[name]) if name in known else algorithms.ALGORITHMS[name]
    return found


def options_of(algo: str) -> Mapping[str, Option]:
    """Return the options of an algorithm by their names in configs.

    Of an algorithm that is not in `ALGORITHMS`, they are the options for all, those that set a field that it has, and
    its other fields under their own names. Rank and alpha are sizes and no options.
    """
    if algo in ALL:
        return {name: option for name, option in OPTIONS.items() if algo in option.algorithms}
    own = {field.name: str(field.type) for field in fields(algorithm_class(algo))}
    shared = {
        name: option
        for name, option in OPTIONS.items()
        if (option.algorithms == ALL if option.field is None else option.field in own)
    }
    named = {option.field for option in shared.values()}
    others = own.keys() - named - {"rank", "alpha"}
    return shared | {name: Option(name, (algo,), KINDS[own[name].split(" | ")[0]]) for name in sorted(others)}


def parse_options(
    algo: str, given: Mapping[str, Any], where: str, strict: bool, remarks: list[Remark]
) -> dict[str, Any]:
    """Read the options that reach the algorithm or the recipe, by name; the others are refused or remarked upon.

    Args:
        where: Follows the name in messages, such as " in module_algo_map['Attention']"; "" for the top level.
        strict: Whether an option that nothing knows is an error. False: a remark.
        remarks: Remarks are appended here.

    Raises:
        ConfigError: A value is wrong, an option is not built yet and switched on, or unknown while `strict`.
    """
    options: dict[str, Any] = {}
    own = options_of(algo)
    known = {**OPTIONS, **own}
    for name, value in given.items():
        if name not in known:
            remark = unknown_option(name, where)
            if strict:
                raise ConfigError(remark.removesuffix("; it was ignored"))
            remarks.append(remark)
            continue
        entry = known[name]
        parsed = parse_optional(value, name, entry.kind)
        if not entry.built:
            if parsed:
                raise ConfigError(
                    f"{name} = {value!r}{where} is not built yet; leave it out or set it to {entry.kind()!r}"
                )
        elif name not in own:
            if parsed:
                remarks.append(Remark(f"{algo} has no {name}{where}; it is for {', '.join(entry.algorithms)}"))
        elif parsed is not None:
            options[name] = parsed
    return options


def parse_rank(value: Any, name: str) -> int | None:
    """Read a rank; None when none was given, which is not the same as 0.

    Args:
        name: Of the option, for messages.

    Raises:
        ConfigError: It is no whole number, or below 1.
    """
    rank: int | None = parse_optional(value, name, int)
    if rank is not None and rank < 1:
        raise ConfigError(f"rank must be at least 1, not {name} = {value!r}")
    return rank


def parse_optional(value: Any, name: str, kind: type) -> Any:
    return None if value is None else parse_number(value, name, kind)


def parse_number(value: Any, name: str, kind: type) -> Any:
    """Read a value as bool, int, float or str; kohya-style callers hand strings over, and false for "none".

    False is 0, 0.0 or "" where a number or a word is wanted. As bool count true, 1 and yes, and false, 0, no, none and
    "".

    Raises:
        ConfigError: It is no such value, or a fraction where an int is wanted.
    """
    if kind is bool:
        if isinstance(value, bool):
            return value
        text = str(value).lower()
        if text in ("true", "1", "yes", "false", "0", "no", "none", ""):
            return text in ("true", "1", "yes")
        raise ConfigError(f"{name} must be true or false, not {value!r}")
    if value is False:
        return kind()
    try:
        parsed = kind(value)
    except (TypeError, ValueError, OverflowError):
        parsed = None
    if parsed is None or value is True or (kind is int and float(value) != parsed):
        words = {int: "a whole number", float: "a number", str: "a word"}
        raise ConfigError(f"{name} must be {words[kind]}, not {value!r}")
    return parsed
