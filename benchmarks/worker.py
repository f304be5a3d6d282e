"""One library in its own process: `python -m benchmarks.worker LIBRARY` answers one line of JSON with another.

Requests, in this order for each case: {"do": "prepare", "layer": name, "case": name, "setting": {...}}, then any
number of {"do": "time", "seconds": s} and {"do": "memory"}. The parent asks several such processes in turn.
"""

from __future__ import annotations

import copy
import json
import os
import sys
import time
from typing import Any

import torch
from torch import nn

from benchmarks.cases import CASES, LAYERS, Case, Setting
from benchmarks.libraries import ARMS, NotServedError, attach
from benchmarks.measure import Arm, StepError, memory, times

FROZEN = "frozen"
TOO_LONG = 60
"""Seconds of one forward pass after which a case is given up: none of these layers needs as many itself."""


class Session:
    """The case at hand: the frozen layer and the arms of one library over the same weights."""

    def __init__(self, library: str) -> None:
        self.library = library
        self.arms: dict[str, Arm] = {}

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """A reply for one request. A library that fails is a reply too; wrong requests raise."""
        if request["do"] == "prepare":
            return self._prepare(request)
        if request["do"] not in ("time", "memory"):
            raise ValueError(f"a worker can prepare, time and memory, not {request['do']!r}")
        try:
            if request["do"] == "time":
                return times(self.arms, request["seconds"])
            return {name: memory(arm) for name, arm in self.arms.items()}
        except StepError as error:
            # One that draws ranks at random can work when it is prepared and fail later.
            name = next(name for name, arm in self.arms.items() if arm is error.arm)
            del self.arms[name]
            return {**self.answer(request), name: {"error": _told(error.cause)}}

    def _prepare(self, request: dict[str, Any]) -> dict[str, Any]:
        setting, case = Setting(**request["setting"]), CASES[request["case"]]
        torch.set_num_threads(setting.threads)
        torch.manual_seed(0)
        like = {"device": setting.device, "dtype": getattr(torch, setting.dtype)}
        layer = LAYERS[request["layer"]].build().to(**like).requires_grad_(False)
        x = LAYERS[request["layer"]].input().to(**like).requires_grad_()
        gradient = torch.randn_like(layer(x).detach())
        frozen = tuple(layer.parameters())

        self.arms, told = {}, {}
        if setting.compiled:
            torch.compiler.reset()
        base = Arm(_run(layer, setting), x, gradient, frozen)
        base.step()
        for name in ARMS[self.library]:
            # The same parameters in a layer of its own, so that an adapter changes nothing for the others.
            own = copy.deepcopy(layer, {id(tensor): tensor for tensor in frozen})
            try:
                self.arms[name], told[name] = _adapted(name, own, case, setting, base)
            except Exception as error:  # whatever a library raises is its result
                told[name] = {"error": _told(error)}
        self.arms = {FROZEN: base, **self.arms}
        return told


def _told(error: Exception) -> str:
    kind = "" if isinstance(error, NotServedError) else f"{type(error).__name__}: "
    return f"{kind}{error}"[:400]


def _run(call: Any, setting: Setting) -> Any:
    return torch.compile(call, fullgraph=True) if setting.compiled else call


def _adapted(name: str, layer: nn.Module, case: Case, setting: Setting, base: Arm) -> tuple[Arm, dict[str, Any]]:
    """An arm with the case's adapter on the layer, and what to say of it.

    One step must work, change the output and give gradients: what does nothing would look fast. The gradient that goes
    in has the precision of the output, which not every library keeps.
    """
    attached = attach(name, layer, case)
    call = _run(attached.call, setting)
    begun = time.perf_counter()
    y = call(base.x)
    seconds = time.perf_counter() - begun
    if seconds > TOO_LONG and not setting.compiled:
        raise NotServedError(f"forward alone takes {seconds:.0f} seconds; not timed further")
    arm = Arm(call, base.x, base.gradient.to(y.dtype), base.frozen, tuple(attached.parameters))
    arm.clear()
    y.backward(arm.gradient)
    reference = base.call(base.x).detach()
    change = float((y.detach() - reference).float().norm() / reference.float().norm())
    if not 0 < change < float("inf"):
        raise NotServedError(f"the adapter changes the output by a factor of {change}")
    idle = sum(parameter.grad is None for parameter in arm.parameters)
    if idle and case.algorithm != "dylora":
        raise NotServedError(f"{idle} of {len(arm.parameters)} parameters get no gradient")
    parameters = sum(parameter.numel() for parameter in arm.parameters)
    return arm, {"note": attached.note, "parameters": parameters, "change": change}


def main() -> None:
    """Answer until the input ends. What libraries print goes to the error stream."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    session = Session(sys.argv[1])
    for line in sys.stdin:
        print(json.dumps(session.answer(json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
