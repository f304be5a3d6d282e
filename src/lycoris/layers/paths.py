"""Paths of modules in a model, without the elements that wrappers add to them.

`torch.compile`, activation checkpointing, data parallelism and PEFT put a module around another one. The path of a
layer is the same with and without them, so that a file made on one model is a file for the other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType

from torch import Tensor, nn

WRAPPERS: Mapping[tuple[str, str], str] = MappingProxyType(
    {
        ("torch._dynamo.", "OptimizedModule"): "_orig_mod",
        ("torch.distributed.", "ActivationWrapper"): "_checkpoint_wrapped_module",
        ("torch.distributed.", "FullyShardedDataParallel"): "_fsdp_wrapped_module",
        ("torch.nn.parallel.", "DistributedDataParallel"): "module",
        ("torch.nn.parallel.", "DataParallel"): "module",
        ("torch.optim.swa_utils", "AveragedModel"): "module",
        ("deepspeed.", "DeepSpeedEngine"): "module",
        ("peft.", "PeftModel"): "base_model",
        ("peft.", "BaseTuner"): "model",
    }
)
"""Where its class is defined and what it is called → the attribute that holds the module inside."""


def unwrap(module: nn.Module) -> nn.Module:
    """Return the module inside all wrappers around it, those of `WRAPPERS`.

    A module without one is returned as it is.
    """
    while (inside := _find_wrapped(module)) is not None:
        module = inside
    return module


def named_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield path and module, like `model.named_modules()` without the wrappers, the model itself first, under "".

    A module that appears twice is given once, under its first path.
    """
    return _visit(unwrap(model), "", set())


def named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield path and tensor of every parameter and buffer, module by module, parameters first.

    A tensor that several modules share is given for each. Buffers are included whether or not they are persistent.
    """
    for path, module in named_modules(model):
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                yield f"{path}.{name}" if path else name, tensor


def submodule(model: nn.Module, path: str) -> nn.Module:
    """Return the module at a path, without wrappers around it or on the way to it.

    Args:
        path: dotted; "" for the model itself.

    Raises:
        AttributeError: there is none.
    """
    found = unwrap(model)
    for name in path.split(".") if path else ():
        child = found._modules.get(name)
        if child is None:
            raise AttributeError(f"{type(found).__name__} has no module {name!r}")
        found = unwrap(child)
    return found


def ancestors(path: str) -> list[str]:
    """Return the paths of the modules around one, nearest first, that of the model, "", last.

    The path itself is not among them: "a.b" has "a" and "", and "" has none.
    """
    parts = path.split(".") if path else []
    return [".".join(parts[:n]) for n in range(len(parts) - 1, -1, -1)]


def model_order(model: nn.Module) -> dict[str, int]:
    """Return the place of every module and parameter in the order of the model, by path.

    Places count up from 0. A module that appears several times has a place for each of its paths.
    """
    found: dict[str, int] = {}
    for path, module in _visit(unwrap(model), "", None):
        found.setdefault(path, len(found))
        for name in module._parameters:
            found.setdefault(f"{path}.{name}" if path else name, len(found))
    return found


def _visit(module: nn.Module, path: str, seen: set[int] | None) -> Iterator[tuple[str, nn.Module]]:
    """`seen` None gives modules that appear twice twice."""
    if seen is not None:
        if id(module) in seen:
            return
        seen.add(id(module))
    yield path, module
    for name, child in module._modules.items():
        if child is not None:
            yield from _visit(unwrap(child), f"{path}.{name}" if path else name, seen)


def _find_wrapped(module: nn.Module) -> nn.Module | None:
    for cls in type(module).__mro__:
        for (home, name), attribute in WRAPPERS.items():
            if cls.__name__ == name and cls.__module__.startswith(home):
                inside = getattr(module, attribute, None)
                return inside if isinstance(inside, nn.Module) else None
    return None
