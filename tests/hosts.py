"""Small models with the class names that trainers' targets mean: UNet, text encoder, original-code transformers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Always by the same operations; torch's own picks a kernel by what is trained."""
    return (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = nn.Linear(8, 16, bias=False), nn.Linear(8, 16), nn.Linear(8, 16)
        self.to_out = nn.ModuleList([nn.Linear(16, 8)])

    def forward(self, x: Tensor) -> Tensor:
        return x + self.to_out[0](attend(self.to_q(x), self.to_k(x), self.to_v(x)))


class FeedForward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.net(x)


class Transformer2DModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.proj_in = nn.GroupNorm(2, 8), nn.Conv2d(8, 8, 1)
        self.attn1, self.ff = Attention(), FeedForward()

    def forward(self, x: Tensor) -> Tensor:
        y = self.proj_in(self.norm(x)).flatten(2).mT
        return x + self.ff(self.attn1(y)).mT.reshape(x.shape)


class ResnetBlock2D(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.time_emb_proj = nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 8)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return x + self.conv1(x).tanh() + self.time_emb_proj(t)[..., None, None]


class TimestepEmbedding(nn.Module):
    """In presets by its class and by the paths of its layers: each layer is meant twice."""

    def __init__(self) -> None:
        super().__init__()
        self.linear_1, self.linear_2 = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, t: Tensor) -> Tensor:
        return self.linear_2(self.linear_1(t).tanh())


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv_in, self.time_embedding = nn.Conv2d(3, 8, 3, padding=1), TimestepEmbedding()
        self.down_blocks = nn.ModuleList([ResnetBlock2D(), Transformer2DModel()])
        self.conv_out, self.other = nn.Conv2d(8, 4, 3, padding=1), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        t = self.time_embedding(torch.ones(x.shape[0], 8, dtype=x.dtype))
        y = self.down_blocks[1](self.down_blocks[0](self.conv_in(x), self.other(t)))
        return self.conv_out(y)


UNET = {
    "conv_in": "conv",
    "conv_out": "conv",
    "time_embedding_linear_1": "time",
    "time_embedding_linear_2": "time",
    "down_blocks_0_conv1": "conv",
    "down_blocks_0_time_emb_proj": "resnet",
    "down_blocks_1_proj_in": "transformer",
    "down_blocks_1_attn1_to_q": "attention",
    "down_blocks_1_attn1_to_k": "attention",
    "down_blocks_1_attn1_to_v": "attention",
    "down_blocks_1_attn1_to_out_0": "attention",
    "down_blocks_1_ff_net_0": "transformer",
    "down_blocks_1_ff_net_2": "transformer",
}
"""Layers of `UNet` that lycoris-lora 4.1.3 adapts with its preset full, and what they are part of."""


class CLIPAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.k_proj, self.v_proj, self.q_proj, self.out_proj = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.out_proj(attend(self.q_proj(x), self.k_proj(x), self.v_proj(x)))


class CLIPMLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(self.fc1(x).relu())


class TextEncoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.self_attn, self.mlp = nn.Embedding(9, 8), CLIPAttention(), CLIPMLP()

    def forward(self, ids: Tensor) -> Tensor:
        return self.mlp(self.self_attn(self.embed(ids)))


TEXT = (*(f"self_attn_{name}_proj" for name in ("k", "v", "q", "out")), "mlp_fc1", "mlp_fc2")


class T5Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(8, 8)


class T5EncoderModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = T5Attention()


def block(name: str, layers: Sequence[str], others: Sequence[nn.Module] = ()) -> nn.Module:
    """A module of that class with linear layers under dotted paths, which it runs one after the other."""

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        for path in layers:
            x = x + self.get_submodule(path)(x).tanh()
        return x

    made = type(name, (nn.Module,), {"forward": forward})()
    for path in layers:
        *parents, last = path.split(".")
        at = made
        for parent in parents:
            if not hasattr(at, parent):
                at.add_module(parent, nn.Module())
            at = at.get_submodule(parent)
        at.add_module(last, nn.Linear(8, 8))
    for number, other in enumerate(others):
        made.add_module(f"other_{number}", other)
    return made


class Transformer(nn.Module):
    """Blocks under `blocks` beside an embedding and a head, as original-code transformers have them."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.patch_embedding, self.blocks, self.head = nn.Linear(8, 8), nn.ModuleList(blocks), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embedding(x)
        for each in self.blocks:
            x = each(x)
        return self.head(x)


def wan() -> Transformer:
    layers = ("self_attn.q", "self_attn.k", "cross_attn.v", "ffn.0", "ffn.2", "time_projection.1")
    return Transformer(*(block("WanAttentionBlock", layers) for _ in range(2)))


class Fp8Linear(nn.Module):
    """As SimpleTuner's: no `nn.Linear`, the weight a buffer in float8, a scale per row."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bias = inputs, outputs, None
        weight = torch.randn(outputs, inputs)
        scale = weight.abs().amax(1) / 448
        self.register_buffer("weight", (weight / scale[:, None]).to(torch.float8_e4m3fn))
        self.register_buffer("weight_scale", scale)

    def dense(self) -> Tensor:
        return self.weight.float() * self.weight_scale[:, None]

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.dense().to(x.dtype))


class SDNQLinear(nn.Linear):
    """As SDNQ's: an `nn.Linear` whose weight nobody else can read."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.dense = self.weight.detach()
        self.weight = nn.Parameter((self.dense * 100).round().to(torch.int8), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, (self.weight.float() / 100).to(x.dtype), self.bias)
