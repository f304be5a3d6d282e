"""Parse `adapter_config.json`: which settings exist, which affect the weights, and which are refused."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

from lycoris.errors import ConfigError, FileError, unknown
from lycoris.files.container.kinds import CONFIG, PICKLE, WEIGHTS
from lycoris.json_io import read_json

UNSET_VALUES: Sequence[object] = (None, False, "", [], {}, ())
"""Values of a setting that is not in use."""
LARGEST_CONFIG = 4 * 2**20
"""Bytes that a config may have: thousands of paths fit."""
LONGEST_PATTERN = 1000
"""Characters that a pattern for one layer's rank or alpha may have."""

_NO_EFFECT = (
    "peft_type task_type auto_mapping peft_version base_model_name_or_path revision inference_mode target_modules "
    "exclude_modules layers_to_transform layers_pattern modules_to_save"
)
_LYCORIS = "r alpha rank_pattern alpha_pattern rank_dropout module_dropout init_weights use_effective_conv2d"


@dataclass(frozen=True)
class PeftType:
    """The settings and tensors of one `peft_type`.

    A setting that is neither known nor refused is accepted while it is off.
    """

    tensors: tuple[str, ...]
    """Names of its tensors."""
    known: frozenset[str]
    """Settings that are used, or that say nothing about the weights."""
    refused: frozenset[str] = frozenset()
    """Settings that make another method of it, unless they are off."""


def _make_peft_type(tensors: str, known: str, refused: str = "") -> PeftType:
    return PeftType(tuple(tensors.split()), frozenset(f"{_NO_EFFECT} {known}".split()), frozenset(refused.split()))


PEFT_TYPES: Mapping[str, PeftType] = MappingProxyType(
    {
        "LORA": _make_peft_type(
            "lora_A lora_B lora_embedding_A lora_embedding_B lora_magnitude_vector",
            "r lora_alpha rank_pattern alpha_pattern lora_dropout fan_in_fan_out bias use_rslora use_dora lora_bias "
            "init_lora_weights megatron_config megatron_core loftq_config eva_config corda_config lora_ga_config "
            "velora_config qalora_group_size runtime_config",
            "use_qalora alora_invocation_tokens arrow_config kasa_config use_bdlora monteclora_config "
            "layer_replication target_parameters trainable_token_indices ensure_weight_tying",
        ),
        "LOHA": _make_peft_type("hada_w1_a hada_w1_b hada_w2_a hada_w2_b hada_t1 hada_t2", _LYCORIS),
        "LOKR": _make_peft_type(
            "lokr_w1 lokr_w1_a lokr_w1_b lokr_w2 lokr_w2_a lokr_w2_b lokr_t2",
            f"{_LYCORIS} decompose_both decompose_factor rank_dropout_scale",
        ),
        "IA3": _make_peft_type("ia3_l", "feedforward_modules fan_in_fan_out init_ia3_weights"),
        "OFT": _make_peft_type(
            "oft_R oft_embedding_R",
            "r oft_block_size module_dropout fan_in_fan_out bias init_weights coft eps block_share use_cayley_neumann "
            "num_cayley_neumann_terms",
        ),
        "BOFT": _make_peft_type(
            "boft_R boft_s",
            "boft_block_size boft_block_num boft_n_butterfly_factor boft_dropout fan_in_fan_out bias init_weights",
        ),
    }
)

