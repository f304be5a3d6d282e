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
from lycoris.compat.assignable import Fixed
from lycoris.compat.base_module import LycorisBaseModule
from lycoris.compat.class_preset import Setting
from lycoris.compat.model_hashes import hashes
from lycoris.compat.network import LycorisNetwork
from lycoris.compat.patterns import Patterns
from lycoris.compat.presets import PRESET
from lycoris.compat.quantized import check_mergeable
from lycoris.errors import AttachError, ConfigError, FileError
from lycoris.layers.sites import ModelSites
from lycoris.targeting.options import parse_optional

logger = logging.getLogger("LyCORIS")

SIZED = (
    *("lora_dim", "conv_lora_dim", "alpha", "conv_alpha", "use_tucker", "dropout", "rank_dropout", "module_dropout"),
    "network_module",
)
"""What the class takes after its models and the multiplier, in this order."""

PLUS: Mapping[type[Algorithm], tuple[str, ...]] = MappingProxyType(
    {LoRA: ("up",), LoHa: ("w2_a",), LoKr: ("w1", "w1_a", "w1_b")}
)
"""Tensors whose rate LoRA+ multiplies: of LoRA as in the paper, of LoHa and LoKr as in sd-scripts."""

Rate: TypeAlias = float | str | None
"""A learning rate, which may be a string; None: that of the others, or none."""


@dataclasses.dataclass(frozen=True)
class Ratios:
    """How many times the learning rate the tensors of `PLUS` get (LoRA+, arXiv:2402.12354)."""

    loraplus_lr_ratio: float | None = None
    loraplus_unet_lr_ratio: float | None = None
    loraplus_text_encoder_lr_ratio: float | None = None

    def unet(self) -> float | None:
        return self.loraplus_unet_lr_ratio or self.loraplus_lr_ratio

    def text(self) -> float | None:
        return self.loraplus_text_encoder_lr_ratio or self.loraplus_lr_ratio


