"""PEFT itself: a file's tensors under its names, loaded into a model of one layer, and its output.

What a configuration has to say beside the tensors is worked out here from their shapes, as a converter would.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import peft
import torch
from peft.tuners.lokr.layer import factorization
from torch import Tensor, nn

from programs import Refused, Tensors, number

LORA = {"lora_up.weight": "lora_B.weight", "lora_down.weight": "lora_A.weight"}


PREFIXES = {"LORA": "lora_", "LOHA": "hada_", "LOKR": "lokr_", "IA3": "ia3_"}


class Model(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def output(tensors: Tensors, layer: nn.Module, x: Tensor) -> Tensor:
    """What the layer gives for x with the adapter on it. Raises `Refused` where PEFT takes no such adapter."""
    try:
        config, state = translated(tensors, layer)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = peft.get_peft_model(Model(layer), config).to(x.dtype if x.is_floating_point() else None)
            state = {f"base_model.model.layer.{name}": tensor for name, tensor in state.items()}
            found = peft.set_peft_model_state_dict(model, state)
        # The layer's own tensors are missing by design.
        missing = [key for key in found.missing_keys if PREFIXES[config.peft_type.value] in key]
        if missing or found.unexpected_keys:
            raise Refused(f"missing {missing}, unexpected {found.unexpected_keys}")
        with torch.no_grad():
            return model.eval()(x)
    except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
        raise Refused(f"{type(error).__name__}: {error}") from error


def translated(tensors: Tensors, layer: nn.Module) -> tuple[peft.PeftConfig, dict[str, Tensor]]:
    """A configuration and the tensors by PEFT's names."""
    names, alpha = tensors.keys() - {"alpha"}, number(tensors, "alpha")
    if names - {"dora_scale"} == LORA.keys():
        state = {LORA[name]: tensors[name] for name in LORA}
        rank = len(tensors["lora_down.weight"])
        if "dora_scale" in tensors:
            state["lora_magnitude_vector"] = _lengths(tensors["dora_scale"], layer)
        config = peft.LoraConfig(
            r=rank,
            lora_alpha=rank if alpha is None else alpha,
            use_dora="dora_scale" in tensors,
            target_modules=["layer"],
        )
        return config, state
    plain = {name: tensor for name, tensor in tensors.items() if name != "alpha"}
    if names and all(name.startswith("hada_") for name in names):
        rank = len(tensors["hada_w1_b"])
        config = peft.LoHaConfig(
            r=rank,
            alpha=rank if alpha is None else alpha,
            use_effective_conv2d="hada_t1" in tensors,
            target_modules=["layer"],
        )
        return config, _widened(plain, layer)
    if names and all(name.startswith("lokr_") for name in names):
        return _lokr(plain, alpha, layer), _widened(plain, layer)
    if names == {"weight", "on_input"}:
        on_input = bool(tensors["on_input"])
        w = 1 + tensors["weight"]
        if w.dim() == 1:
            w = w.reshape(1, -1) if on_input else w.reshape(-1, 1)
        config = peft.IA3Config(target_modules=["layer"], feedforward_modules=["layer"] if on_input else [])
        return config, {"ia3_l": w}
    raise Refused(f"no tuner has {sorted(names)}")


def _lengths(scale: Tensor, layer: nn.Module) -> Tensor:
    return scale.flatten() if scale.dim() == 2 else scale.transpose(0, 1)


def _widened(tensors: Mapping[str, Tensor], layer: nn.Module) -> dict[str, Tensor]:
    """Cores of one kernel dimension are kept with a second of 1."""
    one = isinstance(layer, nn.Conv1d)
    return {name: t.unsqueeze(-1) if one and "_t" in name else t for name, t in tensors.items()}


def _lokr(tensors: Tensors, alpha: float | None, layer: nn.Module) -> peft.LoKrConfig:
    split = {n: f"lokr_w{n}_b" in tensors for n in (1, 2)}
    rank = next((len(tensors[f"lokr_w{n}_b"]) for n in (2, 1) if split[n]), None)
    (ol, im), (ok, inner) = _shape(tensors, 1), _shape(tensors, 2, layer)
    # Whole factors are what a rank above half of their sides means, and their scale is not 1 but alpha / rank.
    given = max(ok, inner) if rank is None else rank
    said = float(given) if rank is None or alpha is None else alpha
    for factor in (-1, *range(1, max(ol * ok, im * inner) + 1)):
        if (factorization(ol * ok, factor), factorization(im * inner, factor)) == ((ol, ok), (im, inner)):
            return peft.LoKrConfig(
                r=given,
                alpha=said,
                decompose_factor=factor,
                decompose_both=split[1],
                use_effective_conv2d="lokr_t2" in tensors,
                target_modules=["layer"],
            )
    raise Refused(f"no factor gives {(ol, ok)} and {(im, inner)}")


def _shape(tensors: Tensors, n: int, layer: nn.Module | None = None) -> tuple[int, int]:
    if f"lokr_w{n}" in tensors:
        return tuple(tensors[f"lokr_w{n}"].shape[:2])
    a, b = tensors[f"lokr_w{n}_a"], tensors[f"lokr_w{n}_b"]
    if "lokr_t2" in tensors and n == 2:
        return a.shape[1], b.shape[1]
    places = 1 if layer is None else layer.weight[0, 0].numel()
    return a.shape[0], b.shape[1] // places