LORA_METADATA = "lora_adapter_metadata"
"""Where diffusers has the settings of a LoRA, in the header of its file."""
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Beginnings of `init_lora_weights` for which PEFT takes something away from the base weight when it loads."""


@dataclass(frozen=True)
class PeftConfig:
    """A validated `adapter_config.json`.

    Make it with `parse`. Defaults are PEFT's.
    """

    type: str
    values: Mapping[str, Any]

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> PeftConfig:
        """Validate settings.

        Unknown settings are accepted while they are off (`UNSET_VALUES`), since that is how a later PEFT adds them.

        Raises:
            FileError: A type or a setting is unknown, or would mean something that is not supported.
        """
        given = values.get("peft_type")
        name = str(getattr(given, "value", given))
        if name not in PEFT_TYPES:
            raise FileError(unknown("peft_type", name, PEFT_TYPES) + ". In PEFT, merge it into the model instead")
        kind = PEFT_TYPES[name]
        for key, value in values.items():
            if key in kind.refused and value:
                raise FileError(
                    f"{key} = {value!r:.80} makes another method of {name}, which is not read here; {_MERGE}"
                )
            # What a later PEFT adds is off by default, and does nothing as long as it is.
            if key not in kind.known | kind.refused and value not in UNSET_VALUES:
                raise FileError(unknown(f"setting of {name}", str(key), kind.known | kind.refused))
        config = cls(name, values)
        config._check()
        return config

    def _check(self) -> None:
        init = self.values.get("init_lora_weights")
        if isinstance(init, str) and init.lower().startswith(_CHANGES_BASE):
            raise FileError(
                f"init_lora_weights = {init!r}: these tensors belong to a base weight from which PEFT takes their "
                "start away. Save them with PEFT's path_initial_model_for_weight_conversion, which makes plain LoRA of "
                "them"
            )
        if self.get_flag("use_dora") and self.get_flag("lora_bias"):
            raise FileError("use_dora with lora_bias is no combination of PEFT's")
        for name in ("rank_pattern", "alpha_pattern"):
            self._check_pattern(name)
        self.list_saved_modules()
        if self.get_text("bias", "none") not in ("none", "all", "lora_only", "oft_only", "boft_only"):
            raise FileError(f"bias must be none, all or <type>_only, not {self.values['bias']!r:.80}")

    def _check_pattern(self, name: str) -> None:
        pattern = self.values.get(name) or {}
        if not isinstance(pattern, Mapping):
            raise FileError(f"{name} must map names to numbers, not {pattern!r:.80}")
        for key, value in pattern.items():
            _check_number(f"{name}[{key!r:.80}]", value)
            _compile_layer_pattern(str(key))

    def get_flag(self, name: str, default: bool = False) -> bool:
        """Return a boolean setting.

        Raises `FileError` if it is not true, false or null (which counts as false).
        """
        value = self.values.get(name, default)
        if value is not None and not isinstance(value, bool):
            raise FileError(f"{name} must be true or false, not {value!r:.80}")
        return bool(value)

    def get_number(self, name: str, default: float) -> float:
        """Return a numeric setting.

        Raises `FileError` if it is not a finite number.
        """
        return _check_number(name, self.values.get(name, default))

    def get_text(self, name: str, default: str) -> str:
        value = self.values.get(name)
        return default if value is None else str(value)

    def list_saved_modules(self) -> tuple[str, ...]:
        """Return the names in `modules_to_save`, sorted.

        Raises `FileError` if it is not a list of names.
        """
        return _check_names("modules_to_save", self.values.get("modules_to_save"))

    def get_rank(self, path: str) -> int:
        """Return the rank of a layer: that of the first matching `rank_pattern`, or `r`.

        Raises `FileError` unless it is a whole number of at least 1.
        """
        value = self._match_path("rank_pattern", path, "r", 8)
        if value < 1 or value != int(value):
            raise FileError(f"the rank of {path} must be an integer of at least 1, not {value!r}")
        return int(value)

    def get_alpha(self, path: str) -> float:
        return self._match_path("alpha_pattern", path, "lora_alpha" if self.type == "LORA" else "alpha", 8)

    def get_scale(self, path: str) -> float:
        """Return the factor of a layer's ΔW: alpha / rank, or alpha / √rank with `use_rslora`.

        Rank and alpha are those of the layer, where patterns give it its own.

        Args:
            path: the layer's path in the model.
        """
        rank = self.get_rank(path)
        return self.get_alpha(path) / (math.sqrt(rank) if self.get_flag("use_rslora") else rank)

    def _match_path(self, patterns: str, path: str, name: str, default: float) -> float:
        """PEFT's rule: the first pattern listed that matches the whole path, or its end behind a dot."""
        for key, value in (self.values.get(patterns) or {}).items():
            if _compile_layer_pattern(key).match(path):
                return float(value)
        return self.get_number(name, default)

    def is_on_input(self, path: str) -> bool:
        """Return whether IA3 scales the input of this layer rather than its output.

        As `feedforward_modules` says: a list of suffixes of paths, or a regular expression for the entire path.
        """
        given = self.values.get("feedforward_modules")
        if isinstance(given, str):
            return bool(_compile_regex("feedforward_modules", given).fullmatch(path))
        return any(path.endswith(name) for name in _check_names("feedforward_modules", given))


