"""`LycorisNetworkKohya`: the adapters of a denoiser and its text encoders."""

from __future__ import annotations

import dataclasses
import logging
import warnings
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor, nn

from lycoris.adapters.adapter_set import AdapterSet
from lycoris.algorithms import LoHa, LoKr, LoRA
from lycoris.algorithms.base import Algorithm
from lycoris.compat import timestep_masks
from lycoris.compat.assignable import ReadOnlyList
from lycoris.compat.base_module import LycorisBaseModule
from lycoris.compat.class_preset import Setting
from lycoris.compat.model_hashes import compute_model_hashes
from lycoris.compat.network import LycorisNetwork
from lycoris.compat.patterns import Patterns
from lycoris.compat.presets import PRESET
from lycoris.compat.quantized import check_mergeable
from lycoris.errors import AttachError, ConfigError, FileError
from lycoris.layers.sites import ModelSites
from lycoris.targeting.options import parse_optional

logger = logging.getLogger("LyCORIS")

POSITIONAL_NAMES = (
    *("lora_dim", "conv_lora_dim", "alpha", "conv_alpha", "use_tucker", "dropout", "rank_dropout", "module_dropout"),
    "network_module",
)
"""Positional arguments of the class after its models and the multiplier."""

LORA_PLUS_TENSORS: Mapping[type[Algorithm], tuple[str, ...]] = MappingProxyType(
    {LoRA: ("up",), LoHa: ("w2_a",), LoKr: ("w1", "w1_a", "w1_b")}
)
"""Tensors whose learning rate LoRA+ multiplies: for LoRA as in the paper, for LoHa and LoKr as in sd-scripts."""

Rate: TypeAlias = float | str | None
"""A learning rate, which may be a string; None: the default rate, if any."""


@dataclasses.dataclass(frozen=True)
class Ratios:
    """LoRA+ ratios (arXiv:2402.12354): factors on the learning rate of the tensors in `LORA_PLUS_TENSORS`.

    None everywhere turns LoRA+ off. A ratio of one side takes precedence over the common one.
    """

    loraplus_lr_ratio: float | None = None
    loraplus_unet_lr_ratio: float | None = None
    loraplus_text_encoder_lr_ratio: float | None = None

    def get_unet_ratio(self) -> float | None:
        """Return the ratio for the denoiser, or None: its own, else the common one."""
        return self.loraplus_unet_lr_ratio or self.loraplus_lr_ratio

    def get_text_ratio(self) -> float | None:
        """Return the ratio for text encoders, or None: their own, else the common one."""
        return self.loraplus_text_encoder_lr_ratio or self.loraplus_lr_ratio


