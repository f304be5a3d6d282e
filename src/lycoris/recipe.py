"""`lycoris_config.json`: the settings that trainers hand over, and the plan that they mean for a model.

Names, defaults and matching rules are those that existing configs rely on. Every option is honoured, refused, or
remarked upon; none is dropped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from torch import nn

from lycoris.algorithm import Algorithm, Ranked
from lycoris.algorithms import DoRA, Full, LoHa, LoKr, LoRA, TLoRA
from lycoris.errors import ConfigError, PlanError, nearest, unknown
from lycoris.geometry import Geometry
from lycoris.planning import Plan, block_classes, place
from lycoris.preset import LAYER_CLASSES, Preset
from lycoris.schedule import RankSchedule


class Option(NamedTuple):
    """How a config's option reaches an algorithm."""

    field: str | None
    """The algorithm's own name for it; None: not a field of an algorithm."""
    algorithms: tuple[str, ...]
    kind: type
    built: bool = True
    """False: known to some algorithm or mode that is not built yet; only a value that leaves it off is accepted."""


ALGORITHMS: tuple[tuple[str, type[Algorithm] | None], ...] = (
    ("lora", LoRA),
    ("locon", LoRA),
    ("loha", LoHa),
    ("lokr", LoKr),
    ("full", Full),
    ("tlora", TLoRA),
    ("dylora", None),
    ("glora", None),
    ("diag-oft", None),
    ("boft", None),
    ("ia3", None),
)
"""Names in configs; None: known to the format, not built yet."""

RANKED = ("lora", "locon", "loha", "lokr", "tlora", "dylora", "glora")
FACTORED = ("lora", "locon", "loha", "lokr")
ALL = tuple(name for name, _ in ALGORITHMS)

OPTIONS: Mapping[str, Option] = {
    "use_tucker": Option("tucker", FACTORED, bool),
    "use_scalar": Option("gate", (*FACTORED, "glora"), bool),
    "rs_lora": Option("rs_lora", RANKED, bool),
    "factor": Option("factor", ("lokr",), int),
    "full_matrix": Option("full_matrix", ("lokr",), bool),
    "decompose_both": Option("decompose_both", ("lokr",), bool),
    "unbalanced_factorization": Option("unbalanced", ("lokr",), bool),
    "sig_type": Option("vectors", ("tlora",), str),
    "use_data_init": Option("data_init", ("tlora",), bool),
    "dora_wd": Option(None, FACTORED, bool),
    "weight_decompose": Option(None, FACTORED, bool),
    "wd_on_output": Option(None, FACTORED, bool),
    "wd_on_out": Option(None, FACTORED, bool),
    "tlora_min_rank": Option(None, ("tlora",), int),
    "tlora_alpha": Option(None, ("tlora",), float),
    "bypass_mode": Option(None, ALL, bool),
    "dropout": Option(None, ALL, float, built=False),
    "rank_dropout": Option(None, ALL, float, built=False),
    "module_dropout": Option(None, ALL, float, built=False),
    "rank_dropout_scale": Option(None, ALL, bool, built=False),
    "train_norm": Option(None, ALL, bool, built=False),
    "train_llm_adapter": Option(None, ALL, bool, built=False),
    "block_size": Option(None, ("dylora",), int),
    "constraint": Option(None, ("diag-oft", "boft"), float),
    "rescaled": Option(None, ("diag-oft", "boft"), bool),
    "train_on_input": Option(None, ("ia3",), bool),
    "mask_group_id": Option(None, ("tlora",), int, built=False),
}
"""Options that any algorithm of the format knows. `bypass_mode` has no effect: every path here is exact."""

SIZES = ("linear_dim", "linear_alpha", "conv_dim", "conv_alpha")
TOP = ("algo", "multiplier", *SIZES, "apply_preset", "preset")
OVERRIDE = ("algo", "dim", "alpha", "linear_dim", "linear_alpha", "conv_dim", "conv_alpha")

