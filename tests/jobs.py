"""What one process trains, and several share: models, jobs, and the files that come of them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import lycoris
from cases import ALGORITHMS, Fused, relative
from lycoris import AdapterSet, RankSchedule, Rule, plan
from ranks import SIZE

TOLERANCE = 1e-12
STEPS, BATCH = 4, 8


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Linear(8, 16), nn.Linear(16, 8, bias=False)
        self.recomputed = False

    def forward(self, x: Tensor) -> Tensor:
        return x + (checkpoint(self.inside, x, use_reentrant=False) if self.recomputed else self.inside(x))

    def inside(self, x: Tensor) -> Tensor:
        return self.narrow(torch.tanh(self.wide(x)))


class Net(nn.Module):
    """A convolution, two blocks and a head whose sizes do not divide by the number of processes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 5)
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


class Kinds(nn.Module):
    """What adapters serve besides linear layers and convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.bare, self.head = nn.LayerNorm(48), Fused(6, 48), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.bare(self.norm(x.flatten(1))))


@dataclass(frozen=True)
class Job:
    """What is trained, and how."""

    algorithm: str
    way: str
    optimizer: str = "adamw"
    base: torch.dtype = torch.float64


def rule(name: str) -> Rule:
    """An algorithm on every layer that it serves."""
    blockwise = "oft" in name or "bias" in name
    return Rule(ALGORITHMS[name], path=re.compile("stem|blocks.*wide") if blockwise else "*")


def start(job: Job, seed: int = 0) -> tuple[Net, AdapterSet]:
    """A frozen model with new adapters."""
    torch.manual_seed(seed)
    model = Net().to(job.base).requires_grad_(False)
    adapters = AdapterSet.build(model, plan(model, rule(job.algorithm), strict=False)).attach()
    adapters.schedule = RankSchedule(max_rank=3)
    adapters.metadata = {"note": "the same"}
    return model, adapters


def wrap(model: Net, way: str) -> nn.Module:
    """The model as several processes share it."""
    if way == "one":
        return model
    for block in model.blocks:
        block.recomputed = way.endswith(", checkpointing")
    if way.startswith("ddp"):
        return DistributedDataParallel(model)
    layers = [layer for block in model.blocks for layer in (block.wide, block.narrow)]
    return fully_sharded(model, *(layers if way == "fsdp on layers" else model.blocks))


def fully_sharded(model: nn.Module, *parts: nn.Module) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (SIZE,))
    for part in (*parts, model):
        fully_shard(part, mesh=mesh)
    return model


def batches(job: Job) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Inputs, targets and timesteps of each step: this process's share of what all of them see."""
    random = torch.Generator().manual_seed(1)
    share = slice(None)
    if dist.is_initialized():
        share = slice(dist.get_rank() * BATCH // SIZE, (dist.get_rank() + 1) * BATCH // SIZE)
    for _ in range(STEPS):
        x, y = (torch.randn(BATCH, *sizes, dtype=torch.float64, generator=random) for sizes in ((3, 4, 4), (5,)))
        timesteps = torch.randint(1000, (BATCH,), generator=random)
        yield x[share].to(job.base), y[share], timesteps[share]


def optimizer_for(job: Job, adapters: AdapterSet) -> torch.optim.Optimizer:
    makes = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}
    return makes[job.optimizer](adapters.parameters(), lr=0.05)


def train(
    job: Job, model: nn.Module, adapters: AdapterSet, optimizer: torch.optim.Optimizer, steps: slice = slice(None)
) -> None:
    for x, y, timesteps in list(batches(job))[steps]:
        optimizer.zero_grad()
        adapters.set_timesteps(timesteps)
        (model(x) - y).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(adapters.parameters(), 0.5)
        optimizer.step()
    adapters.set_timesteps(None)


def trained(job: Job, folder: Path) -> Path:
    """Train, and write the adapters: every process, so that what each has gathered is compared."""
    model, adapters = start(job)
    wrapped = wrap(model, job.way)
    train(job, wrapped, adapters, optimizer_for(job, adapters))
    return written(adapters, folder)


def written(adapters: AdapterSet, folder: Path) -> Path:
    """An adapter file of this process's own."""
    path = folder / f"{dist.get_rank() if dist.is_initialized() else 'one'}.safetensors"
    lycoris.write(adapters.bundle(), path)
    return path


def content(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with safe_open(path, framework="pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118 -- no mapping


def assert_same_files(paths: list[Path], wanted: Path, tolerance: float = TOLERANCE) -> None:
    tensors, metadata = content(wanted)
    for path in paths:
        found, said = content(path)
        assert said == metadata
        assert found.keys() == tensors.keys()
        for key, tensor in tensors.items():
            assert found[key].dtype == tensor.dtype
            assert relative(found[key], tensor) < tolerance, key
