"""The preset of a class of networks, as the class attributes that scripts read, assign and change in place.

`LycorisNetwork.TARGET_REPLACE_MODULE` is the list that counts for the networks made from then on. A subclass has what
its base has until it is given something of its own, which the base never sees.
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

PIPELINE: Mapping[str, str] = MappingProxyType(
    {
        "UNET_TARGET_REPLACE_MODULE": "unet_target_module",
        "UNET_TARGET_REPLACE_NAME": "unet_target_name",
        "TEXT_ENCODER_TARGET_REPLACE_MODULE": "text_encoder_target_module",
        "TEXT_ENCODER_TARGET_REPLACE_NAME": "text_encoder_target_name",
    }
)
"""Class attribute → key of a preset, of networks over several models alone."""

SETTINGS: Mapping[str, str] = MappingProxyType(
    {
        "ENABLE_CONV": "enable_conv",
        "TARGET_REPLACE_MODULE": "target_module",
        "TARGET_REPLACE_NAME": "target_name",
        "LORA_PREFIX": "lora_prefix",
        "MODULE_ALGO_MAP": "module_algo_map",
        "NAME_ALGO_MAP": "name_algo_map",
        "USE_FNMATCH": "use_fnmatch",
        "TARGET_EXCLUDE_NAME": "exclude_name",
        **PIPELINE,
    }
)
"""Class attribute → key of a preset."""

KEYS: tuple[str, ...] = tuple(each.name for each in fields(Preset))


class PresetKeyError(ConfigError, KeyError):
    """An unknown preset key; a `KeyError` because callers of `apply_preset` catch that."""

    __str__ = ConfigError.__str__


@dataclass
class Held:
    """What a class has for one key."""

    value: Any
    inherited: Any
    """A copy of what counted before; unless `value` differs from it now, nothing was said."""
    applied: bool = False
    """Whether `apply_preset` gave it, so that it counts whatever it is."""

    @property
    def given(self) -> bool:
        return self.applied or self.value != self.inherited


class Setting:
    """One key of the preset as an attribute of a class and of its networks."""

    def __init__(self, key: str) -> None:
        self.key = key

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, network: Any, owner: PresetClass) -> Any:
        if network is not None and self.name in vars(network):
            return vars(network)[self.name]
        return owner.preset_value(self.key)

    def __set__(self, network: Any, value: Any) -> None:
        if getattr(network, "is_made", False):
            raise ConfigError(
                f"the layers of this network are chosen already; assign to {type(network).__name__}.{self.name} and "
                "make a new one"
            )
        vars(network)[self.name] = value


def _setting(value: Any) -> Setting | None:
    return value if isinstance(value, Setting) else None


class PresetClass(type):
    """A class of networks with a preset. The one that has `_defaults` of its own inherits from no other."""

    _held: dict[str, Held]

    def __init__(cls, name: str, bases: tuple[type, ...], namespace: dict[str, Any], **options: Any) -> None:
        super().__init__(name, bases, namespace, **options)
        type.__setattr__(cls, "_held", {})
        for attribute, value in namespace.items():
            setting = next((s for base in cls.__mro__[1:] if (s := _setting(vars(base).get(attribute)))), None)
            if setting is not None and _setting(value) is None:
                type.__delattr__(cls, attribute)
                cls._assign(setting.key, value)

    def __setattr__(cls, name: str, value: Any) -> None:
        setting = cls._find(name)
        if setting is not None:
            cls._assign(setting.key, value)
            return
        if name in KEYS or (name.isupper() and not hasattr(cls, name)):
            raise ConfigError(_unknown(cls, name))
        super().__setattr__(name, value)

    def __delattr__(cls, name: str) -> None:
        setting = cls._find(name)
        if setting is not None:
            cls._held.pop(setting.key, None)
        else:
            super().__delattr__(name)

    def apply_to_class(cls, preset: Mapping[str, Any]) -> None:
        """See `ClassPreset.apply_preset`."""
        try:
            Preset.parse({**cls.preset_given(), **preset})
        except ConfigError as error:
            if isinstance(preset, Mapping) and not preset.keys() <= set(KEYS):
                raise PresetKeyError(str(error)) from None
            raise
        for key, value in preset.items():
            cls._held[key] = Held(copy.deepcopy(value), None, applied=True)

    def clear_preset(cls) -> None:
        """Forget what `apply_preset` and assignments to this class have set."""
        cls._held.clear()

    def preset_given(cls) -> dict[str, Any]:
        """The keys that `apply_preset`, assignments and changes in place have set, as they are now."""
        found: dict[str, Any] = {}
        for each in reversed([*cls._line()]):
            found |= {key: held.value for key, held in each._held.items() if held.given}
        return found

    def preset_in_force(cls) -> Preset | None:
        """For a network that is made now; None when nothing was set. Raises `ConfigError` for what is no preset."""
        given = cls.preset_given()
        return Preset.parse(given) if given else None

    def preset_value(cls, key: str) -> Any:
        """What counts for one key: a list or a map of this class alone, which may be changed in place."""
        own = cls._held.get(key)
        if own is not None and own.given:
            return own.value
        inherited = cls._find_inherited(key)
        if own is None or own.inherited != inherited:
            own = cls._held[key] = Held(copy.deepcopy(inherited), copy.deepcopy(inherited))
        return own.value

    def _find_inherited(cls, key: str) -> Any:
        above = [each._held[key] for each in cls._line() if each is not cls and key in each._held]
        defaults: Any = cls
        return next((held.value for held in above if held.given), defaults._defaults().get(key))

    def _assign(cls, key: str, value: Any) -> None:
        # A pattern that is none by itself may be one once USE_FNMATCH is assigned.
        Preset.parse({key: value, **({} if key == "use_fnmatch" else {"use_fnmatch": True})})
        cls._held[key] = Held(value, copy.deepcopy(cls._find_inherited(key)))

    def _line(cls) -> Iterator[PresetClass]:
        """This class and those that it has its preset from."""
        for each in cls.__mro__:
            if isinstance(each, PresetClass):
                yield each
            if "_defaults" in vars(each):
                return

    def _find(cls, name: str) -> Setting | None:
        return next((s for each in cls.__mro__ if (s := _setting(vars(each).get(name)))), None)


class ClassPreset(nn.Module, metaclass=PresetClass):
    """A network whose class has a preset."""

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
        """Targets for the networks made from now on; each keeps what was set when it was made.

        Keys: see `lycoris.targeting.preset.Preset`; those that are not given stay. Raises `PresetKeyError` for an
        unknown key.
        """
        cls.apply_to_class(preset)
        return cls

    def match_fn(self, pattern: str, name: str) -> bool:
        """Whether a pattern of the class's preset means the path of a layer."""
        return self._preset_now().matches(pattern, name)

    def is_excluded(self, name: str, patterns: Sequence[str] | None = None) -> bool:
        """Whether a path gets nothing, by these patterns or by those of the class's preset."""
        preset = self._preset_now()
        excluding = preset.exclude_name if patterns is None else patterns
        return bool(name) and any(preset.means(pattern, name) for pattern in excluding)

    def find_conf_for_name(self, name: str) -> Mapping[str, Any] | None:
        """The settings that the class's `NAME_ALGO_MAP` has for a path."""
        preset = self._preset_now()
        if name in preset.name_algo_map:
            return preset.name_algo_map[name]
        return next((own for pattern, own in preset.name_algo_map.items() if preset.matches(pattern, name)), None)

    def _preset_now(self) -> Preset:
        return type(self).preset_in_force() or Preset()

    @classmethod
    def _defaults(cls) -> Mapping[str, Any]:
        """What counts where nothing is given, as a JSON object."""
        return {each.name: _plain(getattr(Preset(), each.name)) for each in fields(Preset)}


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return list(value)
    return dict(value) if isinstance(value, Mapping) else value


def _unknown(cls: PresetClass, name: str) -> str:
    own = {attribute: key for attribute, key in SETTINGS.items() if cls._find(attribute) is not None}
    by_key = {key: attribute for attribute, key in own.items()}
    if name in by_key:
        return f"{cls.__name__}.{name} would have no effect: the class attribute is {by_key[name]}"
    if name in PIPELINE:
        return (
            f"{cls.__name__}.{name} would have no effect: networks over one model have no such setting, but "
            f"LycorisNetworkKohya has; here it is {name.split('_', 1)[1].replace('ENCODER_', '')}"
        )
    close = nearest(name, own, limit=1)
    hint = f"; did you mean {close[0]}?" if close else "."
    return f"{cls.__name__} has no setting {name}{hint} Its settings are {', '.join(sorted(own))}"
