"""Time and memory of one forward and backward pass through one layer."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from benchmarks.kept import Kept


class StepError(Exception):
    """A pass through an arm failed."""

    def __init__(self, arm: Arm, cause: Exception) -> None:
        super().__init__(str(cause))
        self.arm, self.cause = arm, cause


@dataclass(frozen=True)
class Arm:
    """Something to measure: a layer, adapted or frozen, with the input and the gradient that it is given."""

    call: Callable[[Tensor], Tensor]
    x: Tensor
    gradient: Tensor
    frozen: tuple[Tensor, ...]
    """The base's weight and bias."""
    parameters: tuple[nn.Parameter, ...] = ()

    def clear(self) -> None:
        self.x.grad = None
        for parameter in self.parameters:
            parameter.grad = None

    def forward(self, x: Tensor) -> Tensor:
        try:
            return self.call(x)
        except Exception as error:  # whatever a library raises is its result
            raise StepError(self, error) from error

    def step(self) -> None:
        try:
            self.call(self.x).backward(self.gradient)
        except Exception as error:  # whatever a library raises is its result
            raise StepError(self, error) from error

    @property
    def resident(self) -> int:
        """Bytes that are there before a step: weights, adapter, input and gradient of the output."""
        return _bytes([*self.frozen, *self.parameters, *self._buffers(), self.x, self.gradient])

    def _buffers(self) -> list[Tensor]:
        return list(self.call.buffers()) if isinstance(self.call, nn.Module) else []


def times(arms: Mapping[str, Arm], seconds: float) -> dict[str, dict[str, float]]:
    """Median seconds of a step of every arm, taken in turns until `seconds` are over; each has at least one."""
    taken: dict[str, list[float]] = {name: [] for name in arms}
    order, end = list(arms), time.perf_counter() + seconds
    while True:
        for name in order:
            taken[name].append(_timed(arms[name]))
        # Whoever came last finds its tensors in the cache.
        order.reverse()
        if time.perf_counter() >= end:
            return {name: {"median": statistics.median(values), "count": len(values)} for name, values in taken.items()}


def _timed(arm: Arm) -> float:
    arm.clear()
    if arm.x.is_cuda:
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        start.record()
        arm.step()
        stop.record()
        torch.cuda.synchronize()
        return start.elapsed_time(stop) / 1000
    begun = time.perf_counter()
    arm.step()
    return time.perf_counter() - begun


def memory(arm: Arm) -> dict[str, Any]:
    """Bytes of one arm.

    `saved` is what autograd keeps between forward and backward, weights and input aside; `saves_weight` says whether a
    tensor as large as the weight is among it. `peak` is the most that is allocated at any moment of a step: `resident`
    from before it, `transient` on top. On a CPU that is what PyTorch's allocator hands out, without the scratch space
    that its matrix libraries take on their own.
    """
    saved, weight_sized = _saved(arm)
    transient = _transient_cuda(arm) if arm.x.is_cuda else _transient_cpu(arm)
    peak = arm.resident + transient
    return {
        "saved": saved,
        "saves_weight": weight_sized,
        "resident": arm.resident,
        "transient": transient,
        "peak": peak,
    }


def _saved(arm: Arm) -> tuple[int, bool]:
    def kept(x: Tensor) -> list[Tensor]:
        found = Kept(*arm.frozen, *arm.parameters, *arm._buffers(), x)
        with found.during():
            y = arm.forward(x)
        # While the output is alive, so is what its backward needs.
        tensors = found.tensors()
        del y
        return tensors

    arm.clear()
    # One token or column less, so that no activation has as many numbers as the weight by chance.
    cut = arm.x.detach().narrow(1 if arm.x.dim() == 3 else 3, 0, arm.x.shape[1 if arm.x.dim() == 3 else 3] - 1)
    sizes = {t.numel() for t in kept(cut.contiguous().requires_grad_())}
    return _bytes(kept(arm.x)), arm.frozen[0].numel() in sizes


def _transient_cpu(arm: Arm) -> int:
    arm.clear()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        arm.step()
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def _transient_cuda(arm: Arm) -> int:
    arm.clear()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    arm.step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _bytes(tensors: Iterable[Tensor]) -> int:
    """Of their storages, each counted once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())
