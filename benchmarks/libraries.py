"""How each library puts an adapter on one layer. Imported in that library's own environment; imports it on use."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.cases import Case

OURS, OLD, PEFT = "lycoris", "lycoris-4.1.3", "peft-0.21.2"

ARMS: Mapping[str, tuple[str, ...]] = {OURS: ("ours",), OLD: ("4.1.3", "4.1.3 bypass"), PEFT: ("peft",)}
"""Library → what it is measured as, in the order of the tables' columns."""

SPREAD = 0.02
"""Standard deviation of what is added to new adapters: at their start some are zero, and zeros can be skipped."""


class NotServedError(Exception):
    """A library, or one of its modes, does not have an algorithm."""


class Attached(NamedTuple):
    """An adapted layer: what to call, what is trained, and what a reader of the number should know."""

    call: Callable[[Tensor], Tensor]
    parameters: list[nn.Parameter]
    note: str = ""


def attach(arm: str, layer: nn.Module, case: Case) -> Attached:
    """Put the case's adapter on a frozen layer, with float32 parameters away from their start."""
    make = {"ours": _ours, "4.1.3": _old, "4.1.3 bypass": _old_bypass, "peft": _peft}[arm]
    adapted = make(layer, case)
    if not adapted.parameters:
        raise NotServedError("the adapter has nothing to train")
    weight = next(layer.parameters())
    with torch.no_grad():
        for parameter in adapted.parameters:
            parameter.data = parameter.data.to(weight.device, torch.float32)
            parameter.add_(torch.randn_like(parameter) * SPREAD)
    return adapted


def _ours(layer: nn.Module, case: Case) -> Attached:
    import lycoris

    def made(name: str, **options: Any) -> Any:
        if not hasattr(lycoris, name):
            raise NotServedError("not built")
        return getattr(lycoris, name)(**options)

    s = case.settings
    algorithms: Mapping[str, Callable[[], Any]] = {
        "lora": lambda: made("LoRA", rank=s["rank"]),
        "loha": lambda: made("LoHa", rank=s["rank"]),
        "lokr": lambda: made("LoKr", rank=s["rank"], factor=s["factor"]),
        "lokr-full": lambda: made("LoKr", full_matrix=True, factor=s["factor"]),
        "oft": lambda: made("OFT", block_size=s["block"]),
        "boft": lambda: made("BOFT", block_size=s["block"]),
        "dora": lambda: made("DoRA", inner=made("LoRA", rank=s["rank"])),
        "glora": lambda: made("GLoRA", rank=s["rank"]),
        "ia3": lambda: made("IA3"),
        "tlora": lambda: made("TLoRA", rank=s["rank"]),
        "dylora": lambda: made("DyLoRA", rank=s["rank"], block_size=s["block"]),
    }
    model = nn.Sequential(layer)
    rule = lycoris.Rule(algorithms[case.algorithm]())
    adapters = lycoris.AdapterSet.build(model, lycoris.plan(model, rule)).attach()
    return Attached(layer, list(adapters.parameters()))


def _old_bypass(layer: nn.Module, case: Case) -> Attached:
    if case.algorithm == "dora":
        raise NotServedError("bypass_mode leaves DoRA out without a word, so this would time a LoRA")
    return _old(layer, case, bypass=True)


def _old(layer: nn.Module, case: Case, bypass: bool = False) -> Attached:
    from lycoris import modules

    s = case.settings
    rank = s.get("rank", s.get("block", 4))
    classes: Mapping[str, tuple[str, dict[str, Any]]] = {
        "lora": ("LoConModule", {}),
        "loha": ("LohaModule", {}),
        "lokr": ("LokrModule", {"factor": s.get("factor")}),
        "lokr-full": ("LokrModule", {"factor": s.get("factor"), "full_matrix": True}),
        "oft": ("DiagOFTModule", {}),
        "boft": ("ButterflyOFTModule", {}),
        "dora": ("LoConModule", {"weight_decompose": True}),
        "glora": ("GLoRAModule", {}),
        "ia3": ("IA3Module", {}),
        "tlora": ("TLoraModule", {}),
        "dylora": ("DyLoraModule", {"block_size": s.get("block")}),
    }
    name, options = classes[case.algorithm]
    adapter = getattr(modules, name)("adapter", layer, 1.0, rank, rank, bypass_mode=bypass, **options)
    adapter.apply_to()
    adapter.to(next(layer.parameters()).device)
    block = getattr(adapter, "block_size", rank)
    note = f"blocks of {block}: it cannot cut this layer into {rank}" if block != s.get("block", block) else ""
    if case.algorithm == "dylora":
        note = "draws a new rank at every pass"
    return Attached(layer, _trained(adapter.parameters()), note)


def _peft(layer: nn.Module, case: Case) -> Attached:
    import peft

    s = case.settings
    rank, block = s.get("rank", 4), s.get("block", 4)
    into = layer.weight.shape[1:].numel()
    # A rank that no factor is smaller than is how peft is asked for whole ones.
    whole = {"r": 1 << 20, "alpha": 1 << 20, "decompose_factor": s.get("factor")}
    configs: Mapping[str, Callable[..., Any]] = {
        "lora": lambda **to: peft.LoraConfig(r=rank, lora_alpha=rank, **to),
        "loha": lambda **to: peft.LoHaConfig(r=rank, alpha=rank, **to),
        "lokr": lambda **to: peft.LoKrConfig(r=rank, alpha=rank, decompose_factor=s["factor"], **to),
        "lokr-full": lambda **to: peft.LoKrConfig(**whole, **to),
        "oft": lambda **to: peft.OFTConfig(oft_block_size=block, **to),
        "boft": lambda **to: peft.BOFTConfig(boft_block_size=block, boft_n_butterfly_factor=_stages(into, block), **to),
        "dora": lambda **to: peft.LoraConfig(r=rank, lora_alpha=rank, use_dora=True, **to),
        "glora": lambda **to: peft.GloraConfig(r=rank, **to),
        "ia3": lambda **to: peft.IA3Config(feedforward_modules=[], **to),
    }
    if case.algorithm not in configs:
        raise NotServedError(f"peft has no {case.label}")
    notes = {
        "dora": "takes the norm for a constant in backward",
        "glora": "another formula: W ⊙ A + B and a bias",
        "oft": "rotates inputs, by a truncated series",
        "boft": "rotates inputs; without its CUDA extension it has one stage",
    }
    model = peft.inject_adapter_in_model(configs[case.algorithm](target_modules=["0"]), nn.Sequential(layer))
    return Attached(model[0], _trained(model.parameters()), notes.get(case.algorithm, ""))


def _stages(into: int, block: int) -> int:
    """Butterfly factors that reach every feature: powers of two in the number of blocks, plus 1."""
    count = into // block
    return int(math.log2(count & -count)) + 1 if count else 1


def _trained(parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    return [parameter for parameter in parameters if parameter.requires_grad]