class LycorisNetworkKohya(LycorisNetwork):
    """A network over a denoiser and its text encoders, built but not applied.

    Built by `lycoris.kohya.create_network`, `create_network_from_weights`, or the constructor, which takes lycoris-lora
    4.1.3's arguments.
    """

    UNET_TARGET_REPLACE_MODULE = Setting("unet_target_module")
    UNET_TARGET_REPLACE_NAME = Setting("unet_target_name")
    TEXT_ENCODER_TARGET_REPLACE_MODULE = Setting("text_encoder_target_module")
    TEXT_ENCODER_TARGET_REPLACE_NAME = Setting("text_encoder_target_name")
    LORA_PREFIX_UNET: ClassVar[str] = "lora_unet"
    LORA_PREFIX_TEXT_ENCODER: ClassVar[str] = "lora_te"

    ratios = Ratios()
    patterns = Patterns()
    """Of these, `rates` are used for parameter groups."""
    plus: ClassVar[Mapping[type[Algorithm], tuple[str, ...]]] = LORA_PLUS_TENSORS
    for_inference: bool = False
    """Whether `merge_to` is irreversible: the original weights are released layer by layer, and take no memory."""
    _merged_for_good: bool = False

    def __init__(
        self, text_encoder: Any, unet: nn.Module | None = None, multiplier: float = 1.0, *sizes: Any, **options: Any
    ) -> None:
        """Build new adapters by the preset of this class, as `create_network` does.

        After `multiplier` come `POSITIONAL_NAMES`, positionally or by name, then keywords of `create_network`.
        """
        from lycoris.compat.kohya import apply_options, build_parts

        nn.Module.__init__(self)
        given = dict(zip(POSITIONAL_NAMES, sizes, strict=False)) | options
        dim, alpha = given.pop("lora_dim", 4), given.pop("alpha", 1)
        given = {"conv_dim": given.pop("conv_lora_dim", 4), "algo": given.pop("network_module", "locon"), **given}
        warn = given.pop("warn_on_unmatched", True)
        parts, recipe = build_parts(type(self), multiplier, dim, alpha, text_encoder, unet, warn, given)
        self._set_up(parts, recipe.multiplier, recipe.options.get("bypass_mode"), recipe)
        apply_options(self, given)

    @classmethod
    def _defaults(cls) -> Mapping[str, Any]:
        return {**super()._defaults(), **PRESET["full"]}

    @property
    def loraplus_lr_ratio(self) -> float | None:
        """LoRA+ ratio for all models; None: off, unless a side has its own.

        Assigning to it affects parameter groups built afterwards.
        """
        return self.ratios.loraplus_lr_ratio

    @loraplus_lr_ratio.setter
    def loraplus_lr_ratio(self, ratio: float | None) -> None:
        self.ratios = dataclasses.replace(self.ratios, loraplus_lr_ratio=ratio)

    @property
    def loraplus_unet_lr_ratio(self) -> float | None:
        """LoRA+ ratio for the denoiser; None: that of all models.

        Assigning to it affects parameter groups built afterwards.
        """
        return self.ratios.loraplus_unet_lr_ratio

    @loraplus_unet_lr_ratio.setter
    def loraplus_unet_lr_ratio(self, ratio: float | None) -> None:
        self.ratios = dataclasses.replace(self.ratios, loraplus_unet_lr_ratio=ratio)

    @property
    def loraplus_text_encoder_lr_ratio(self) -> float | None:
        """LoRA+ ratio for the text encoders; None: that of all models.

        Assigning to it affects parameter groups built afterwards.
        """
        return self.ratios.loraplus_text_encoder_lr_ratio

    @loraplus_text_encoder_lr_ratio.setter
    def loraplus_text_encoder_lr_ratio(self, ratio: float | None) -> None:
        self.ratios = dataclasses.replace(self.ratios, loraplus_text_encoder_lr_ratio=ratio)

    @property
    def unet_loras(self) -> list[LycorisBaseModule]:
        """The modules of the denoiser, in the order of its layers.

        The list is read-only: changing it raises `ConfigError`.
        """
        return self._get_modules(text=False)

    @property
    def text_encoder_loras(self) -> list[LycorisBaseModule]:
        """The modules of the text encoders, in the order of their layers.

        The list is read-only: changing it raises `ConfigError`.
        """
        return self._get_modules(text=True)

    def _get_modules(self, *, text: bool) -> list[LycorisBaseModule]:
        return ReadOnlyList(module for part in self.parts if part.text is text for module in self._modules_of(part))

    def apply_to(
        self, text_encoder: Any = None, unet: Any = None, apply_text_encoder: bool = True, apply_unet: bool = True
    ) -> None:
        """Attach the adapters. Those of an unwanted side are removed from the network permanently.

        The models are those that the network was built for; `text_encoder` and `unet` are not read. Raises
        `ConfigError` when no adapters would be left, and `AttachError` after an irreversible merge.
        """
        self._check_undoable()
        self._drop_unwanted_parts(text=apply_text_encoder, unet=apply_unet)
        super().apply_to()

    def merge_to(  # type: ignore[override]  # the arguments are those by which trainers call it
        self,
        text_encoder: Any = None,
        unet: Any = None,
        weights_sd: Mapping[str, Tensor] | None = None,
        dtype: torch.dtype | None = None,
        device: Any = None,
        non_blocking: bool = False,
    ) -> None:
        """Merge the adapters at the multiplier. `restore` undoes it exactly, unless the network is `for_inference`.

        The merge is computed in float32 on the layers' own device and rounded once, whatever `dtype` and `device` are.

        Args:
            weights_sd: Tensors whose names select the sides to merge; their values are not read. None: all adapters.

        Raises `RefusedError`, a `RuntimeError`, for weights stored in few bits, and `FileError` when `weights_sd`
        selects no side. The models are unchanged then.
        """
        self._check_undoable()
        if weights_sd is not None:
            sides = [self._list_prefixes(text=text) for text in (True, False)]
            selected = [any(key.startswith(prefixes) for key in weights_sd) for prefixes in sides]
            if not any(selected):
                raise FileError(
                    f"none of the {len(weights_sd)} tensors in weights_sd starts with {self.LORA_PREFIX_UNET} or "
                    f"{self.LORA_PREFIX_TEXT_ENCODER}; pass the tensors returned by create_network_from_weights, or "
                    "None for all adapters of this network"
                )
            self._drop_unwanted_parts(*selected)
        if self.for_inference and not any(part.adapters.rank_masks.are_used for part in self.parts):
            self._merge_for_good()
        else:
            self._merge(1.0)

    def _list_prefixes(self, *, text: bool) -> tuple[str, ...]:
        """Return how names of one side start: usually, and in the file that this network was read from."""
        usual = self.LORA_PREFIX_TEXT_ENCODER if text else self.LORA_PREFIX_UNET
        return usual, *(part.prefix for part in self.parts if part.text is text)

    def _merge_for_good(self) -> None:
        check_mergeable(self._layers())
        if any(part.adapters.attached or part.adapters.merged for part in self.parts):
            raise AttachError("these adapters are already applied or merged; call restore() first")
        self._restore_singles(self.loras)
        for part in self.parts:
            part.adapters.check_mergeable()
        self._merged_for_good = True
        # Issued at the end: where warnings are errors, the first one would leave the model half merged.
        with warnings.catch_warnings(record=True) as issued:
            warnings.simplefilter("always")
            for part in self.parts:
                sites = ModelSites(part.adapters.model)
                for path, stack in part.adapters.stacks.items():
                    # The set holds the original weight, and both are released together.
                    alone = AdapterSet(sites, {path: stack}, name=None)
                    alone.merge(part.adapters.strengths.at(path))
        for each in issued:
            warnings.warn(each.message, stacklevel=3)

    def _check_undoable(self) -> None:
        if self._merged_for_good:
            raise AttachError(
                "this network was built for inference and merged irreversibly: its adapters cannot be changed, "
                "loaded or removed any more. Build it without for_inference for that"
            )

    def _drop_unwanted_parts(self, text: bool, unet: bool) -> None:
        """Remove the adapters of an unwanted side. Raises `ConfigError`, and changes nothing, if none would be left."""
        gone = [part for part in self.parts if not (text if part.text else unet)]
        if len(gone) == len(self.parts):
            have = ", ".join(part.prefix for part in self.parts)
            wanted = [name for name, on in (("text encoders", text), ("the denoiser", unet)) if on]
            raise ConfigError(
                f"no adapters would be left: this network has adapters only for {have}, and those for "
                f"{' and '.join(wanted) or 'no model'} were asked for"
            )
        for part in gone:
            part.adapters.check_detachable()
        self._restore_singles([module for part in gone for module in self._modules_of(part)])
        for part in gone:
            part.adapters.detach()
            for module in self._modules_of(part):
                del self._modules[module.lora_name]
            timestep_masks.untrack_adapters(part.adapters)
            self.parts.remove(part)

    # -- learning rates ----------------------------------------------------------------------------------------------

    def set_loraplus_lr_ratio(
        self, loraplus_lr_ratio: float | None, unet: float | None = None, text_encoder: float | None = None
    ) -> None:
        """Set the LoRA+ ratios: one for all models, and optionally one per side.

        What is not given is None, and turned off. Affects parameter groups built afterwards.
        """
        self.ratios = Ratios(loraplus_lr_ratio, unet, text_encoder)

    def prepare_optimizer_params(
        self,
        text_encoder_lr: Rate | Sequence[Rate] = None,
        unet_lr: Rate = 1e-4,
        learning_rate: Rate = None,
    ) -> tuple[list[dict[str, Any]], list[str]]:
        """Return parameter groups and their names, and make all parameters trainable.

        Groups with learning rate None or 0 are left out, with a log line. `learning_rate` stands in for a side's rate
        that is None. Of several text encoder rates only the first counts;
        `prepare_optimizer_params_with_multiple_te_lrs` uses all.
        """
        first, *_ = _parse_rates(text_encoder_lr)
        return self._build_all_groups([("textencoder", self.text_encoder_loras, first)], unet_lr, learning_rate)

    def prepare_optimizer_params_with_multiple_te_lrs(
        self,
        text_encoder_lr: Rate | Sequence[Rate] = None,
        unet_lr: Rate = 1e-4,
        default_lr: Rate = None,
    ) -> tuple[list[dict[str, Any]], list[str]]:
        """Return parameter groups and their names, with a learning rate per text encoder.

        The last rate given is used for the encoders that follow. Otherwise as `prepare_optimizer_params`.
        """
        if len(set(_parse_rates(text_encoder_lr))) < 2:
            return self.prepare_optimizer_params(text_encoder_lr, unet_lr, default_lr)
        return self._build_all_groups(self._number_encoders(text_encoder_lr), unet_lr, default_lr)

    def _number_encoders(
        self, text_encoder_lr: Rate | Sequence[Rate]
    ) -> list[tuple[str, list[LycorisBaseModule], float | None]]:
        """Return each text encoder with its name, modules and rate."""
        rates = _parse_rates(text_encoder_lr)
        encoders = []
        for part in [part for part in self.parts if part.text]:
            number = int("".join(filter(str.isdigit, part.prefix)) or 1)
            encoders.append((f"textencoder {number}", self._modules_of(part), rates[min(number, len(rates)) - 1]))
        return encoders

    def _build_all_groups(
        self, encoders: Sequence[tuple[str, list[LycorisBaseModule], float | None]], unet_lr: Rate, default_lr: Rate
    ) -> tuple[list[dict[str, Any]], list[str]]:
        """Return the groups of text encoders, each with its name and rate, and of the denoiser."""
        self.requires_grad_(True)
        (unet,), (default,) = _parse_rates(unet_lr), _parse_rates(default_lr)
        sides = [(*encoder, self.ratios.get_text_ratio()) for encoder in encoders]
        groups = []
        for name, modules, rate, ratio in (*sides, ("unet", self.unet_loras, unet, self.ratios.get_unet_ratio())):
            groups += self._build_groups(name, modules, default if rate is None else rate, ratio)
        return [group for group, _ in groups], [label for _, label in groups]

    def _build_groups(
        self, name: str, modules: Sequence[LycorisBaseModule], rate: float | None, ratio: float | None
    ) -> list[tuple[dict[str, Any], str]]:
        """Return groups for layers with rates of their own, in order of appearance, then for the others."""
        own: dict[int, list[LycorisBaseModule]] = {}
        rest: list[LycorisBaseModule] = []
        for module in modules:
            at = self.patterns.rate_for(module._member[1]) if module._member else None
            (rest if at is None else own.setdefault(at, [])).append(module)
        sets = [(f"{name} reg_lr_{at}", found, self.patterns.rates[at][1]) for at, found in own.items()]
        found: list[tuple[dict[str, Any], str]] = []
        effect = False
        for label, members, lr in (*sets, (name, rest, rate)):
            plain, plus = self._split_parameters(members, ratio)
            effect = effect or bool(plus)
            if members and not lr:
                logger.info("%s has no learning rate and is not trained", label)
            elif lr:
                several = (label, plain, lr), (f"{label} plus", plus, lr * (ratio or 1.0))
                found += [({"params": params, "lr": by}, name) for name, params, by in several if params]
        if ratio is not None and modules and not effect:
            logger.warning(
                "LoRA+ has no effect on %s; it is supported for %s",
                name,
                self._list_lora_plus_algorithms() or "no algorithm here",
            )
        return found

    def _split_parameters(
        self, modules: Sequence[LycorisBaseModule], ratio: float | None
    ) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """Split parameters into those without and with the LoRA+ ratio."""
        plain: list[nn.Parameter] = []
        plus: list[nn.Parameter] = []
        for module in modules:
            keys = () if ratio is None else self._list_plus_names(module)
            for key, parameter in module.named_parameters():
                (plus if key in keys else plain).append(parameter)
        return plain, plus

    def _list_plus_names(self, module: LycorisBaseModule) -> list[str]:
        algorithm = module.inner
        slots = next((slots for kind, slots in self.plus.items() if isinstance(algorithm, kind)), ())
        return [algorithm.tensor_names[slot] for slot in slots]

    def _list_lora_plus_algorithms(self) -> str:
        return ", ".join(kind.__name__ for kind in self.plus)

    def _describe(self, tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> Mapping[str, str]:
        """Return the hashes by which other programs identify the file."""
        return compute_model_hashes(tensors, header)


def _parse_rates(given: Rate | Sequence[Rate]) -> list[float | None]:
    """Parse one or several learning rates, which may be strings, into a list of at least one."""
    several = [given] if isinstance(given, str) or not isinstance(given, Sequence) else given
    return [parse_optional(each, "a learning rate", float) for each in several] or [None]
