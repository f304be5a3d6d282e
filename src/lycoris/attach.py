"""Adapters on layers: the only module of the library, and how it gets onto a layer and off again.

An adapted layer keeps its identity. Its class becomes a derived one of the same name whose `forward` runs the stack of
adapters, and each adapter is a child module that keeps itself out of the layer's `state_dict`. Taking the last adapter
off restores the class.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from lycoris import bases, sharding
from lycoris.algorithm import Affine, Algorithm, Base, Call, interpolate, one_mask
from lycoris.errors import AttachError
from lycoris.geometry import Geometry, describe
from lycoris.recall import Recall, in_backward, may_be_recomputed


class Adapter(nn.Module):
    """An algorithm, its tensors for one layer, and what is in force for the next forward pass."""

    def __init__(
        self,
        algorithm: Algorithm,
        geometry: Geometry,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.algorithm, self.geometry = algorithm, geometry
        self.call = Call(torch.tensor(1.0, dtype=torch.float64))
        self.silent = False
        self._recall = Recall()
        for name, slot in algorithm.slots(geometry).items():
            own = torch.promote_types(dtype, torch.float32) if slot.role == "length" else dtype
            tensor = torch.empty(slot.shape, dtype=own, device=device)
            if slot.trainable:
                self.register_parameter(name, nn.Parameter(tensor))
            else:
                self.register_buffer(name, tensor)

    def tensors(self) -> dict[str, Tensor]:
        """By slot name, live."""
        found: dict[str, Tensor | None] = {**self._parameters, **self._buffers}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def kept(self) -> dict[str, Tensor]:
        """By slot name, what training changes: of a sharded model the shards, never FSDP's passing whole copies."""
        # A module's own state_dict, which the one below hides, is what makes FSDP put its shards back.
        return nn.Module.state_dict(self, keep_vars=True)

    def whole(self) -> dict[str, Tensor]:
        """By slot name, detached and gathered from the processes that share them, all of which have to call this."""
        slots = self.algorithm.slots(self.geometry)
        return {name: sharding.whole(name, tensor, slots[name].shape) for name, tensor in self.kept().items()}

    @torch.no_grad()
    def initialise(self, below: Base) -> None:
        """Draw new tensors; the layer's effect does not change."""
        self.algorithm.initialise(self.tensors(), below)

    @torch.no_grad()
    def fill(self, values: Mapping[str, Tensor]) -> None:
        """Copy tensors in by slot name; all of them, with the right shapes."""
        own = self.kept()
        if own.keys() != values.keys():
            raise AttachError(f"{self.algorithm.name} has the tensors {sorted(own)}; given were {sorted(values)}")
        for name, value in values.items():
            if own[name].shape != value.shape:
                raise AttachError(f"{name} has shape {tuple(own[name].shape)}; given was {tuple(value.shape)}")
            sharding.assign(own[name], value)

    def adapted(self, base: Affine, call: Call | None = None) -> Affine:
        """Weight and bias that this adapter makes of those below, at the strength in force."""
        call = self.call if call is None else call
        keep = None if call.keep is None else one_mask(call.keep).to(base.weight)
        tensors = {name: tensor.to(base.weight) for name, tensor in self.tensors().items()}
        whole = self.algorithm.transform(tensors, base, self.geometry, keep)
        return interpolate(base, whole, torch.as_tensor(call.strength, dtype=torch.float64).to(base.weight))

    def forward(self, below: Base, x: Tensor) -> Tensor:
        if self.silent:
            return below(x)
        if torch.compiler.is_compiling():
            return self.algorithm.forward(self.tensors(), below, x, self.call)
        call = self.call
        if in_backward():
            # Not noted: of several passes before one backward, the first recomputed would hide the others.
            call = self._recall.of(call, x)
        elif may_be_recomputed():
            self._recall.note(call, x)
        if call.strength == 0:
            return below(x)
        return self.algorithm.forward(self.tensors(), below, x, call)

    def extra_repr(self) -> str:
        return str(self.algorithm)

    # An adapter is not part of the layer's own state: base checkpoints load and save as if it were not there.
    def state_dict(self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        return {} if destination is None else destination

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        return


class _Layer:
    """The bottom of a stack: the layer as it was."""

    def __init__(self, layer: nn.Module, forward: Callable[..., Tensor], geometry: Geometry, extra: Any) -> None:
        self.layer, self.forward, self.geometry, self.extra = layer, forward, geometry, extra

    def __call__(self, x: Tensor) -> Tensor:
        args, kwargs = self.extra
        return self.forward(self.layer, x, *args, **kwargs)

    def affine(self) -> Affine:
        return bases.read(self.layer)


class _Stage:
    """An adapter on top of something is again such a thing."""

    def __init__(self, adapter: Adapter, below: Base) -> None:
        self.adapter, self.below = adapter, below

    @property
    def geometry(self) -> Geometry:
        return self.adapter.geometry

    def __call__(self, x: Tensor) -> Tensor:
        return self.adapter(self.below, x)

    def affine(self) -> Affine:
        below = self.below.affine()
        return below if self.adapter.silent else self.adapter.adapted(below)


class Adapted:
    """Mixed into the class of an adapted layer."""

    # `self: Any`: this class is only ever mixed into a module.
    def forward(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        if args:
            x, args = args[0], args[1:]
        else:
            x = kwargs.pop(next(iter(kwargs)))
        first = next(adapters_on(self), None)
        if first is None:
            # Taken off since, while another library's wrapper still holds this method.
            return base_class(self).forward(self, x, *args, **kwargs)
        return _stack(self, first.geometry, (args, kwargs))(x)

    def __reduce_ex__(self: Any, protocol: Any) -> Any:
        # The derived class shares the name of the one it derives from, so pickle could not find it by name.
        return _new, (base_class(self),), self.__dict__.copy()


def top(layer: nn.Module) -> Base:
    """A layer with the adapters it has now, as the next adapter will find it below itself."""
    return _stack(layer, bottom(layer).geometry, ((), {}))


def bottom(layer: nn.Module) -> Base:
    """A layer without its adapters."""
    geometry = describe(layer)
    if geometry is None:
        raise AttachError(f"{type(layer).__name__} is not a layer that adapters can serve")
    return _Layer(layer, base_class(layer).forward, geometry, ((), {}))


def _stack(layer: nn.Module, geometry: Geometry, extra: Any) -> Base:
    below: Base = _Layer(layer, base_class(layer).forward, geometry, extra)
    for adapter in adapters_on(layer):
        below = _Stage(adapter, below)
    return below


def adapters_on(layer: nn.Module) -> Iterator[Adapter]:
    """The adapters of a layer, lowest first."""
    return (child for child in layer._modules.values() if isinstance(child, Adapter))


def base_class(layer: nn.Module) -> type[nn.Module]:
    """The class a layer had before adapters came onto it."""
    order: Any = type(layer).__mro__
    return order[order.index(Adapted) + 1 if Adapted in order else 0]


def attach(layer: nn.Module, name: str, adapter: Adapter) -> None:
    """Put an adapter on top of a layer and of the adapters it has, under the child name `name`.

    Raises `AttachError` when the name is taken, when the layer was sharded without the adapter, or when the layer's
    `forward` was replaced on the instance: such a replacement would run instead of the adapters.
    """
    sharding.check_shared(layer, adapter)
    if "forward" in layer.__dict__:
        raise AttachError(
            f"the forward of this {type(layer).__name__} was replaced on the instance (offloading hooks of accelerate "
            "and older adapter libraries do so) and would bypass the adapter; remove that hook, attach, and wrap "
            "again. With sequential CPU offload, merge the adapters first instead"
        )
    if hasattr(layer, name):
        raise AttachError(f"this {type(layer).__name__} already has something called {name!r}; choose another set name")
    layer.register_module(name, adapter)
    adapter.train(layer.training)
    if not isinstance(layer, Adapted):
        cls: Any = type(layer)
        layer.__class__ = _adapted(cls)


def detach(layer: nn.Module, name: str) -> None:
    """Take an adapter off, wherever in the stack it is; without adapters the layer is as it was before.

    Raises `AttachError` when something else gave the layer another class in the meantime.
    """
    check_detachable(layer)
    del layer._modules[name]
    if isinstance(layer, Adapted) and not any(adapters_on(layer)):
        layer.__class__ = base_class(layer)  # type: ignore[assignment]


def check_detachable(layer: nn.Module) -> None:
    """Raise `AttachError` unless the layer's class is the one that `attach` gave it."""
    if Adapted in type(layer).__mro__[2:]:
        raise AttachError(
            f"this layer became a {type(layer).__name__} after its adapters were attached (parametrisation and FSDP do "
            "so); undo that first"
        )


@cache
def _adapted(cls: Any) -> Any:
    # Same name: other libraries recognise layers by it.
    return type(cls.__name__, (Adapted, cls), {"__module__": cls.__module__, "__qualname__": cls.__qualname__})


def _new(cls: Any) -> Any:
    adapted = _adapted(cls)
    return adapted.__new__(adapted)