PRESETS_WITH_CONV: Mapping[str, bool] = {
    "full": True,
    "full-lin": False,
    "attn-mlp": False,
    "attn-only": False,
    "unet-only": True,
    "unet-transformer-only": False,
    "unet-convblock-only": True,
}
"""Built-in presets by name. For one model they only say whether convolutions with a real kernel are meant."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A parsed `lycoris_config.json`."""

    algo: str = "lora"
    multiplier: float = 1.0
    linear_dim: int = 4
    linear_alpha: float | None = 1.0
    conv_dim: int | None = None
    conv_alpha: float | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    preset: Preset = field(default_factory=Preset)
    given: Mapping[str, Any] = field(default_factory=dict)
    """The JSON object as it came."""
    remarks: tuple[str, ...] = ()

    @classmethod
    def parse(cls, given: Mapping[str, Any], *, strict: bool = True, preset: Preset | None = None) -> Recipe:
        """Check a config and read it.

        Raises `ConfigError` for a wrong value and, when `strict`, for a key that nothing knows; otherwise such a key
        becomes a remark. `preset` stands in for a missing `apply_preset`.
        """
        remarks: list[str] = []
        algo = str(given.get("algo", "lora")).lower()
        _algorithm_class(algo)
        options = _options(algo, {k: v for k, v in given.items() if k not in TOP}, "", strict, remarks)
        wanted = given.get("apply_preset")
        if wanted:
            preset = Preset.parse(wanted)
        preset = _with_named(preset or Preset(), wanted or {}, given.get("preset"))
        for where, maps in (("module_algo_map", preset.module_algo_map), ("name_algo_map", preset.name_algo_map)):
            for name, override in maps.items():
                inner = str(override.get("algo", algo)).lower()
                _algorithm_class(inner)
                rest = {k: v for k, v in override.items() if k not in OVERRIDE}
                _options(inner, rest, f" in {where}[{name!r}]", strict, remarks)
        return cls(
            algo=algo,
            multiplier=_number(given.get("multiplier", 1.0), "multiplier", float),
            linear_dim=_number(given.get("linear_dim") or 4, "linear_dim", int),
            linear_alpha=_optional(given.get("linear_alpha", 1.0), "linear_alpha", float),
            conv_dim=_optional(given.get("conv_dim"), "conv_dim", int),
            conv_alpha=_optional(given.get("conv_alpha"), "conv_alpha", float),
            options=options,
            preset=preset,
            given=dict(given),
            remarks=tuple(dict.fromkeys(remarks)),
        )

    def as_dict(self) -> dict[str, Any]:
        """The JSON object as it came."""
        return dict(self.given)

    @property
    def schedule(self) -> RankSchedule | None:
        """Of the ranks that count by timestep; None for algorithms without one."""
        if self.algo != "tlora":
            return None
        return RankSchedule(
            max_rank=self.linear_dim,
            min_rank=int(self.options.get("tlora_min_rank", 1)),
            alpha=float(self.options.get("tlora_alpha", 1.0)),
        )

    def plan(self, model: nn.Module) -> Plan:
        """What each layer of a model gets. Raises `PlanError` when nothing matches, naming the model's classes."""

        def choose(
            path: str, layer: nn.Module, around: Sequence[nn.Module], geometry: Geometry
        ) -> tuple[Algorithm, ...] | None:
            override = self.preset.options_for(path, layer, around)
            if override is None or not (geometry.pointwise or self.preset.enable_conv):
                return None
            return (self.algorithm(geometry, override),)

        made = place(model, choose, [*self.remarks, *self._unmatched(model)])
        if not made.placements:
            raise PlanError(self._nothing(model))
        return made

    def algorithm(self, geometry: Geometry, override: Mapping[str, Any]) -> Algorithm:
        """The algorithm for a layer of this shape, with a preset's own settings over the general ones."""
        algo = str(override.get("algo", self.algo)).lower()
        own = _options(algo, {k: v for k, v in override.items() if k not in OVERRIDE}, "", False, [])
        options = {**self.options, **own}
        cls = _algorithm_class(algo)
        values = {
            entry.field: options[name]
            for name, entry in OPTIONS.items()
            if entry.field and name in options and algo in entry.algorithms
        }
        if not issubclass(cls, Ranked):
            return cls.from_options(values)
        rank, alpha = self._size(geometry, override)
        made = cls.from_options(values | {"rank": rank, "alpha": alpha})
        if algo in FACTORED and (options.get("dora_wd") or options.get("weight_decompose")):
            on_out = options.get("wd_on_output", options.get("wd_on_out", True))
            return DoRA(over=made, axis="out" if on_out else "in")
        return made

    def _size(self, geometry: Geometry, override: Mapping[str, Any]) -> tuple[int, float | None]:
        """Rank and alpha; alpha 0 or none means the rank, and convolutions fall back on the linear sizes."""
        rank, alpha = self.linear_dim, self.linear_alpha
        names = ("linear_dim", "linear_alpha")
        if not geometry.pointwise:
            rank = self.conv_dim or rank
            alpha = self.conv_alpha if self.conv_alpha is not None else alpha
            names = ("conv_dim", "conv_alpha")
        rank = _number(override.get("dim") or override.get(names[0]) or rank, "dim", int)
        alpha = _optional(override.get("alpha", override.get(names[1], alpha)), "alpha", float)
        return rank, alpha or None

    def _unmatched(self, model: nn.Module) -> list[str]:
        """Targets that the user named and that this model does not have."""
        classes = {type(module).__name__ for module in model.modules()}
        paths = [path for path, _ in model.named_modules()]
        named = [name for name in self.preset.target_module if self.preset.target_module != LAYER_CLASSES]
        missing = [name for name in dict.fromkeys([*named, *self.preset.module_algo_map]) if name not in classes]
        patterns = (*self.preset.target_name, *self.preset.name_algo_map, *self.preset.exclude_name)
        missing += [p for p in patterns if not any(self.preset.matches(p, path) for path in paths)]
        return [f"{name!r} matches nothing in {type(model).__name__}" for name in missing]

    def _nothing(self, model: nn.Module) -> str:
        have = block_classes(model)
        wanted = [*self.preset.target_module, *self.preset.module_algo_map]
        wanted += [*self.preset.target_name, *self.preset.name_algo_map]
        close = sorted({hit for name in wanted for hit in nearest(name, have, limit=1)})
        hint = f" Did you mean {', '.join(close)}?" if close else ""
        return (
            f"no layer of {type(model).__name__} is meant by the targets {', '.join(dict.fromkeys(wanted))}.{hint} "
            f"Classes with layers that adapters can serve: {', '.join(have) or '(none)'}"
        )


