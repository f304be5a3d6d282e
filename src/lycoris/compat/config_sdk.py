"""Presets and algorithms as values that user interfaces can show and check."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from typing_extensions import Self

from lycoris.algorithms import OFT
from lycoris.algorithms.base import Algorithm
from lycoris.errors import ConfigError, unknown
from lycoris.targeting.options import (
    ALGORITHMS,
    OPTIONS,
    OVERRIDE,
    RANKED,
    algorithm_class,
    parse_optional,
    parse_options,
    parse_rank,
)
from lycoris.targeting.preset import Preset

VALID_PRESET_KEYS: tuple[str, ...] = tuple(f.name for f in fields(Preset))

DIMS, ALPHAS = ("dim", "linear_dim", "conv_dim"), ("alpha", "linear_alpha", "conv_alpha")

ALGORITHM_NOTES: Mapping[str, str] = {
    "locon": "The same as lora.",
    "loha": "Its rank is up to dim squared; high dims want lower learning rates.",
    "lokr": "A dim of at least half the larger side of a factor, such as 10000, stores that factor as a full matrix.",
    "full": "Has no rank; not for quantized weights.",
    "diag-oft": "dim determines the block size.",
    "boft": "dim determines the block size; the number of outputs is the block size times a power of two.",
    "ia3": "Has no rank; the preset ia3 targets the usual layers.",
    "tlora": "The number of active ranks depends on the timestep; trainers set a mask before every pass.",
}


class PresetValidationError(ConfigError):
    """A preset, or an override in it, is invalid."""


@dataclass(frozen=True)
class AlgoSpec:
    """Description of an algorithm and of the settings it has.

    `supported_args` are names of config options; `notes` is one sentence for users, or None. No algorithm requires an
    argument, so `required_args` is empty.
    """

    name: str
    description: str
    supported_args: tuple[str, ...] = ()
    required_args: tuple[str, ...] = ()
    notes: str | None = None

    def supports(self, arg: str) -> bool:
        return arg in self.supported_args


class _Registry(Mapping[str, AlgoSpec]):
    """The specs by name, built when they are read."""

    def __getitem__(self, name: str) -> AlgoSpec:
        return {spec.name: spec for spec in list_algorithms()}[name]

    def __iter__(self) -> Iterator[str]:
        return (name for name, _ in ALGORITHMS)

    def __len__(self) -> int:
        return len(ALGORITHMS)


ALGO_REGISTRY: Mapping[str, AlgoSpec] = _Registry()
"""The specs of `list_algorithms` by name."""


def list_algorithms() -> tuple[AlgoSpec, ...]:
    """Return the specs of all algorithms of configs."""
    return tuple(_build_spec(name, algorithm_class(name)) for name, _ in ALGORITHMS)


def describe_algo(name: str) -> AlgoSpec:
    """Return the spec of one algorithm; upper case is accepted.

    Raises `PresetValidationError` for an unknown name.
    """
    found = next((spec for spec in list_algorithms() if spec.name == name.lower()), None)
    if found is None:
        raise PresetValidationError(unknown("algorithm", name, [known for known, _ in ALGORITHMS]))
    return found


def _build_spec(name: str, cls: type[Algorithm]) -> AlgoSpec:
    sized = ("dim", "alpha") if name in RANKED else ("dim",) if issubclass(cls, OFT) else ()
    own = tuple(option for option, entry in OPTIONS.items() if name in entry.algorithms and entry.built)
    summary = (cls.__doc__ or name).split("\n\n")[0].replace("\n    ", " ")
    return AlgoSpec(name, summary, (*sized, *own), notes=ALGORITHM_NOTES.get(name))


@dataclass
class AlgoOverride:
    """Algorithm and settings for one class of layers or one path.

    `algo` None keeps the algorithm of the network.
    """

    algo: str | None = None
    options: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any]) -> Self:
        options = dict(mapping)
        return cls(options.pop("algo", None), options)

    def to_dict(self) -> dict[str, Any]:
        return copy.deepcopy(self.options) | ({} if self.algo is None else {"algo": self.algo})

    def validate(self) -> None:
        """Check the override.

        Raises `PresetValidationError` for an unknown algorithm, for sizes that are not numbers, and for settings that
        the algorithm, or any algorithm if none is named, does not have.
        """
        try:
            for name in self.options:
                if name in DIMS:
                    parse_rank(self.options[name], name)
                elif name in ALPHAS:
                    parse_optional(self.options[name], name, float)
        except ConfigError as error:
            raise PresetValidationError(str(error)) from None
        if self.algo is None:
            strange = next((name for name in self.options if name not in OPTIONS and name not in OVERRIDE), None)
            if strange is not None:
                raise PresetValidationError(unknown("option", strange, [*OPTIONS, *OVERRIDE]))
            return
        spec = describe_algo(self.algo)
        for name in self.options:
            if not spec.supports(name) and name not in OVERRIDE:
                raise PresetValidationError(unknown(f"option of {spec.name}", name, [*spec.supported_args, *OVERRIDE]))
        rest = {name: value for name, value in self.options.items() if name not in OVERRIDE}
        try:
            algorithm_class(spec.name)
            parse_options(spec.name, rest, "", True, [])
        except ConfigError as error:
            raise PresetValidationError(str(error)) from None


@dataclass
class PresetConfig:
    """A preset. None and empty maps mean that a key is not given.

    For the keys see `lycoris.targeting.preset.Preset`.
    """

    enable_conv: bool | None = None
    target_module: list[str] | None = None
    target_name: list[str] | None = None
    module_algo_map: dict[str, AlgoOverride] = field(default_factory=dict)
    name_algo_map: dict[str, AlgoOverride] = field(default_factory=dict)
    lora_prefix: str | None = None
    use_fnmatch: bool | None = None
    unet_target_module: list[str] | None = None
    unet_target_name: list[str] | None = None
    text_encoder_target_module: list[str] | None = None
    text_encoder_target_name: list[str] | None = None
    exclude_name: list[str] | None = None

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], *, strict: bool = False) -> Self:
        """Return the preset in a JSON object. Keys whose value is None are not given.

        `strict` also checks the overrides in both maps. Raises `PresetValidationError` for unknown keys and wrong
        values.
        """
        data = {key: value for key, value in data.items() if value is not None}
        try:
            Preset.parse(data)
        except ConfigError as error:
            raise PresetValidationError(str(error)) from None
        maps = {key: _parse_overrides(data[key], strict) for key in data if key.endswith("_map")}
        return cls(**(copy.deepcopy(data) | maps))

    def to_dict(self) -> dict[str, Any]:
        """Return the given keys as a JSON object, a deep copy."""
        found: dict[str, Any] = {}
        for key in VALID_PRESET_KEYS:
            value = getattr(self, key)
            if key.endswith("_map"):
                value = {name: override.to_dict() for name, override in value.items()} or None
            if value is not None:
                found[key] = copy.deepcopy(value)
        return found

    def list_algorithms(self) -> Iterator[str]:
        """Yield the names of the algorithms in both maps, in order and with repetitions."""
        for override in (*self.module_algo_map.values(), *self.name_algo_map.values()):
            if override.algo:
                yield override.algo


def _parse_overrides(given: Mapping[str, Mapping[str, Any]], strict: bool) -> dict[str, AlgoOverride]:
    found = {name: AlgoOverride.from_mapping(options) for name, options in given.items()}
    for override in found.values() if strict else ():
        override.validate()
    return found
