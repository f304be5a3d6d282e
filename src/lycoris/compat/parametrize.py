"""A parameter of any module, made what an adapter makes of it by `torch.nn.utils.parametrize`."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lycoris.adapters import merging
from lycoris.adapters.adapter import Adapter
from lycoris.adapters.merging import Merge
from lycoris.compat.quantized import RefusedError
from lycoris.errors import AttachError, ConfigError
from lycoris.layers import base_weights
from lycoris.layers.geometry import Geometry
from lycoris.layers.sites import Site


class Parametrised:
    """A parameter by its module and name: one parametrisation on it, off it, folded in and out again."""

    def __init__(self, module: nn.Module, name: str) -> None:
        """Raises `ConfigError` for what is no matrix, `RefusedError` for a weight of few bits."""
        self.module, self.name = module, name
        if name not in module._parameters and not parametrize.is_parametrized(module, name):
            have = ", ".join(own for own, _ in module.named_parameters(recurse=False)) or "none"
            raise ConfigError(f"this {type(module).__name__} has no parameter {name!r}; it has {have}")
        weight = getattr(module, name)
        if weight.dim() < 2:
            raise ConfigError(f"{name} is a matrix or a kernel, not a tensor of shape {tuple(weight.shape)}")
        if not weight.is_floating_point() or base_weights.is_float8(weight.dtype):
            raise RefusedError(
                f"{name} is {weight.dtype}, to which every pass would round a parametrised one; put the module on the "
                "layer with apply_to"
            )
        kind: Any = "linear" if weight.dim() == 2 else "conv"
        self.geometry = Geometry(kind=kind, shape=tuple(weight.shape), has_bias=False)
        self.home: dict[str, Any] = {
            "device": weight.device,
            "dtype": torch.promote_types(weight.dtype, torch.float32),
        }
        self._merge: Merge | None = None
        self._was_on = False

    @property
    def merged(self) -> bool:
        return self._merge is not None

    @property
    def original(self) -> Tensor:
        """The parameter itself, whatever is on it."""
        stack = self._stack()
        if stack is not None and not stack.is_tensor:
            raise ConfigError(f"another parametrisation makes {self.name} of several parameters: {stack}")
        found: Tensor = getattr(self.module, self.name) if stack is None else stack.original
        return found

    def below(self, by: nn.Module) -> Tensor:
        """What a parametrisation gets: the parameter as those under it make it, without a merge of its own."""
        if self._merge is not None:
            return self._merge.old.weight
        stack, value = self._stack(), None
        for each in () if stack is None else stack:
            if each is by:
                return self.original if value is None else value
            value = each(*_originals(stack)) if value is None else each(value)
        return self.original if value is None else value

    def put(self, by: nn.Module) -> None:
        """Put a parametrisation on top of those that are there, unless it is one of them."""
        if any(each is by for each in self._stack() or ()):
            return
        parametrize.register_parametrization(self.module, self.name, by)

    def take(self, by: nn.Module) -> bool:
        """Take a parametrisation off, wherever it is; the others stay. False when it is not on."""
        stack = self._stack()
        at = next((at for at, each in enumerate(stack or ()) if each is by), None)
        if stack is None or at is None:
            return False
        if len(stack) == 1:
            parametrize.remove_parametrizations(self.module, self.name, leave_parametrized=False)
        else:
            del stack[at]
        return True

    def merge(self, by: nn.Module, adapter: Adapter, strength: float) -> None:
        """Fold an adapter into the parameter, as `AdapterSet.merge` does into a layer's weight.

        Raises `AttachError`, and changes nothing, for a second merge, and for a parameter that something else makes.
        """
        if self._merge is not None:
            raise AttachError(f"this adapter is merged into {self.name} already; restore it first")
        if any(each is not by for each in self._stack() or ()):
            raise AttachError(f"{self.name} has other parametrisations too; take them off to merge into it")
        with ExitStack() as undo:
            was_on = self.take(by)
            if was_on:
                undo.callback(self.put, by)
            holder = base_weights.holder(self.module, self.name)
            site = Site(self.name, self.module, self.name, self.geometry)
            merge = merging.fold(self.name, holder, (adapter,), strength)._replace(attribute=self.name)
            # Before anything is settled: a warning may be an error.
            merging.report(holder, {self.name: site}, {self.name: merge}, strength, {}).warn(stacklevel=3)
            base_weights.install(self.module, merge.new, self.name)
            undo.pop_all()
        self._merge, self._was_on, adapter.merged = merge, was_on, True

    def unmerge(self, by: nn.Module, adapter: Adapter, *, put: bool) -> None:
        """Put the very parameter back that was there before the merge and, if asked for, what was on it.

        Raises `AttachError`, and changes nothing, when something else was merged, loaded or trained on top.
        """
        if self._merge is None:
            return
        merging.check_untouched(self.name, self.module, self._merge)
        merging.restore_parameters(self.module, self._merge)
        self._merge, adapter.merged = None, False
        if put and self._was_on:
            self.put(by)

    def _stack(self) -> Any:
        if not parametrize.is_parametrized(self.module, self.name):
            return None
        parametrizations: Any = self.module.parametrizations
        return parametrizations[self.name]


def _originals(stack: Any) -> list[Tensor]:
    """What the lowest parametrisation is called with."""
    return [stack.original] if stack.is_tensor else [getattr(stack, f"original{n}") for n in range(stack.ntensors)]
