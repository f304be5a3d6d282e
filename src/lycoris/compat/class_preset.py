"""The preset of a class of networks, as class attributes that scripts read, assign and modify in place.

`LycorisNetwork.TARGET_REPLACE_MODULE` is the list in effect for the networks built from then on. A subclass has the
preset of its base until it is given one of its own, which does not change the base.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import Any

from torch import nn
from typing_extensions import Self

from lycoris.errors import ConfigError, nearest
from lycoris.targeting.preset import Preset

PIPELINE_ATTRIBUTES: Mapping[str, str] = MappingProxyType(
    {
        "UNET_TARGET_REPLACE_MODULE": "unet_target_module",
        "UNET_TARGET_REPLACE_NAME": "unet_target_name",
        "TEXT_ENCODER_TARGET_REPLACE_MODULE": "text_encoder_target_module",
        "TEXT_ENCODER_TARGET_REPLACE_NAME": "text_encoder_target_name",
    }
)
"""Class attribute → preset key, only on networks over several models."""

CLASS_ATTRIBUTES: Mapping[str, str] = MappingProxyType(
    {
        "ENABLE_CONV": "enable_conv",
        "TARGET_REPLACE_MODULE": "target_module",
        "TARGET_REPLACE_NAME": "target_name",
        "LORA_PREFIX": "lora_prefix",
        "MODULE_ALGO_MAP": "module_algo_map",
        "NAME_ALGO_MAP": "name_algo_map",
        "USE_FNMATCH": "use_fnmatch",
        "TARGET_EXCLUDE_NAME": "exclude_name",
        **PIPELINE_ATTRIBUTES,
    }
)
"""Class attribute → preset key."""

PRESET_KEYS: tuple[str, ...] = tuple(each.name for each in fields(Preset))


class PresetKeyError(ConfigError, KeyError):
    """An unknown preset key; also a `KeyError`, which callers of `apply_preset` catch."""

    __str__ = ConfigError.__str__


@dataclass
class _HeldValue:
    """The value of one key that a class holds."""

    value: Any
    inherited: Any
    """A copy of the inherited value; the key counts as given only if `value` differs from it."""
    applied: bool = False
    """Whether it was set by `apply_preset`, and so counts even if equal to the inherited value."""

    @property
    def is_given(self) -> bool:
        """Whether the value was assigned or modified in place, and not merely inherited."""
        return self.applied or self.value != self.inherited


class Setting:
    """Descriptor for one key of the preset, readable on a class and on its networks.

    Assigning on the class changes the networks built afterwards; assigning on a built network raises `ConfigError`.
    """

    def __init__(self, key: str) -> None:
        self.key = key

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, network: Any, owner: PresetClass) -> Any:
        if network is not None and self.name in vars(network):
            return vars(network)[self.name]
        return owner.get_value(self.key)

    def __set__(self, network: Any, value: Any) -> None:
        if getattr(network, "is_built", False):
            raise ConfigError(
                f"the layers of this network are already chosen; assign to {type(network).__name__}.{self.name} and "
                "build a new network"
            )
        vars(network)[self.name] = value


def _as_setting(value: Any) -> Setting | None:
    return value if isinstance(value, Setting) else None


class PresetClass(type):
    """Metaclass of network classes, which stores each class's preset.

    A class has the preset of its base until it is given its own. One that defines `_defaults` starts from these
    instead.
    """

    _held: dict[str, _HeldValue]

    def __init__(cls, name: str, bases: tuple[type, ...], namespace: dict[str, Any], **options: Any) -> None:
        super().__init__(name, bases, namespace, **options)
        type.__setattr__(cls, "_held", {})
        for attribute, value in namespace.items():
            setting = next((s for base in cls.__mro__[1:] if (s := _as_setting(vars(base).get(attribute)))), None)
            if setting is not None and _as_setting(value) is None:
                type.__delattr__(cls, attribute)
                cls._assign(setting.key, value)

    def __setattr__(cls, name: str, value: Any) -> None:
        setting = cls._find(name)
        if setting is not None:
            cls._assign(setting.key, value)
            return
        if name in PRESET_KEYS or (name.isupper() and not hasattr(cls, name)):
            raise ConfigError(_explain_unknown_attribute(cls, name))
        super().__setattr__(name, value)

    def __delattr__(cls, name: str) -> None:
        setting = cls._find(name)
        if setting is not None:
            cls._held.pop(setting.key, None)
        else:
            super().__delattr__(name)

    def _update_preset(cls, preset: Mapping[str, Any]) -> None:
        """Set the given keys; see `ClassPreset.apply_preset`."""
        try:
            Preset.parse({**cls.get_given_keys(), **preset})
        except ConfigError as error:
            if isinstance(preset, Mapping) and not preset.keys() <= set(PRESET_KEYS):
                raise PresetKeyError(str(error)) from None
            raise
        for key, value in preset.items():
            cls._held[key] = _HeldValue(copy.deepcopy(value), None, applied=True)

    def clear_preset(cls) -> None:
        """Reset everything that `apply_preset` and assignments to this class have set.

        What base classes were given stays in effect.
        """
        cls._held.clear()

    def get_given_keys(cls) -> dict[str, Any]:
        """Return the keys set by `apply_preset`, assignments and modification in place, with their present values.

        Those of base classes are included.
        """
        found: dict[str, Any] = {}
        for each in reversed([*cls._lineage()]):
            found |= {key: held.value for key, held in each._held.items() if held.is_given}
        return found

    def build_preset(cls) -> Preset | None:
        """Return the preset for a network built now, or None when nothing was set.

        Raises `ConfigError` for wrong values, which lists modified in place may have.
        """
        given = cls.get_given_keys()
        return Preset.parse(given) if given else None

    def get_value(cls, key: str) -> Any:
        """Return the value in effect for one key.

        It is a list or dict of this class alone, which may be modified in place.
        """
        own = cls._held.get(key)
        if own is not None and own.is_given:
            return own.value
        inherited = cls._find_inherited(key)
        if own is None or own.inherited != inherited:
            own = cls._held[key] = _HeldValue(copy.deepcopy(inherited), copy.deepcopy(inherited))
        return own.value

    def _find_inherited(cls, key: str) -> Any:
        above = [each._held[key] for each in cls._lineage() if each is not cls and key in each._held]
        defaults: Any = cls
        return next((held.value for held in above if held.is_given), defaults._defaults().get(key))

    def _assign(cls, key: str, value: Any) -> None:
        # A pattern that is not a regular expression may become a valid glob when USE_FNMATCH is assigned.
        Preset.parse({key: value, **({} if key == "use_fnmatch" else {"use_fnmatch": True})})
        cls._held[key] = _HeldValue(value, copy.deepcopy(cls._find_inherited(key)))

    def _lineage(cls) -> Iterator[PresetClass]:
        """Yield this class and the base classes that it inherits its preset from."""
        for each in cls.__mro__:
            if isinstance(each, PresetClass):
                yield each
            if "_defaults" in vars(each):
                return

    def _find(cls, name: str) -> Setting | None:
        return next((s for each in cls.__mro__ if (s := _as_setting(vars(each).get(name)))), None)


class ClassPreset(nn.Module, metaclass=PresetClass):
    """Base class of networks whose class has a preset."""

    ENABLE_CONV = Setting("enable_conv")
    TARGET_REPLACE_MODULE = Setting("target_module")
    TARGET_REPLACE_NAME = Setting("target_name")
    LORA_PREFIX = Setting("lora_prefix")
    MODULE_ALGO_MAP = Setting("module_algo_map")
    NAME_ALGO_MAP = Setting("name_algo_map")
    USE_FNMATCH = Setting("use_fnmatch")
    TARGET_EXCLUDE_NAME = Setting("exclude_name")

    @classmethod
    def apply_preset(cls, preset: Mapping[str, Any]) -> type[Self]:
        """Set preset keys for the networks built from now on; existing networks keep theirs.

        For the keys see `lycoris.targeting.preset.Preset`; those that are not given stay. Returns the class. Raises
        `PresetKeyError` for an unknown key and `ConfigError` for a wrong value.
        """
        cls._update_preset(preset)
        return cls

    def match_fn(self, pattern: str, name: str) -> bool:
        """Return whether a pattern of the class's preset matches the path of a layer.

        Patterns are regular expressions, or globs with `USE_FNMATCH`.
        """
        return self._current_preset().matches(pattern, name)

    def is_excluded(self, name: str, patterns: Sequence[str] | None = None) -> bool:
        """Return whether a path is excluded by these patterns. None: by those of the class's preset."""
        preset = self._current_preset()
        excluding = preset.exclude_name if patterns is None else patterns
        return bool(name) and any(preset.means(pattern, name) for pattern in excluding)

    def find_conf_for_name(self, name: str) -> Mapping[str, Any] | None:
        """Return the settings that the class's `NAME_ALGO_MAP` has for a path, or None.

        An exact name takes precedence over patterns.
        """
        preset = self._current_preset()
        if name in preset.name_algo_map:
            return preset.name_algo_map[name]
        return next((own for pattern, own in preset.name_algo_map.items() if preset.matches(pattern, name)), None)

    def _current_preset(self) -> Preset:
        return type(self).build_preset() or Preset()

    @classmethod
    def _defaults(cls) -> Mapping[str, Any]:
        """Return the defaults of all keys, as a JSON object."""
        return {each.name: to_json_value(getattr(Preset(), each.name)) for each in fields(Preset)}


def to_json_value(value: Any) -> Any:
    """Return a preset's value as JSON has it: tuples as lists, mappings as dicts."""
    if isinstance(value, tuple):
        return list(value)
    return dict(value) if isinstance(value, Mapping) else value


def _explain_unknown_attribute(cls: PresetClass, name: str) -> str:
    own = {attribute: key for attribute, key in CLASS_ATTRIBUTES.items() if cls._find(attribute) is not None}
    by_key = {key: attribute for attribute, key in own.items()}
    if name in by_key:
        return f"{cls.__name__}.{name} would have no effect: the class attribute is {by_key[name]}"
    if name in PIPELINE_ATTRIBUTES:
        return (
            f"{cls.__name__}.{name} would have no effect: networks over one model have no such setting, but "
            f"LycorisNetworkKohya has; here it is {name.split('_', 1)[1].replace('ENCODER_', '')}"
        )
    close = nearest(name, own, limit=1)
    hint = f"; did you mean {close[0]}?" if close else "."
    return f"{cls.__name__} has no setting {name}{hint} Its settings are {', '.join(sorted(own))}"
