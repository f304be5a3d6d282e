"""Adapters on bare parameters of any module, by `torch.nn.utils.parametrize`."""

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


class ParametrizedTensor:
    """A parameter, by its module and name, with at most one adapter that parametrizes it or is merged into it.

    Other parametrizations on the same parameter are left in place.
    """

    def __init__(self, module: nn.Module, name: str) -> None:
        """Raise `ConfigError` for a parameter of fewer than two dimensions, `RefusedError` for weights of few bits."""
        self.module, self.name = module, name
        if name not in module._parameters and not parametrize.is_parametrized(module, name):
            have = ", ".join(own for own, _ in module.named_parameters(recurse=False)) or "none"
            raise ConfigError(f"this {type(module).__name__} has no parameter {name!r}; it has {have}")
        weight = getattr(module, name)
        if weight.dim() < 2:
            raise ConfigError(
                f"{name} must be a matrix or a convolution kernel, not a tensor of shape {tuple(weight.shape)}"
            )
        if not weight.is_floating_point() or base_weights.is_float8(weight.dtype):
            raise RefusedError(
                f"{name} is {weight.dtype}, and every pass would round the parametrized weight; adapt the layer with "
                "apply_to instead"
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
        """The parameter itself, below all parametrizations.

        Raises `ConfigError` when another parametrization computes it from several parameters.
        """
        stack = self._stack()
        if stack is not None and not stack.is_tensor:
            raise ConfigError(f"another parametrization computes {self.name} from several parameters: {stack}")
        found: Tensor = getattr(self.module, self.name) if stack is None else stack.original
        return found

    def below(self, by: nn.Module) -> Tensor:
        """Return the input of the parametrization `by`: the value after those below it, before a merge of its own.

        Without `by` in the stack, it is the value after all parametrizations.
        """
        if self._merge is not None:
            return self._merge.old.weight
        stack, value = self._stack(), None
        for each in () if stack is None else stack:
            if each is by:
                return self.original if value is None else value
            value = each(*_originals(stack)) if value is None else each(value)
        return self.original if value is None else value

    def put(self, by: nn.Module) -> None:
        """Add a parametrization on top of the existing ones.

        Does nothing if it is one of them already.
        """
        if any(each is by for each in self._stack() or ()):
            return
        parametrize.register_parametrization(self.module, self.name, by)

    def take(self, by: nn.Module) -> bool:
        """Remove a parametrization, wherever it is in the stack; others stay.

        Returns False if it was not there. Removing the last one restores the parameter object itself.
        """
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
        """Merge an adapter into the parameter, as `AdapterSet.merge` does with a layer's weight.

        The parametrization `by` is removed meanwhile. Raises `AttachError`, and changes nothing, for a second merge and
        when other parametrizations are on the parameter.
        """
        if self._merge is not None:
            raise AttachError(f"this adapter is already merged into {self.name}; call restore() first")
        if any(each is not by for each in self._stack() or ()):
            raise AttachError(f"{self.name} has other parametrizations; remove them before merging")
        with ExitStack() as undo:
            was_on = self.take(by)
            if was_on:
                undo.callback(self.put, by)
            holder = base_weights.holder(self.module, self.name)
            site = Site(self.name, self.module, self.name, self.geometry)
            merge = merging.fold(self.name, holder, (adapter,), strength)._replace(attribute=self.name)
            # Before anything changes, since a warning may be raised as an error.
            merging.report(holder, {self.name: site}, {self.name: merge}, strength, {}).warn(stacklevel=3)
            base_weights.install(self.module, merge.new, self.name)
            undo.pop_all()
        self._merge, self._was_on, adapter.merged = merge, was_on, True

    def unmerge(self, by: nn.Module, adapter: Adapter, *, put: bool) -> None:
        """Restore the parameter object from before the merge and, with `put`, the parametrization that was on it.

        Does nothing when nothing is merged. Raises `AttachError`, and changes nothing, when the parameter was merged
        into, loaded or trained since.
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
    """Return the arguments of the lowest parametrization."""
    return [stack.original] if stack.is_tensor else [getattr(stack, f"original{n}") for n in range(stack.ntensors)]