def _algorithm_class(name: str) -> type[Algorithm]:
    known = dict(ALGORITHMS)
    if name not in known:
        raise ConfigError(unknown("algorithm", name, known))
    cls = known[name]
    if cls is None:
        built = ", ".join(algo for algo, made in ALGORITHMS if made)
        raise ConfigError(f"algorithm {name!r} is not built yet; there are {built}")
    return cls


def _with_named(preset: Preset, given: Mapping[str, Any], name: Any) -> Preset:
    if name is None:
        return preset
    if str(name) not in PRESETS_WITH_CONV:
        raise ConfigError(unknown("preset", str(name), PRESETS_WITH_CONV))
    if "enable_conv" in given:
        return preset
    return replace(preset, enable_conv=PRESETS_WITH_CONV[name])


def _options(algo: str, given: Mapping[str, Any], where: str, strict: bool, remarks: list[str]) -> dict[str, Any]:
    """Options that reach the algorithm or the recipe. The others are refused or remarked upon."""
    options: dict[str, Any] = {}
    for name, value in given.items():
        if name not in OPTIONS:
            text = unknown("option", name, [*OPTIONS, *(OVERRIDE if where else TOP)]) + where
            if strict:
                raise ConfigError(text)
            remarks.append(f"{text}; it was ignored")
            continue
        entry = OPTIONS[name]
        parsed = _optional(value, name, entry.kind)
        if not entry.built:
            if parsed:
                raise ConfigError(
                    f"{name} = {value!r}{where} is not built yet; leave it out or set it to {entry.kind()!r}"
                )
        elif algo not in entry.algorithms:
            if parsed:
                remarks.append(f"{algo} has no {name}{where}; it is for {', '.join(entry.algorithms)}")
        elif parsed is not None:
            options[name] = parsed
    return options


def _optional(value: Any, name: str, kind: type) -> Any:
    return None if value is None else _number(value, name, kind)


def _number(value: Any, name: str, kind: type) -> Any:
    """A value of the wanted type; kohya-style callers hand strings over, and false for "none"."""
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