_MERGE = "merge it into the model with PEFT's merge_and_unload instead"


def load_config(folder: Path) -> dict[str, Any]:
    """Load the config of a PEFT folder.

    Raises:
        FileError: It is missing, larger than `LARGEST_CONFIG`, not a JSON object, or a link out of the folder.
    """
    path = resolve_inside(folder, CONFIG)
    if not path.is_file():
        there = ", ".join(sorted(p.name for p in folder.iterdir())[:5]) if folder.is_dir() else ""
        raise FileError(f"{folder} is no folder with an {CONFIG}" + (f"; it has {there}" if there else ""))
    if path.stat().st_size > LARGEST_CONFIG:
        raise FileError(f"{path} has {path.stat().st_size} bytes; a config has at most {LARGEST_CONFIG}")
    try:
        return read_json(path)
    except ConfigError as error:
        raise FileError(str(error)) from error


def find_weights(folder: Path) -> Path:
    """Return the path of the weights in a PEFT folder.

    The safetensors file, unless only the older pickle exists. It need not exist.
    """
    there = [name for name in (WEIGHTS, PICKLE) if resolve_inside(folder, name).is_file()]
    return folder / (there[0] if there else WEIGHTS)


def resolve_inside(folder: Path, name: str) -> Path:
    """Return the path of a file in a folder, refusing links that lead out of it.

    A folder of the Hugging Face cache links to the blobs of its repository, which is allowed.

    Raises:
        FileError: The file leads elsewhere.
    """
    path = folder / name
    root = folder.resolve()
    allowed = [root, *([root.parent.parent / "blobs"] if root.parent.name == "snapshots" else [])]
    if path.exists() and not any(path.resolve().is_relative_to(place) for place in allowed):
        raise FileError(f"{path} leads out of its folder, to {path.resolve()}; copy the file itself there")
    return path


@lru_cache(maxsize=4096)
def _compile_layer_pattern(pattern: str) -> re.Pattern[str]:
    if len(pattern) > LONGEST_PATTERN:
        raise FileError(f"a pattern has {len(pattern)} characters; {LONGEST_PATTERN} are read: {pattern[:60]!r}...")
    return _compile_regex("a pattern", rf"(.*\.)?({pattern})$")


def _compile_regex(what: str, pattern: str) -> re.Pattern[str]:
    # Repeated repetitions can take longer than anyone waits, and no name needs them.
    if re.search(r"[+*}]\)*[+*{]", pattern.replace(r"(.*\.)?", "")):
        raise FileError(f"{what} repeats a repetition, which is not read: {pattern!r:.80}")
    try:
        return re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise FileError(f"{what} is no regular expression: {pattern!r:.80} ({error})") from error


def _check_number(what: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise FileError(f"{what} must be a finite number, not {value!r:.80}")
    return float(value)


def _check_names(what: str, value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    if not isinstance(value, list | tuple | set | frozenset) or not all(isinstance(name, str) for name in value):
        raise FileError(f"{what} must be a list of names, not {value!r:.80}")
    return tuple(sorted(value))
