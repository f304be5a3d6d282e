"""Kronecker products applied to activations and compared with weights, without building them.

Legend: w1 (ol, im), w2 (ok, in, *K); w1 ⊗ w2 is (ol·ok, im·in, *K) with [a·ok + c, b·in + d] = w1[a, b]·w2[c, d].
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lycoris.ops.shape import unflatten

CHUNK = 64


def kron(w1: Tensor, w2: Tensor) -> Tensor:
    """Return w1 ⊗ w2, built.

    Shapes: w1 (ol, im), w2 (ok, in, *K) → (ol·ok, im·in, *K), which is a full weight in memory.
    """
    (ol, im), (ok, inner, *kernel) = w1.shape, w2.shape
    blocks = w1.reshape(ol, 1, im, 1, *(1,) * len(kernel)) * w2.reshape(1, ok, 1, inner, *kernel)
    return blocks.reshape(ol * ok, im * inner, *kernel)


def first_small(w1: tuple[int, ...], w2: tuple[int, ...]) -> bool:
    """Return whether applying w1 before w2 takes clearly fewer multiplications; after it, the sum with y costs nothing.

    Clearly means by a factor of 1.3.

    Args:
        w1: the shape (ol, im).
        w2: the shape (ok, in, ...), whose kernel dimensions do not matter.
    """
    (ol, im), (ok, inner) = w1, w2[:2]
    return 1.3 * (ol * im * inner + ol * inner * ok) < im * inner * ok + ol * im * ok


def add_linear(y: Tensor, x: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    """Return y + x·(w1 ⊗ w2)ᵀ by one small product on each side of x as matrices (im, in).

    y is not changed; the result has its dtype. Shapes: y (..., ol·ok), x (..., im·in), w1 (ol, im), w2 (ok, in).
    """
    (ol, im), (ok, inner) = w1.shape, w2.shape
    x = x.reshape(-1, im, inner)
    if not y.numel():
        return y + (w1 @ x @ w2.T).reshape(y.shape).to(y.dtype)
    if first_small(w1.shape, w2.shape):
        h = mix_rows(w1, x).reshape(-1, inner)
        return unflatten(torch.addmm(y.reshape(-1, ok), h, w2.T), y.shape).to(y.dtype)
    h = (x.reshape(-1, inner) @ w2.T).view(-1, im, ok)
    added = torch.baddbmm(y.reshape(-1, ol, ok), w1.expand(len(h), ol, im), h)
    return unflatten(added, y.shape).to(y.dtype)


def add_linear_split(y: Tensor, x: Tensor, w1: Tensor, w2_a: Tensor, w2_b: Tensor) -> Tensor:
    """Return what `add_linear` does with w2 = w2_a·w2_b of low rank r, without building w2.

    Shapes: y (..., ol·ok), x (..., im·in), w1 (ol, im), w2_a (ok, r), w2_b (r, in).
    """
    im, inner = w1.shape[1], w2_b.shape[1]
    if not y.numel():
        return add_linear(y, x, w1, w2_a @ w2_b)
    h = (x.reshape(-1, inner) @ w2_b.T).view(-1, im, len(w2_b))
    h = mix_rows(w1, h).reshape(-1, len(w2_b))
    return unflatten(torch.addmm(y.reshape(-1, len(w2_a)), h, w2_a.T), y.shape).to(y.dtype)


def look_up(x: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    """Return the columns x of w1 ⊗ w2: the rows of an embedding whose stored weight is its transpose.

    Shapes: x (...) of whole numbers below im·in, w1 (ol, im), w2 (ok, in) → (..., ol·ok).
    """
    inner = w2.shape[1]
    return (w1.T[x // inner].unsqueeze(-1) * w2.T[x % inner].unsqueeze(-2)).flatten(-2)


def mix_rows(w: Tensor, x: Tensor) -> Tensor:
    """Return w (a, b) applied to each of x (T, b, n) → (T, a, n).

    In eager mode on a CPU the gradient of w is summed over T in chunks, and has no second derivative.
    """
    plain = torch.compiler.is_compiling() or torch.is_autocast_enabled(x.device.type) or x.device.type != "cpu"
    if plain or not w.requires_grad or w.dtype != x.dtype:
        return torch.matmul(w, x)
    return _MixRows.apply(w, x)  # type: ignore[no-untyped-call]


class _MixRows(torch.autograd.Function):
    """The gradient of w sums over T within products; autograd would build one small matrix for each of T first."""

    @staticmethod
    def forward(ctx: Any, w: Tensor, x: Tensor) -> Tensor:
        ctx.save_for_backward(w, x)
        return torch.matmul(w, x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (g,) = grads
        w, x = ctx.saved_tensors
        gw = torch.zeros_like(w)
        for at in range(0, len(x), CHUNK):
            left, right = g[at : at + CHUNK].transpose(0, 1), x[at : at + CHUNK].transpose(0, 1)
            gw.addmm_(left.reshape(len(w), -1), right.reshape(w.shape[1], -1).T)
        return gw, torch.matmul(w.T, g) if ctx.needs_input_grad[1] else None


def _by_column(blocks: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    # The contraction copies the weight into another order, which is not worth keeping for backward.
    equation = "acbdk,ab,cdk->bd"
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return torch.einsum(equation, blocks, w1, w2)
    return checkpoint(torch.einsum, equation, blocks, w1, w2, use_reentrant=False, preserve_rng_state=False)


def kron_gram(weight: Tensor, w1: Tensor, w2: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """Return ⟨W, w1 ⊗ w2⟩ and ‖w1 ⊗ w2‖² over all axes of the weight but `axis` (0 or 1), without building the product.

    Shapes: weight (ol·ok, im·in, *K) → two vectors of ol·ok entries for axis 0 and of im·in for axis 1, in at least
    float32.
    """
    wide = torch.promote_types(weight.dtype, torch.float32)
    (ol, im), (ok, inner) = w1.shape, w2.shape[:2]
    blocks = weight.reshape(ol, ok, im, inner, -1)
    own = w2.reshape(ok, inner, -1).to(weight.dtype)
    w1, w2 = w1.to(wide), w2.reshape(ok, inner, -1).to(wide)
    if axis == 0:
        inside = torch.matmul(blocks.flatten(3), own.reshape(1, ok, -1, 1)).squeeze(-1).to(wide)
        products = (inside * w1[:, None, :]).sum(-1)
        lengths = w1.square().sum(1)[:, None] * w2.square().sum((1, 2))[None, :]
    else:
        products = _by_column(blocks.to(wide), w1, w2)
        lengths = w1.square().sum(0)[:, None] * w2.square().sum((0, 2))[None, :]
    return products.flatten(), lengths.flatten()
