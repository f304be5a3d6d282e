"""Trying things on a model that leave no trace: everything is put back, whatever happens inside."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lycoris.adapters.adapter import Adapter


@contextmanager
def same_draws(models: Sequence[nn.Module]) -> Iterator[Callable[[Callable[[], Any]], Any]]:
    """Yield a function that runs another with the same random numbers each time, and returns its result.

    They are those of Python, NumPy and torch, on the CPU and on the CUDA devices of the models' parameters. Afterwards
    the generators go on as if nothing had been drawn.
    """
    devices = sorted({p.device.index or 0 for model in models for p in model.parameters() if p.device.type == "cuda"})
    before = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices):
        cpu, others = torch.get_rng_state(), [torch.cuda.get_rng_state(device) for device in devices]

        def again(run: Callable[[], Any]) -> Any:
            torch.set_rng_state(cpu)
            for device, state in zip(devices, others, strict=True):
                torch.cuda.set_rng_state(state, device)
            random.setstate(before[0])
            np.random.set_state(before[1])
            return run()

        try:
            yield again
        finally:
            random.setstate(before[0])
            np.random.set_state(before[1])


@contextmanager
def state_restored(models: Sequence[nn.Module], adapters: Sequence[Adapter]) -> Iterator[None]:
    """Put buffers back in place, and what adapters have noted, at the end of the block.

    Buffers on the meta device, parameters and gradients are not looked after; see `stand_ins`.
    """
    buffers = [(buffer, buffer.clone()) for model in models for buffer in model.buffers() if not buffer.is_meta]
    seen = [(adapter, adapter.seen) for adapter in adapters]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
        for adapter, noted in seen:
            adapter.seen = noted


@contextmanager
def in_evaluation_mode(models: Sequence[nn.Module]) -> Iterator[None]:
    """Set every module inside to evaluation, by the flags alone: a model's own `train` may do more.

    Adapters are switched by their `train`, which compiled graphs follow. Each module gets its own mode back.
    """
    modes = [(module, module.training) for model in models for module in model.modules()]
    try:
        for module, _ in modes:
            _set_mode(module, False)
        yield
    finally:
        for module, mode in modes:
            _set_mode(module, mode)


def _set_mode(module: nn.Module, mode: bool) -> None:
    if isinstance(module, Adapter):
        module.train(mode)
    else:
        module.training = mode


@contextmanager
def stand_ins(models: Sequence[nn.Module]) -> Iterator[None]:
    """Put other parameters in the place of all that train: hooks and gradients of the real ones stay untouched.

    The others share memory with the real ones, so that a write in place reaches both; tied parameters stay tied.
    """
    owned = [
        (module, name, parameter)
        for model in models
        for module in model.modules()
        for name, parameter in module._parameters.items()
        if parameter is not None and parameter.requires_grad
    ]
    made = {id(parameter): nn.Parameter(parameter.detach()) for _, _, parameter in owned}
    try:
        for module, name, parameter in owned:
            module._parameters[name] = made[id(parameter)]
        yield
    finally:
        for module, name, parameter in owned:
            module._parameters[name] = parameter


@contextmanager
def perturb_parameters(parameters: list[nn.Parameter], steps: list[Tensor], by: float) -> Iterator[None]:
    """Add `by` times a step to each parameter in place, and put the very values of before back afterwards.

    Args:
        steps: One for each parameter, of its shape; cast to its precision and device.
    """
    before = [parameter.detach().clone() for parameter in parameters]
    with torch.no_grad():
        for parameter, step in zip(parameters, steps, strict=True):
            parameter.add_(step.to(parameter), alpha=by)
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, value in zip(parameters, before, strict=True):
                parameter.copy_(value)
