"""Train the demo's text-to-image base model: a UNet and a CLIP text encoder on two emoji styles.

    python train_base.py data out/vae out/tokenizer out/base --steps 8800

Captions are `name, style`, with `noto` and `flat` as style words, so that a concept is learned apart from the way it
is drawn. Writes `out/base/pipeline` (StableDiffusionPipeline, float16) with progress pictures beside it, and a state
from which the same command goes on.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

import sheets

STYLES = ("noto", "fluent-flat")
WIDTH = 128
INVENTED = ("blue apple", "cat with heart eyes", "yellow car", "purple flower", "robot dog", "pizza face")
TIMESTEPS = (50, 200, 350, 500, 650, 800, 950)


@dataclass
class Model:
    vae: AutoencoderKL
    unet: UNet2DConditionModel
    text: CLIPTextModel
    tokenizer: CLIPTokenizer
    scheduler: DDIMScheduler

    def encode_text(self, captions: list[str]) -> torch.Tensor:
        ids = self.tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
        return self.text(ids)[0]

    def loss(self, z: torch.Tensor, noise: torch.Tensor, t: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            predicted = self.unet(self.scheduler.add_noise(z, noise, t), t, text).sample
        return F.mse_loss(predicted.float(), self.scheduler.get_velocity(z, noise, t))

    def trained(self) -> torch.nn.ModuleList:
        return torch.nn.ModuleList([self.unet, self.text])


def build(vae: Path, tokenizer: Path) -> Model:
    words = CLIPTokenizer.from_pretrained(tokenizer)
    unet = UNet2DConditionModel(
        sample_size=sheets.PIXELS // 4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(64, 128),
        layers_per_block=1,
        cross_attention_dim=WIDTH,
        attention_head_dim=4,
        norm_num_groups=16,
        resnet_time_scale_shift="scale_shift",
        addition_embed_type="text",
        addition_embed_type_num_heads=4,
    )
    # The plain attention processor: backward through fused attention in bfloat16 is slow on CPU.
    unet.set_attn_processor(AttnProcessor())
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(words),
            hidden_size=WIDTH,
            intermediate_size=4 * WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=words.model_max_length,
            projection_dim=WIDTH,
            bos_token_id=words.bos_token_id,
            eos_token_id=words.eos_token_id,
            pad_token_id=words.pad_token_id,
        )
    )
    scheduler = DDIMScheduler(
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        timestep_spacing="trailing",
    )
    return Model(AutoencoderKL.from_pretrained(vae).eval().requires_grad_(False), unet, text, words, scheduler)


@dataclass
class Data:
    latents: torch.Tensor
    images: torch.Tensor
    emoji: list[sheets.Emoji]
    train: list[int]
    held_out: list[int]


def kept_out(folder: Path, count: int = 32) -> set[str]:
    """Names of the concepts that are kept from training in every style."""
    names = {each.name for style in STYLES for each in sheets.load(folder, style)[1]}
    return set(random.Random(1).sample(sorted(names - set(sheets.SHOWN)), count))


@torch.no_grad()
def read(folder: Path, vae: AutoencoderKL) -> Data:
    """All images of both styles."""
    parts = [sheets.load(folder, style) for style in STYLES]
    images, emoji = torch.cat([part[0] for part in parts]), [e for part in parts for e in part[1]]
    latents = torch.cat([vae.encode(sheets.to_unit(part)).latent_dist.mean for part in images.split(64)])
    kept = kept_out(folder)
    train = [i for i, e in enumerate(emoji) if e.name not in kept]
    return Data(latents, images, emoji, train, [i for i, e in enumerate(emoji) if e.name in kept])


@torch.no_grad()
def held_out_loss(model: Model, data: Data, which: list[int]) -> float:
    generator = torch.Generator().manual_seed(5)
    text = model.encode_text([data.emoji[i].caption() for i in which])
    z, total = data.latents[which], 0.0
    for t in TIMESTEPS:
        noise = torch.randn(z.shape, generator=generator)
        total += model.loss(z, noise, torch.full((len(z),), t), text).item()
    return total / len(TIMESTEPS)


@torch.no_grad()
def draw(model: Model, captions: list[str], steps: int = 25, guidance: float = 3.0) -> torch.Tensor:
    z = torch.randn((len(captions), 4, 16, 16), generator=torch.Generator().manual_seed(0))
    text = torch.cat([model.encode_text([""] * len(captions)), model.encode_text(captions)])
    model.scheduler.set_timesteps(steps)
    for t in model.scheduler.timesteps:
        with torch.autocast("cpu", torch.bfloat16):
            plain, prompted = model.unet(torch.cat([z, z]), t, text).sample.float().chunk(2)
        z = model.scheduler.step(plain + guidance * (prompted - plain), t, z).prev_sample
    return model.vae.decode(z).sample


def progress_picture(model: Model, data: Data, path: Path) -> None:
    """Per style: real and drawn pictures of the shown concepts; then invented prompts and held-out ones."""
    rows = []
    for style in STYLES:
        known = {e.name: i for i, e in enumerate(data.emoji) if e.style == style.split("-")[-1]}
        real = sheets.to_unit(data.images[[known[name] for name in sheets.SHOWN[:12]]])
        rows += [real, draw(model, [data.emoji[known[name]].caption() for name in sheets.SHOWN[:12]])]
    rows.append(draw(model, [f"{name}, {style}" for style in ("noto", "flat") for name in INVENTED]))
    rows += [sheets.to_unit(data.images[data.held_out[:12]])]
    rows += [draw(model, [data.emoji[i].caption() for i in data.held_out[:12]])]
    sheets.save_grid(torch.cat(rows), 12, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("data", "vae", "tokenizer", "out"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--steps", type=int, default=8800)
    parser.add_argument("--batch", type=int, default=48)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--report", type=int, default=500, help="steps between progress pictures")
    args = parser.parse_args()

    rng = random.Random(0)
    torch.manual_seed(0)
    model = build(args.vae, args.tokenizer)
    data = read(args.data, model.vae)
    trained, train = model.trained(), torch.tensor(data.train)
    optimizer = torch.optim.AdamW(trained.parameters(), lr=args.lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    average = [p.detach().clone() for p in trained.parameters()]
    args.out.mkdir(parents=True, exist_ok=True)
    state_file, start = args.out / "state.pt", 0
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        trained.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        average, start = state["average"], state["step"]
    size = sum(p.numel() for p in trained.parameters()) / 1e6
    print(f"{len(data.train)} images, {len(data.held_out)} held out, {size:.2f} M parameters, from step {start}")

    started, smooth = time.perf_counter(), 1.0
    for step in range(start + 1, args.steps + 1):
        ramp = min(1.0, step / 200) * (0.49 * (1 + math.cos(math.pi * step / args.steps)) + 0.02)
        for group in optimizer.param_groups:
            group["lr"] = args.lr * ramp
        batch = train[torch.randint(len(train), (args.batch,))]
        # An empty caption in a tenth of the samples is what classifier-free guidance needs.
        captions = ["" if rng.random() < 0.1 else data.emoji[i].caption(rng) for i in batch.tolist()]
        z = data.latents[batch]
        with torch.autocast("cpu", torch.bfloat16):
            text = model.encode_text(captions)
        loss = model.loss(z, torch.randn_like(z), torch.randint(1000, (args.batch,)), text)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
        optimizer.step()
        decay = min(0.9995, (step + 1) / (step + 50))
        torch._foreach_lerp_(average, [p.detach() for p in trained.parameters()], 1 - decay)
        smooth = 0.98 * smooth + 0.02 * loss.item()
        if step % 100 == 0:
            speed = (step - start) * args.batch / (time.perf_counter() - started)
            print(f"{step} loss {smooth:.4f} {speed:.1f} images/s", flush=True)
        if step % args.report == 0 or step == args.steps:
            state = {"model": trained.state_dict(), "optimizer": optimizer.state_dict(), "average": average}
            torch.save(state | {"step": step}, state_file)
            report(model, data, average, args.out, step)


@torch.no_grad()
def report(model: Model, data: Data, average: list[torch.Tensor], out: Path, step: int) -> None:
    """Losses, a picture and the pipeline on disk, all with the averaged weights."""
    parameters = list(model.trained().parameters())
    live = [p.clone() for p in parameters]
    torch._foreach_copy_(parameters, average)
    losses = {
        "train": held_out_loss(model, data, data.train[:: len(data.train) // 64]),
        "held_out": held_out_loss(model, data, data.held_out),
    }
    print("REPORT", json.dumps({"step": step} | losses), flush=True)
    progress_picture(model, data, out / f"step_{step:06d}.png")
    StableDiffusionPipeline(
        vae=model.vae,
        text_encoder=model.text,
        tokenizer=model.tokenizer,
        unet=model.unet,
        scheduler=model.scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(out / "pipeline")
    torch._foreach_copy_(parameters, live)


if __name__ == "__main__":
    main()
