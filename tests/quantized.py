"""Base layers as quantisation libraries make them, for tests that run over all of them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import covering


def bits4(layer: nn.Linear, kind: str) -> nn.Module:
    import bitsandbytes as bnb

    made = bnb.nn.Linear4bit(layer.in_features, layer.out_features, quant_type=kind, compute_dtype=torch.float32)
    made.load_state_dict(layer.state_dict())
    return made.to(layer.weight.device)


def int8(layer: nn.Linear) -> nn.Module:
    import bitsandbytes as bnb

    made = bnb.nn.Linear8bitLt(layer.in_features, layer.out_features, has_fp16_weights=False)
    made.load_state_dict(layer.state_dict())
    return made.to(layer.weight.device)


def torchao(layer: nn.Linear, kind: str, **options: object) -> nn.Module:
    import torchao.quantization as ao

    if kind == "IntxWeightOnlyConfig":
        options["granularity"] = ao.PerGroup(32)
    whole = nn.Sequential(layer)
    ao.quantize_(whole, getattr(ao, kind)(**options))
    return whole[0]


def quanto(layer: nn.Linear, kind: str) -> nn.Module:
    import optimum.quanto

    whole = nn.Sequential(layer)
    optimum.quanto.quantize(whole, weights=kind)
    optimum.quanto.freeze(whole)
    return whole[0]


def gguf(layer: nn.Linear, kind: str) -> nn.Module:
    import gguf
    from diffusers.quantizers.gguf.utils import GGUFLinear, GGUFParameter

    kind = gguf.GGMLQuantizationType[kind]
    data = gguf.quants.quantize(layer.weight.detach().cpu().numpy(), kind)
    made = GGUFLinear(layer.in_features, layer.out_features, bias=True, compute_dtype=torch.float32)
    made.weight = GGUFParameter(torch.from_numpy(data), quant_type=kind)
    made.bias = layer.bias
    return made


class Float8Linear(nn.Linear):
    """How trainers run float8 weights: cast to the input's precision, with a scale beside if there is one."""

    weight_scale: Tensor | None

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.register_buffer("weight_scale", None)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.to(x.dtype)
        return F.linear(x, weight if self.weight_scale is None else weight * self.weight_scale, self.bias)


def float8(layer: nn.Linear, dtype: torch.dtype, scaled: bool = False) -> nn.Module:
    made = Float8Linear(layer.in_features, layer.out_features).to(layer.weight.device)
    made.load_state_dict(layer.state_dict())
    weight = layer.weight.detach()
    if scaled:
        scale = weight.abs().amax(1, keepdim=True) / torch.finfo(dtype).max
        made.weight_scale = scale
        weight = weight / scale
    made.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
    return made


@dataclass(frozen=True)
class Quantized:
    make: Callable[[nn.Linear], nn.Module]
    label: str
    step: float
    """Largest relative change of a weight by storing it."""
    stochastic: bool = False

    def layer(self, inputs: int = 64, outputs: int = 32, device: str = "cpu") -> nn.Module:
        return self.make(nn.Linear(inputs, outputs, device=device)).to(device).requires_grad_(False)


# A compiler builds the extension with which quanto unpacks 4 bits on a CPU, in about a minute.
COMPILED = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("c++") is None, reason="optimum-quanto compiles its 4-bit unpacking"),
]

CPU: dict[str, Quantized] = {
    "bitsandbytes-int8": Quantized(int8, "bitsandbytes int8", 1 / 127, True),
    "bitsandbytes-nf4": Quantized(lambda layer: bits4(layer, "nf4"), "bitsandbytes nf4", 0.2),
    "bitsandbytes-fp4": Quantized(lambda layer: bits4(layer, "fp4"), "bitsandbytes fp4", 0.25),
    "torchao-int8": Quantized(
        lambda layer: torchao(layer, "Int8WeightOnlyConfig"), "torchao Int8Tensor", 1 / 127, True
    ),
    "torchao-int4": Quantized(
        lambda layer: torchao(layer, "IntxWeightOnlyConfig", weight_dtype=torch.int4),
        "torchao IntxUnpackedToInt8Tensor int4",
        1 / 7,
        True,
    ),
    "torchao-float8": Quantized(
        lambda layer: torchao(layer, "Float8WeightOnlyConfig"), "torchao Float8Tensor", 1 / 8, True
    ),
    "quanto-int8": Quantized(lambda layer: quanto(layer, "qint8"), "optimum-quanto qint8", 1 / 127, True),
    "quanto-float8": Quantized(lambda layer: quanto(layer, "qfloat8"), "optimum-quanto qfloat8_e4m3fn", 1 / 8, True),
    "quanto-int4": Quantized(lambda layer: quanto(layer, "qint4"), "optimum-quanto qint4", 1 / 7),
    "float8-e4m3": Quantized(lambda layer: float8(layer, torch.float8_e4m3fn), "float8_e4m3fn storage", 1 / 8, True),
    "float8-e5m2": Quantized(lambda layer: float8(layer, torch.float8_e5m2), "float8_e5m2 storage", 1 / 4, True),
    "float8-scaled": Quantized(
        lambda layer: float8(layer, torch.float8_e4m3fn, scaled=True), "float8_e4m3fn storage", 1 / 8, True
    ),
    "gguf-q8": Quantized(lambda layer: gguf(layer, "Q8_0"), "GGUF Q8_0", 1 / 127),
    "gguf-q4": Quantized(lambda layer: gguf(layer, "Q4_0"), "GGUF Q4_0", 1 / 7),
}
covering.register({name: name.partition("-")[0] for name in CPU})
SLOW = {"quanto-int4": COMPILED}
EVERY = pytest.mark.parametrize("base", [pytest.param(name, marks=SLOW.get(name, ())) for name in CPU])
