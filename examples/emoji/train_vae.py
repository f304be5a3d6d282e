"""Train the demo's autoencoder (64x64 pixels to 16x16x4 latents) on every emoji sheet.

    python train_vae.py data out/vae --steps 4200

The latents are folded to zero mean and unit variance per channel (into quant_conv and post_quant_conv), so that
scaling_factor is 1.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL

import sheets

STYLES = ("noto", "fluent-flat", "fluent-modern", "fluent-hc")


def build() -> AutoencoderKL:
    channels = (32, 64, 64)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        block_out_channels=channels,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        mid_block_add_attention=False,
        sample_size=sheets.PIXELS,
    )


def reconstruction_loss(y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """L1 + L2, edges (icons are mostly edges), local means and colour (thin coloured strokes wash out without it)."""
    error = y - x
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    colour = (error - error.mean(1, keepdim=True)).abs().mean()
    return error.abs().mean() + error.square().mean() + 0.5 * edges + F.avg_pool2d(error, 4).abs().mean() + 0.7 * colour


@torch.no_grad()
def fold_latent_statistics(vae: AutoencoderKL, images: torch.Tensor) -> None:
    """Rescale both 1x1 convolutions around the latent space so that its channels have mean 0 and variance 1."""
    z = torch.cat([vae.encode(sheets.to_unit(part)).latent_dist.mean for part in images.split(64)])
    mean, std = z.mean((0, 2, 3)), z.std((0, 2, 3))
    into, back, n = vae.quant_conv, vae.post_quant_conv, len(mean)
    into.weight[:n] /= std.view(-1, 1, 1, 1)
    into.bias[:n] = (into.bias[:n] - mean) / std
    into.bias[n:] -= 2 * std.log()
    back.bias += back.weight[:, :, 0, 0] @ mean
    back.weight *= std.view(1, -1, 1, 1)
    vae.register_to_config(scaling_factor=1.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=4200)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--kl", type=float, default=1e-5)
    args = parser.parse_args()

    torch.manual_seed(0)
    images = torch.cat([sheets.load(args.data, style, groups=())[0] for style in STYLES])
    probe = torch.cat([sheets.load(args.data, style, groups=())[0][::150][:10] for style in STYLES])
    vae = build()
    optimizer = torch.optim.AdamW(vae.parameters(), lr=args.lr, betas=(0.9, 0.99), weight_decay=1e-4, fused=True)
    average = torch.optim.swa_utils.AveragedModel(vae, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.998))
    started = time.perf_counter()
    for step in range(1, args.steps + 1):
        ramp = min(1.0, step / 100) * (0.49 * (1 + math.cos(math.pi * step / args.steps)) + 0.02)
        for group in optimizer.param_groups:
            group["lr"] = args.lr * ramp
        x = sheets.to_unit(images[torch.randint(len(images), (args.batch,))])
        mirrored = torch.rand(args.batch) < 0.5
        x[mirrored] = x[mirrored].flip(-1)
        with torch.autocast("cpu", torch.bfloat16):
            latent = vae.encode(x).latent_dist
            y = vae.decode(latent.sample()).sample
        kl = 0.5 * (latent.mean.float() ** 2 + latent.var.float() - 1 - latent.logvar.float()).sum((1, 2, 3)).mean()
        loss = reconstruction_loss(y.float(), x) + args.kl * kl
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        average.update_parameters(vae)
        if step % 100 == 0:
            print(f"{step} loss {loss.item():.4f} {time.perf_counter() - started:.0f}s", flush=True)

    vae = average.module.eval()
    fold_latent_statistics(vae, images[::3])
    with torch.no_grad():
        x = sheets.to_unit(probe)
        y = vae.decode(vae.encode(x).latent_dist.mean).sample
    print(f"PSNR {10 * math.log10(4 / F.mse_loss(y.clamp(-1, 1), x).item()):.2f} dB on {len(x)} images")
    rows = [part for pair in zip(x.split(10), y.split(10), strict=True) for part in pair]
    sheets.save_grid(torch.cat(rows), 10, args.out.with_suffix(".png"))
    vae.save_pretrained(args.out)


if __name__ == "__main__":
    main()
