"""`LycorisNetworkKohya`: the adapters of a denoiser and its text encoders."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lycoris import merging
from lycoris.adapters import AdapterSet
from lycoris.algorithms import LoRA
from lycoris.dropin import tlora
from lycoris.dropin.hashes import hashes
from lycoris.dropin.module import LycorisBaseModule
from lycoris.dropin.network import LycorisNetwork
from lycoris.dropin.quantised import check_mergeable
from lycoris.errors import AttachError
from lycoris.geometry import site

logger = logging.getLogger("LyCORIS")


@dataclasses.dataclass(frozen=True)
class Ratios:
    """How many times the learning rate the second factor of a LoRA gets (LoRA+, arXiv:2402.12354)."""

    loraplus_lr_ratio: float | None = None
    loraplus_unet_lr_ratio: float | None = None
    loraplus_text_encoder_lr_ratio: float | None = None

    def unet(self) -> float | None:
        return self.loraplus_unet_lr_ratio or self.loraplus_lr_ratio

    def text(self) -> float | None:
        return self.loraplus_text_encoder_lr_ratio or self.loraplus_lr_ratio


class LycorisNetworkKohya(LycorisNetwork):
    """Adapters of several models, made but not applied."""

    LORA_PREFIX_UNET: ClassVar[str] = "lora_unet"
    LORA_PREFIX_TEXT_ENCODER: ClassVar[str] = "lora_te"

    _given: ClassVar[frozenset[str]] = frozenset()

    train_t5xxl: bool = False
    train_llm_adapter: bool = False
    ratios = Ratios()
    for_inference: bool = False
    """Whether `merge_to` is for good: the weights from before are let go layer by layer, and cost no memory."""
    _merged_for_good: bool = False

    @classmethod
    def apply_preset(cls, preset: Mapping[str, Any]) -> Any:
        """Targets for the networks made from now on without a `preset`; keys that are not given are those of "full".

        Raises `PresetKeyError` for an unknown key.
        """
        super().apply_preset(preset)
        cls._given = cls._given | preset.keys()
        return cls

    @classmethod
    def applied(cls) -> dict[str, Any]:
        """What `apply_preset` was given."""
        return {name: _plain(getattr(cls._preset, name)) for name in cls._given} if cls._preset else {}

    @property
    def unet_loras(self) -> list[LycorisBaseModule]:
        """The modules of the denoiser."""
        return self._modules_of(text=False)

    @property
    def text_encoder_loras(self) -> list[LycorisBaseModule]:
        """The modules of the text encoders."""
        return self._modules_of(text=True)

    def _modules_of(self, *, text: bool) -> list[LycorisBaseModule]:
        adapters = {id(stack[0]) for part in self.parts if part.text is text for stack in part.adapters.stacks.values()}
        return [module for module in self.loras if id(module.adapter) in adapters]

    def apply_to(
        self, text_encoder: Any = None, unet: Any = None, apply_text_encoder: bool = True, apply_unet: bool = True
    ) -> None:
        """Put the adapters on. Those of a side that is not wanted leave the network for good.

        The models themselves are those the network was made for.
        """
        self._keep(text=apply_text_encoder, unet=apply_unet)
        super().apply_to()

    def merge_to(  # type: ignore[override]
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
        in float32 on the layers' own device and rounded once, whatever `dtype` and `device` say. Raises a
        `RuntimeError`, and changes nothing, when a weight is stored in few bits.
        """
        if weights_sd is not None:
            text = any(key.startswith(self.LORA_PREFIX_TEXT_ENCODER) for key in weights_sd)
            self._keep(text=text, unet=any(key.startswith(self.LORA_PREFIX_UNET) for key in weights_sd))
        if self.for_inference and not any(part.adapters.rank_masked for part in self.parts):
            self._merge_for_good()
        else:
            self._merge(1.0)

    def _merge_for_good(self) -> None:
        check_mergeable(self._layers())
        if self._merged_for_good or any(part.adapters.attached or part.adapters.merged for part in self.parts):
            raise AttachError("these adapters are applied or merged already")
        layers = [(part, path, stack) for part in self.parts for path, stack in part.adapters.stacks.items()]
        for part, path, stack in layers:
            merging.check_order(path, site(part.adapters.model, path).module, stack)
        self._merged_for_good = True
        for part, path, stack in layers:
            # The set keeps the weight from before, and goes with it.
            AdapterSet(part.adapters.model, {path: stack}, name=None).merge(self._multiplier)

    def restore(self) -> None:
        """As `LycorisNetwork.restore`. Raises `AttachError` after a merge `for_inference`."""
        if self._merged_for_good:
            raise AttachError("a network made for inference merges for good; make it without for_inference to undo it")
        super().restore()

    def _keep(self, *, text: bool, unet: bool) -> None:
        for part in [part for part in self.parts if not (text if part.text else unet)]:
            for module in [m for m in self.loras if any(m.adapter is s[0] for s in part.adapters.stacks.values())]:
                del self._modules[module.lora_name]
            part.adapters.detach()
            tlora.untrack(part.adapters)
            self.parts.remove(part)

    # -- learning rates ----------------------------------------------------------------------------------------------

    def set_loraplus_lr_ratio(
        self, loraplus_lr_ratio: float | None, unet: float | None = None, text_encoder: float | None = None
    ) -> None:
        """LoRA+: one ratio for all, or one for each side."""
        self.ratios = Ratios(loraplus_lr_ratio, unet, text_encoder)

    def prepare_optimizer_params(
        self,
        text_encoder_lr: float | Sequence[float] | None = None,
        unet_lr: float | None = 1e-4,
        learning_rate: float | None = None,
    ) -> tuple[list[dict[str, Any]], list[str]]:
        """Parameter groups and what each is called; a group without a learning rate, or with 0, is dropped.

        Of several rates for text encoders the first counts; `prepare_optimizer_params_with_multiple_te_lrs` takes all.
        """
        self.requires_grad_(True)
        first = text_encoder_lr[0] if isinstance(text_encoder_lr, Sequence) and text_encoder_lr else text_encoder_lr
        text = learning_rate if first is None or isinstance(first, Sequence) else first
        groups = self._groups("textencoder", self.text_encoder_loras, text, self.ratios.text())
        rate = learning_rate if unet_lr is None else unet_lr
        groups += self._groups("unet", self.unet_loras, rate, self.ratios.unet())
        return [group for group, _ in groups], [told for _, told in groups]

    def prepare_optimizer_params_with_multiple_te_lrs(
        self,
        text_encoder_lr: float | Sequence[float] | None = None,
        unet_lr: float | None = 1e-4,
        default_lr: float | None = None,
    ) -> tuple[list[dict[str, Any]], list[str]]:
        """The same with a rate for each text encoder; the last one given is for those that follow."""
        encoders = [part for part in self.parts if part.text]
        if len(encoders) < 2 or not isinstance(text_encoder_lr, Sequence) or len(set(text_encoder_lr)) < 2:
            return self.prepare_optimizer_params(text_encoder_lr, unet_lr, default_lr)
        self.requires_grad_(True)
        groups = []
        for part in encoders:
            own = {id(stack[0]) for stack in part.adapters.stacks.values()}
            modules = [module for module in self.loras if id(module.adapter) in own]
            number = int("".join(filter(str.isdigit, part.prefix)) or 1)
            rate = text_encoder_lr[min(number, len(text_encoder_lr)) - 1]
            groups += self._groups(f"textencoder {number}", modules, rate, self.ratios.text())
        groups += self._groups("unet", self.unet_loras, default_lr if unet_lr is None else unet_lr, self.ratios.unet())
        return [group for group, _ in groups], [told for _, told in groups]

    def _groups(
        self, name: str, modules: Sequence[LycorisBaseModule], rate: float | None, ratio: float | None
    ) -> list[tuple[dict[str, Any], str]]:
        plain: list[nn.Parameter] = []
        plus: list[nn.Parameter] = []
        for module in modules:
            for key, parameter in module.named_parameters():
                second = ratio is not None and isinstance(module.inner, LoRA) and key == LoRA.keys["up"]
                (plus if second else plain).append(parameter)
        if modules and not rate:
            logger.info("%s has no learning rate and is not trained", name)
        if ratio is not None and modules and not plus:
            logger.warning("LoRA+ has no effect on %s: it is for LoRA alone", name)
        found = [(name, plain, 1.0), (f"{name} plus", plus, ratio or 1.0)]
        return [({"params": params, "lr": rate * by}, told) for told, params, by in found if params and rate]

    def _describe(self, tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> Mapping[str, str]:
        """The hashes by which other programs know the file."""
        return hashes(tensors, header)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