class LycorisNetworkKohya(LycorisNetwork):
    """Adapters of several models, made but not applied."""

    UNET_TARGET_REPLACE_MODULE = Setting("unet_target_module")
    UNET_TARGET_REPLACE_NAME = Setting("unet_target_name")
    TEXT_ENCODER_TARGET_REPLACE_MODULE = Setting("text_encoder_target_module")
    TEXT_ENCODER_TARGET_REPLACE_NAME = Setting("text_encoder_target_name")
    LORA_PREFIX_UNET: ClassVar[str] = "lora_unet"
    LORA_PREFIX_TEXT_ENCODER: ClassVar[str] = "lora_te"

    ratios = Ratios()
    patterns = Patterns()
    """Of these, `rates` count for parameter groups."""
    plus: ClassVar[Mapping[type[Algorithm], tuple[str, ...]]] = PLUS
    for_inference: bool = False
    """Whether `merge_to` is for good: the weights from before are let go layer by layer, and cost no memory."""
    _merged_for_good: bool = False

    def __init__(
        self, text_encoder: Any, unet: nn.Module | None = None, multiplier: float = 1.0, *sizes: Any, **options: Any
    ) -> None:
        """New adapters for models by the preset of this class, as `create_network` makes them.

        After `multiplier` come `SIZED`, by place or by name, then what `create_network` takes by name.
        """
        from lycoris.compat.kohya import parts_for, set_up

        nn.Module.__init__(self)
        given = dict(zip(SIZED, sizes, strict=False)) | options
        dim, alpha = given.pop("lora_dim", 4), given.pop("alpha", 1)
        given = {"conv_dim": given.pop("conv_lora_dim", 4), "algo": given.pop("network_module", "locon"), **given}
        warn = given.pop("warn_on_unmatched", True)
        parts, recipe = parts_for(type(self), multiplier, dim, alpha, text_encoder, unet, warn, given)
        self._become(parts, recipe.multiplier, recipe.options.get("bypass_mode"), recipe)
        set_up(self, given)

    @classmethod
    def _defaults(cls) -> Mapping[str, Any]:
        return {**super()._defaults(), **PRESET["full"]}

    @property
    def loraplus_lr_ratio(self) -> float | None:
        """LoRA+ for all; assigning to it counts for parameter groups that are made from then on."""
        return self.ratios.loraplus_lr_ratio

    @loraplus_lr_ratio.setter
    def loraplus_lr_ratio(self, ratio: float | None) -> None:
        self.ratios = dataclasses.replace(self.ratios, loraplus_lr_ratio=ratio)

    @property
    def loraplus_unet_lr_ratio(self) -> float | None:
        """The same for the denoiser."""
        return self.ratios.loraplus_unet_lr_ratio

    @loraplus_unet_lr_ratio.setter
    def loraplus_unet_lr_ratio(self, ratio: float | None) -> None:
        self.ratios = dataclasses.replace(self.ratios, loraplus_unet_lr_ratio=ratio)

    @property
    def loraplus_text_encoder_lr_ratio(self) -> float | None:
        """The same for the text encoders."""
        return self.ratios.loraplus_text_encoder_lr_ratio

    @loraplus_text_encoder_lr_ratio.setter
    def loraplus_text_encoder_lr_ratio(self, ratio: float | None) -> None:
        self.ratios = dataclasses.replace(self.ratios, loraplus_text_encoder_lr_ratio=ratio)

    @property
    def unet_loras(self) -> list[LycorisBaseModule]:
        """The modules of the denoiser."""
        return self._side(text=False)

    @property
    def text_encoder_loras(self) -> list[LycorisBaseModule]:
        """The modules of the text encoders."""
        return self._side(text=True)

    def _side(self, *, text: bool) -> list[LycorisBaseModule]:
        return Fixed(module for part in self.parts if part.text is text for module in self._modules_of(part))

    def apply_to(
        self, text_encoder: Any = None, unet: Any = None, apply_text_encoder: bool = True, apply_unet: bool = True
    ) -> None:
        """Put the adapters on. Those of a side that is not wanted leave the network for good.

        The models themselves are those the network was made for. Raises `ConfigError` when no adapters are left, and
        `AttachError` after a merge `for_inference`.
        """
        self._check_undoable()
        self._keep(text=apply_text_encoder, unet=apply_unet)
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
        """Fold the adapters in at the multiplier; `restore` undoes it exactly, unless the network is `for_inference`.

        `weights_sd` says only which sides are meant, by its names: the tensors are those that the network has. Computed
        in float32 on the layers' own device and rounded once, whatever `dtype` and `device` say.

        Changes nothing, and raises a `RuntimeError` when a weight is stored in few bits, a `FileError` when
        `weights_sd` names no side.
        """
        self._check_undoable()
        if weights_sd is not None:
            sides = [self._prefixes(text=text) for text in (True, False)]
            meant = [any(key.startswith(prefixes) for key in weights_sd) for prefixes in sides]
            if not any(meant):
                raise FileError(
                    f"weights_sd has {len(weights_sd)} tensors, and none is called {self.LORA_PREFIX_UNET}... or "
                    f"{self.LORA_PREFIX_TEXT_ENCODER}...; give what create_network_from_weights returned, or None for "
                    "all adapters of this network"
                )
            self._keep(*meant)
        if self.for_inference and not any(part.adapters.rank_masks.are_used for part in self.parts):
            self._merge_for_good()
        else:
            self._merge(1.0)

    def _prefixes(self, *, text: bool) -> tuple[str, ...]:
        """What names of one side start with: usually, and in the file that this network was made from."""
        usual = self.LORA_PREFIX_TEXT_ENCODER if text else self.LORA_PREFIX_UNET
        return usual, *(part.prefix for part in self.parts if part.text is text)

    def _merge_for_good(self) -> None:
        check_mergeable(self._layers())
        if any(part.adapters.attached or part.adapters.merged for part in self.parts):
            raise AttachError("these adapters are applied or merged already")
        self._restore_singles(self.loras)
        for part in self.parts:
            part.adapters.check_mergeable()
        self._merged_for_good = True
        # Told at the end: where warnings are errors, the first would leave the model half merged.
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            for part in self.parts:
                sites = ModelSites(part.adapters.model)
                for path, stack in part.adapters.stacks.items():
                    # The set keeps the weight from before, and goes with it.
                    alone = AdapterSet(sites, {path: stack}, name=None)
                    alone.merge(part.adapters.strengths.at(path))
        for each in told:
            warnings.warn(each.message, stacklevel=3)

    def _check_undoable(self) -> None:
        if self._merged_for_good:
            raise AttachError(
                "a network made for inference merges for good: its adapters are part of the weights and cannot be "
                "changed, loaded or taken off any more; make it without for_inference for that"
            )

    def _keep(self, text: bool, unet: bool) -> None:
        """Let the adapters of a side go that is not wanted. Raises `ConfigError`, and changes nothing, if all are."""
        gone = [part for part in self.parts if not (text if part.text else unet)]
        if len(gone) == len(self.parts):
            have = ", ".join(part.prefix for part in self.parts)
            wanted = [name for name, on in (("text encoders", text), ("the denoiser", unet)) if on]
            raise ConfigError(
                f"no adapters would be left: this network has those of {have} only, and wanted are those of "
                f"{' and '.join(wanted) or 'no model'}"
            )
        for part in gone:
            part.adapters.check_detachable()
        self._restore_singles([module for part in gone for module in self._modules_of(part)])
        for part in gone:
            part.adapters.detach()
            for module in self._modules_of(part):
                del self._modules[module.lora_name]
            timestep_masks.untrack(part.adapters)
            self.parts.remove(part)

    # -- learning rates ----------------------------------------------------------------------------------------------

    def set_loraplus_lr_ratio(
        self, loraplus_lr_ratio: float | None, unet: float | None = None, text_encoder: float | None = None
    ) -> None:
        """LoRA+: one ratio for all, or one for each side."""
        self.ratios = Ratios(loraplus_lr_ratio, unet, text_encoder)

    def prepare_optimizer_params(
        self,
        text_encoder_lr: Rate | Sequence[Rate] = None,
        unet_lr: Rate = 1e-4,
        learning_rate: Rate = None,
    ) -> tuple[list[dict[str, Any]], list[str]]:
        """Parameter groups and what each is called; a group without a learning rate, or with 0, is dropped.

        Of several rates for text encoders the first counts; `prepare_optimizer_params_with_multiple_te_lrs` takes all.
        """
        first, *_ = _rates(text_encoder_lr)
        return self._all_groups([("textencoder", self.text_encoder_loras, first)], unet_lr, learning_rate)

    def prepare_optimizer_params_with_multiple_te_lrs(
        self,
        text_encoder_lr: Rate | Sequence[Rate] = None,
        unet_lr: Rate = 1e-4,
        default_lr: Rate = None,
    ) -> tuple[list[dict[str, Any]], list[str]]:
        """The same with a rate for each text encoder; the last one given is for those that follow."""
        if len(set(_rates(text_encoder_lr))) < 2:
            return self.prepare_optimizer_params(text_encoder_lr, unet_lr, default_lr)
        return self._all_groups(self._numbered_encoders(text_encoder_lr), unet_lr, default_lr)

    def _numbered_encoders(
        self, text_encoder_lr: Rate | Sequence[Rate]
    ) -> list[tuple[str, list[LycorisBaseModule], float | None]]:
        """Each text encoder with its name, modules and rate."""
        rates = _rates(text_encoder_lr)
        encoders = []
        for part in [part for part in self.parts if part.text]:
            number = int("".join(filter(str.isdigit, part.prefix)) or 1)
            encoders.append((f"textencoder {number}", self._modules_of(part), rates[min(number, len(rates)) - 1]))
        return encoders

    def _all_groups(
        self, encoders: Sequence[tuple[str, list[LycorisBaseModule], float | None]], unet_lr: Rate, default_lr: Rate
    ) -> tuple[list[dict[str, Any]], list[str]]:
        """The groups of text encoders, each with its name and rate, and of the denoiser."""
        self.requires_grad_(True)
        (unet,), (default,) = _rates(unet_lr), _rates(default_lr)
        sides = [(*encoder, self.ratios.text()) for encoder in encoders]
        groups = []
        for name, modules, rate, ratio in (*sides, ("unet", self.unet_loras, unet, self.ratios.unet())):
            groups += self._groups(name, modules, default if rate is None else rate, ratio)
        return [group for group, _ in groups], [told for _, told in groups]

    def _groups(
        self, name: str, modules: Sequence[LycorisBaseModule], rate: float | None, ratio: float | None
    ) -> list[tuple[dict[str, Any], str]]:
        """Groups of layers with a rate of their own, in the order in which they come first, then those without."""
        own: dict[int, list[LycorisBaseModule]] = {}
        rest: list[LycorisBaseModule] = []
        for module in modules:
            at = self.patterns.rate_for(module._member[1]) if module._member else None
            (rest if at is None else own.setdefault(at, [])).append(module)
        sets = [(f"{name} reg_lr_{at}", found, self.patterns.rates[at][1]) for at, found in own.items()]
        found: list[tuple[dict[str, Any], str]] = []
        effect = False
        for label, members, lr in (*sets, (name, rest, rate)):
            plain, plus = self._split(members, ratio)
            effect = effect or bool(plus)
            if members and not lr:
                logger.info("%s has no learning rate and is not trained", label)
            elif lr:
                several = (label, plain, lr), (f"{label} plus", plus, lr * (ratio or 1.0))
                found += [({"params": params, "lr": by}, told) for told, params, by in several if params]
        if ratio is not None and modules and not effect:
            logger.warning("LoRA+ has no effect on %s: it is for %s", name, self._have_plus() or "no algorithm here")
        return found

    def _split(
        self, modules: Sequence[LycorisBaseModule], ratio: float | None
    ) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """Parameters without and with the ratio of LoRA+."""
        plain: list[nn.Parameter] = []
        plus: list[nn.Parameter] = []
        for module in modules:
            keys = () if ratio is None else self._plus_keys(module)
            for key, parameter in module.named_parameters():
                (plus if key in keys else plain).append(parameter)
        return plain, plus

    def _plus_keys(self, module: LycorisBaseModule) -> list[str]:
        algorithm = module.inner
        slots = next((slots for kind, slots in self.plus.items() if isinstance(algorithm, kind)), ())
        return [algorithm.tensor_names[slot] for slot in slots]

    def _have_plus(self) -> str:
        return ", ".join(kind.__name__ for kind in self.plus)

    def _describe(self, tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> Mapping[str, str]:
        """The hashes by which other programs know the file."""
        return hashes(tensors, header)


def _rates(given: Rate | Sequence[Rate]) -> list[float | None]:
    """Learning rates from one or several, which may be strings; at least one."""
    several = [given] if isinstance(given, str) or not isinstance(given, Sequence) else given
    return [parse_optional(each, "a learning rate", float) for each in several] or [None]
