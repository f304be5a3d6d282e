"""Presets: which modules of a model are meant, by class and by name, with settings of their own."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

from lycoris.errors import ConfigError, unknown
from lycoris.targeting.remarks import Remark

if TYPE_CHECKING:
    from torch import nn

    from lycoris.layers.sites import Site

Options = Mapping[str, Any]

LAYER_CLASSES = ("Linear", "Conv1d", "Conv2d", "Conv3d", "GroupNorm", "LayerNorm")


PRESETS_WITH_CONV: Mapping[str, bool] = {
    "full": True,
    "full-lin": False,
    "attn-mlp": False,
    "attn-only": False,
    "unet-only": True,
    "unet-transformer-only": False,
    "unet-convblock-only": True,
    "ia3": False,
}
"""Built-in presets by name. For one model they only say whether convolutions with a real kernel are meant."""


@dataclass(frozen=True, kw_only=True)
class Preset:
    """The `apply_preset` part of a config. A layer is matched by its name first, else by the classes around it.

    The constructor takes values as they are; `parse` checks them.
    """

    enable_conv: bool = True
    """Whether convolutions with a real kernel get adapters; 1x1 ones count as linear."""
    target_module: tuple[str, ...] = LAYER_CLASSES
    """Class names: of a layer itself, or of a module all of whose layers are meant. `*` and `?` are wildcards."""
    target_name: tuple[str, ...] = ()
    """Patterns for dotted layer paths."""
    module_algo_map: Mapping[str, Options] = field(default_factory=dict)
    """Class name → settings for the layers in it. Its keys count as targets; the innermost class wins."""
    name_algo_map: Mapping[str, Options] = field(default_factory=dict)
    """Pattern → settings for the layers whose path it matches. Its keys count as targets."""
    exclude_name: tuple[str, ...] = ()
    """Patterns for paths that get nothing, whatever else matches."""
    use_fnmatch: bool = False
    """Patterns are globs that match whole paths. False: regular expressions that match from the start of the path."""
    lora_prefix: str = "lycoris"
    """What names in the file start with."""
    unet_target_module: tuple[str, ...] = ()
    """For the kohya interface; here and below accepted so that one preset serves both."""
    unet_target_name: tuple[str, ...] = ()
    text_encoder_target_module: tuple[str, ...] = ()
    text_encoder_target_name: tuple[str, ...] = ()

    @classmethod
    def parse(cls, given: Mapping[str, Any]) -> Preset:
        """Check a JSON object, and make a preset of it.

        Raises:
            ConfigError: A key is unknown, a value is of the wrong type, or a pattern is no regular expression although
                `use_fnmatch` is off.
        """
        if not isinstance(given, Mapping):
            raise ConfigError(f"a preset must be an object with keys such as target_module, not {given!r}")
        known = {f.name: f for f in fields(cls)}
        values: dict[str, Any] = {}
        for key, value in given.items():
            if key not in known:
                raise ConfigError(unknown("preset key", key, known))
            values[key] = _check_value(key, value)
        for pattern in (
            *values.get("target_name", ()),
            *values.get("exclude_name", ()),
            *values.get("name_algo_map", ()),
        ):
            if not values.get("use_fnmatch", False):
                _compile_target_pattern(pattern)
        return cls(**values)

    def options_for(self, path: str, layer: nn.Module, around: Sequence[nn.Module]) -> Options | None:
        """Return a layer's own settings, {} when it is meant and has none; None when it is not meant.

        `exclude_name` counts first, then the pattern that matches its path, then its class and those around it.

        Args:
            around: The modules around the layer, from the nearest out.
        """
        if self.excludes(path):
            return None
        by_class = self._by_class([type(module).__name__ for module in (layer, *around)])
        named = self._first((*self.name_algo_map, *self.target_name), path)
        if named is None:
            return by_class
        return self.name_algo_map.get(named, by_class or {})

    def names(self, place: Site) -> bool:
        """Return whether a pattern asks for a layer by the last part of its path, or a target by a class of its own.

        A class of its own is one that is not in `LAYER_CLASSES`. Wildcards do not count as names.
        """
        from lycoris.layers.tied_parameters import spells_out

        own = type(place.module).__name__
        patterns = (*self.name_algo_map, *self.target_name)
        by_class = own not in LAYER_CLASSES and own in (*self.module_algo_map, *self.target_module)
        return by_class or any(spells_out(each, place.path) and self.means(each, place.path) for each in patterns)

    def excludes(self, path: str) -> bool:
        """Whether a path is one that gets nothing."""
        return self._first(self.exclude_name, path) is not None

    def _by_class(self, classes: Sequence[str]) -> Options | None:
        found = (_class_in(self.module_algo_map, name) for name in classes)
        mapped = next((target for target in found if target is not None), None)
        if mapped is not None:
            return self.module_algo_map[mapped]
        return {} if any(_class_in(self.target_module, name) is not None for name in classes) else None

    def _first(self, patterns: Sequence[str], path: str) -> str | None:
        if path in patterns:
            return path
        return next((pattern for pattern in patterns if self.matches(pattern, path)), None)

    def overrides(self) -> tuple[Options, ...]:
        """Return the settings of `module_algo_map`, then those of `name_algo_map`.

        The very mappings, without the names that they are for.
        """
        return (*self.module_algo_map.values(), *self.name_algo_map.values())

    def for_pipelines(self) -> list[str]:
        """Return the keys that were given and that only the kohya interface reads.

        Keys with an empty list count as not given.
        """
        return [f.name for f in fields(self) if f.name.startswith(("unet_", "text_encoder_")) and getattr(self, f.name)]

    def means(self, pattern: str, path: str) -> bool:
        """Return whether a pattern, or the very path, means a path.

        A path that is given in full means itself, even where it does not match itself as a regular expression.
        """
        return pattern == path or self.matches(pattern, path)

    def matches(self, pattern: str, path: str) -> bool:
        """Return whether a pattern means a path.

        With `use_fnmatch` a glob that matches the whole path, with case; else a regular expression that matches from
        its start.

        Raises:
            ConfigError: It is no regular expression.
        """
        if self.use_fnmatch:
            return fnmatch.fnmatchcase(path, pattern)
        return _compile_target_pattern(pattern).match(path) is not None


def with_named(preset: Preset, given: Mapping[str, Any], name: Any, remarks: list[Remark]) -> Preset:
    """Return a preset with what a built-in one of that name says about convolutions, remarked upon.

    Args:
        given: The `apply_preset` of the config; an `enable_conv` in it wins.
        name: None: no built-in one is asked for, and the preset is returned as it is.
        remarks: The remark is appended here.

    Raises:
        ConfigError: No built-in preset has the name.
    """
    if name is None:
        return preset
    if str(name) not in PRESETS_WITH_CONV:
        raise ConfigError(unknown("preset", str(name), PRESETS_WITH_CONV))
    on = PRESETS_WITH_CONV[str(name)]
    remarks.append(
        Remark(
            f"for one model the preset {str(name)!r} only says that convolutions with a real kernel "
            f"{'get' if on else 'do not get'} adapters; name targets in apply_preset"
        )
    )
    if "enable_conv" in given:
        return preset
    return replace(preset, enable_conv=on)


def names_class(target: str, name: str) -> bool:
    """Return whether a target, which may have wildcards, means the class of a name.

    With case; the whole name has to match.
    """
    return target == name or fnmatch.fnmatchcase(name, target)


def _class_in(targets: Collection[str], name: str) -> str | None:
    """The target that means a class: its very name before a wildcard."""
    return name if name in targets else next((target for target in targets if names_class(target, name)), None)


def _compile_target_pattern(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ConfigError(
            f"{pattern!r} is not a regular expression ({error}); for wildcards set use_fnmatch to true"
        ) from None


def _check_value(key: str, value: Any) -> Any:
    if key in ("enable_conv", "use_fnmatch"):
        if not isinstance(value, bool):
            raise ConfigError(f"preset key {key!r} must be true or false, not {value!r}")
        return value
    if key == "lora_prefix":
        if not isinstance(value, str) or "." in value or not value:
            raise ConfigError(f"preset key 'lora_prefix' must be a word without dots, not {value!r}")
        return value
    if key.endswith("_map"):
        if not isinstance(value, Mapping) or not all(isinstance(options, Mapping) for options in value.values()):
            raise ConfigError(f"preset key {key!r} must map names to objects of settings, not {value!r}")
        return {name: dict(options) for name, options in value.items()}
    if isinstance(value, str) or not isinstance(value, Sequence) or not all(isinstance(name, str) for name in value):
        raise ConfigError(f"preset key {key!r} must be a list of names, not {value!r}")
    return tuple(value)
