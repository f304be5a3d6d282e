"""How long importing the library and attaching adapters to many layers take. `python -m benchmarks.startup`"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

import torch
from torch import nn

from lycoris import BOFT, IA3, OFT, AdapterSet, DoRA, DyLoRA, Full, GLoRA, LoHa, LoKr, LoRA, Rule, TLoRA, plan
from lycoris.algorithms.base import Algorithm

LAYERS, WIDTH, ROUNDS = 500, 320, 5
ALGORITHMS: tuple[Algorithm, ...] = (
    LoRA(rank=16),
    LoHa(rank=8),
    LoKr(rank=16, factor=8),
    DyLoRA(rank=16),
    GLoRA(rank=16),
    IA3(),
    OFT(block_size=32),
    BOFT(block_size=10),
    Full(),
    DoRA(inner=LoRA(rank=16)),
    TLoRA(rank=16),
)


def import_seconds(what: str) -> float:
    """Of a fresh process, the time that importing takes."""
    code = f"import time; t = time.perf_counter(); import {what}; print(time.perf_counter() - t)"
    found = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout]
    return float(found[0])


def attach_seconds(algorithm: Algorithm) -> float:
    """Planning, making and attaching adapters on all layers."""
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)))
    start = time.perf_counter()
    AdapterSet.build(model, plan(model, Rule(algorithm))).attach()
    return time.perf_counter() - start


def main() -> None:
    torch.set_num_threads(1)
    # Turn by turn: what else the machine does meets both alike.
    rounds = [(import_seconds("torch"), import_seconds("torch, lycoris")) for _ in range(ROUNDS)]
    torch_alone = statistics.median(alone for alone, _ in rounds)
    both = statistics.median(both for _, both in rounds)
    print(f"import torch: {torch_alone:.2f} s; with lycoris {both:.2f} s; lycoris adds {both - torch_alone:.2f} s")
    print(f"plan, make and attach on {LAYERS} linear layers of {WIDTH}x{WIDTH}:")
    for algorithm in ALGORITHMS:
        print(f"  {statistics.median(attach_seconds(algorithm) for _ in range(3)):6.2f} s  {algorithm}")


if __name__ == "__main__":
    main()
