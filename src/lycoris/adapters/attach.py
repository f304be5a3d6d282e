"""How adapters get onto a layer, or a bare parameter, and off again.

An adapted layer keeps its identity. Its class becomes a derived one of the same name whose `forward` runs the stack of
adapters, and each adapter is a child module that keeps itself out of the layer's `state_dict`. Taking the last adapter
off restores the class.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lycoris.adapters.adapter import Adapter
from lycoris.adapters.recomputation import PassState, replayed_random
from lycoris.adapters.usage import is_exporting
from lycoris.algorithms.layer_below import BareWeight, LayerBelow
from lycoris.errors import AttachError
from lycoris.layers import base_weights, sharding
from lycoris.layers.geometry import Affine, Geometry
from lycoris.layers.sites import Site

BASE = "_lycoris_base"
"""Attribute of the class of an adapted layer: the class it had before."""

OFFLOAD_HOOK = "_hf_hook"
"""Attribute under which accelerate puts its hooks on a module."""


class _BaseLayer:
    """The bottom of a stack: the layer as it was."""

    def __init__(self, layer: nn.Module, forward: Callable[..., Tensor], geometry: Geometry, extra: Any) -> None:
        self.layer, self.forward, self.geometry, self.extra = layer, forward, geometry, extra

    def __call__(self, x: Tensor) -> Tensor:
        args, kwargs = self.extra
        y = self.forward(self.layer, x, *args, **kwargs)
        return self._with_derivative(x, y) if _is_cut(x, y) else y

    def _with_derivative(self, x: Tensor, y: Tensor) -> Tensor:
        # It loads torch's compiler, which takes longer than all the rest of the library, and few layers need it.
        from lycoris.layers import derivative

        adapters = list(adapters_on(self.layer))
        for adapter in adapters:
            adapter.seen.cut = True
        return derivative.supply(self.layer, adapters[0].path if adapters else "", self.geometry, x, y)

    def affine(self) -> Affine:
        weight, bias = base_weights.read(self.layer)
        return Affine(self.geometry.transpose_stored(weight), bias)

    def bias(self) -> Tensor | None:
        bias = getattr(self.layer, "bias", None) if self.geometry.has_bias else None
        kept = bias is None or (bias.is_floating_point() and not base_weights.is_float8(bias.dtype))
        return bias if kept else self.affine().bias

    def plain(self, x: Tensor) -> Affine | None:
        layer: Any = self.layer
        if (
            self.forward not in _STANDARD_FORWARDS
            or self.extra != ((), {})
            or type(layer.weight) not in (Tensor, nn.Parameter)
        ):
            return None
        other = x.is_floating_point() and layer.weight.dtype != x.dtype
        return None if other or torch.is_autocast_enabled(x.device.type) else self.affine()

    def run(self, x: Tensor, affine: Affine) -> Tensor:
        if self.forward in _STANDARD_FORWARDS or base_weights.storage(self.layer).low_bit:
            return self.geometry.op(x, *affine)
        return _run_with(
            self.layer, self.forward, x, Affine(self.geometry.transpose_stored(affine.weight), affine.bias)
        )


_STANDARD_FORWARDS: frozenset[Any] = frozenset(
    cls.forward
    for cls in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
)
"""Forward methods that do what `Geometry.op` does and nothing else."""


def _run_with(layer: nn.Module, forward: Callable[..., Tensor], x: Tensor, affine: Affine) -> Tensor:
    """A layer's own forward with other tensors in place of its parameters, for layers whose formula is not known."""
    own = layer._parameters
    before: dict[str, Any] = {name: own[name] for name in ("weight", "bias") if name in own}
    try:
        own["weight"] = affine.weight  # type: ignore[assignment]
        if "bias" in own:
            own["bias"] = affine.bias  # type: ignore[assignment]
        return forward(layer, x)
    finally:
        own.update(before)


class _Stage:
    """An adapter on top of something is again such a thing."""

    def __init__(self, adapter: Adapter, below: LayerBelow, state: PassState) -> None:
        self.adapter, self.below, self.geometry, self.state = adapter, below, adapter.geometry, state

    def __call__(self, x: Tensor) -> Tensor:
        return self.adapter(self.below, x, self.state)

    def affine(self) -> Affine:
        below = self.below.affine()
        return below if self.state.silent else self.adapter.adapt_affine(below, self.state.call)

    def bias(self) -> Tensor | None:
        return self.affine().bias if self.adapter.algorithm.changes_bias else self.below.bias()

    def plain(self, x: Tensor) -> Affine | None:
        return None

    def run(self, x: Tensor, affine: Affine) -> Tensor:
        self.adapter.seen.called = True
        return self.below.run(x, affine)


class Adapted:
    """A mixin of the class of a module with adapters: `isinstance(module, Adapted)` tells such modules.

    Never instantiated by itself. It runs the stack in `forward`, pickles by the class from before, and keeps adapters
    in their precision where a layer that stores float8 is cast.
    """

    attributes: ClassVar[tuple[str, ...]] = ()
    """Names of the parameters that are adapted, for a module that is not a layer."""

    # `self: Any`: this class is only ever mixed into a module.
    def __reduce_ex__(self: Any, protocol: Any) -> Any:
        # The derived class shares the name of the one it derives from, so pickle could not find it by name.
        return _new, (base_class(self), self.attributes), self.__dict__.copy()

    def _apply(self: Any, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # A layer that stores its weight in float8 may be cast in and out in every pass; its adapters must not be.
        before = base_weights.precision(self)
        base: Any = base_class(self)
        try:
            base._apply(self, fn, recurse=False)
        except RuntimeError as error:
            if "weakref" not in str(error.__cause__):
                raise
            # torch swaps quantized weights only while no weak reference to them is left, and a finished compilation
            # leaves some behind in reference cycles.
            gc.collect()
            base._apply(self, fn, recurse=False)
        for child in self.children() if recurse else ():
            stays = isinstance(child, Adapter) and base_weights.is_float8(before, base_weights.precision(self))
            child._apply((lambda tensor: tensor.to(fn(tensor.new_empty(0)).device)) if stays else fn)
        return self

    def forward(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        if args:
            x, args = args[0], args[1:]
        else:
            x = kwargs.pop(next(iter(kwargs)))
        adapters = [child for child in self._modules.values() if isinstance(child, Adapter)]
        if not adapters:
            # Taken off since, while another library's wrapper still holds this method.
            return base_class(self).forward(self, x, *args, **kwargs)
        below: LayerBelow = _BaseLayer(self, base_class(self).forward, adapters[0].geometry, (args, kwargs))
        random = None
        for adapter in adapters:
            state = adapter.state_of_pass(x)
            random = state.random if random is None else random
            below = _Stage(adapter, below, state)
        if random is None:
            return below(x)
        with replayed_random(random, x.device):
            return below(x)


def top(site: Site) -> LayerBelow:
    """Return a layer, or a parameter, with the adapters that it has now: what the next one finds below itself.

    They act with the strength and the mask in force; merged ones are part of the weight already.
    """
    below = bottom(site)
    for adapter in adapters_on(site.module, site.attribute):
        below = _Stage(adapter, below, adapter.state)
    return below


def bottom(site: Site) -> LayerBelow:
    """Return a layer, or a parameter, without its attached adapters; merged ones are part of its weight.

    Raises:
        AttachError: The module has no such parameter any more.
    """
    if not site.attribute:
        return _BaseLayer(site.module, base_class(site.module).forward, site.geometry, ((), {}))
    parameter = site.module._parameters[site.attribute]
    if parameter is None:
        raise AttachError(f"this {type(site.module).__name__} has no parameter {site.attribute} any more")
    return BareWeight(site.geometry, parameter)


def adapters_on(layer: nn.Module, attribute: str = "") -> Iterator[Adapter]:
    """Return the adapters of a layer, or of a parameter, lowest first.

    An iterator over the layer as it is: make a list of it before adapters are put on or taken off.

    Args:
        attribute: Name of the parameter; "" for the adapters of the layer itself.
    """
    children = layer._modules.values()
    return (child for child in children if isinstance(child, Adapter) and child.attribute == attribute)


def is_on(layer: nn.Module, adapter: Adapter) -> bool:
    """Whether an adapter is on a layer, or on a parameter of it."""
    return any(other is adapter for other in adapters_on(layer, adapter.attribute))


def base_class(layer: nn.Module) -> type[nn.Module]:
    """Return the class that a layer had before adapters came onto it.

    Its own class if it has no adapters.
    """
    found: type[nn.Module] = getattr(type(layer), BASE, type(layer))
    return found


def attach(layer: nn.Module, name: str, adapter: Adapter) -> None:
    """Put an adapter on top of a layer, or of a parameter, and of the adapters it has, under the child name `name`.

    Raises `AttachError` when the name is taken, when the layer was sharded without the adapter, or when the layer's
    `forward` was replaced on the instance: such a replacement would run instead of the adapters.
    """
    sharding.check_shared(layer, adapter)
    if "forward" in layer.__dict__ and not adapter.attribute:
        raise AttachError(
            f"the forward of this {type(layer).__name__} was replaced on the instance (offloading hooks of accelerate "
            "and older adapter libraries do so) and would bypass the adapter; remove that hook, attach, and wrap "
            "again. With sequential CPU offload, merge the adapters first instead; layerwise casting of diffusers "
            "cannot be taken off, so attach before it is enabled"
        )
    if hasattr(layer, name):
        raise AttachError(f"this {type(layer).__name__} already has something called {name!r}; choose another set name")
    check_detachable(layer)
    layer.register_module(name, adapter)
    adapter.train(layer.training)
    _set_class(layer)


def detach(layer: nn.Module, name: str) -> None:
    """Take an adapter off, wherever in the stack it is; without adapters the layer is as it was before.

    Raises `AttachError` when something else gave the layer another class in the meantime.
    """
    check_detachable(layer)
    del layer._modules[name]
    _set_class(layer)


def check_detachable(layer: nn.Module) -> None:
    """Raise `AttachError` unless the layer's class is its own, or the one that `attach` gave it.

    Parametrizations and FSDP derive another from that; they have to be undone before adapters come on or off.
    """
    if isinstance(layer, Adapted) and BASE not in vars(type(layer)):
        raise AttachError(
            f"this layer became a {type(layer).__name__} after its adapters were attached (parametrization and FSDP do "
            "so); undo that first"
        )


def free_name(layers: Iterable[nn.Module]) -> str:
    """Return a name for adapters that none on these layers has: lycoris0, lycoris1 and so on.

    Taken are those for which a layer has a child `adapter_lycoris0`, or `adapter_lycoris0_weight_in` for an adapter of
    a bare parameter, and so on.
    """
    taken = {child for layer in layers for child in layer._modules}
    names = (f"lycoris{n}" for n in range(len(taken) + 1))
    return next(name for name in names if not any(f"{child}_".startswith(f"adapter_{name}_") for child in taken))


def keep_off_fast_path(around: nn.Module, adapter: Adapter) -> None:
    """`nn.TransformerEncoderLayer` in eval mode reads its layers' weights instead of calling them, unless some module
    inside has a hook."""
    if isinstance(around, nn.TransformerEncoderLayer) and not adapter._forward_hooks:
        adapter.register_forward_hook(_no_change)


def _no_change(*_: Any) -> None: ...


def _set_class(layer: Any) -> None:
    adapters = [child for child in layer._modules.values() if isinstance(child, Adapter)]
    attributes = tuple(sorted({adapter.attribute for adapter in adapters} - {""}))
    cls: Any = base_class(layer)
    layer.__class__ = _derive_class(cls, attributes) if adapters else cls


@cache
def _derive_class(cls: Any, attributes: tuple[str, ...]) -> Any:
    # The layer's class comes first, for Python lets an object change its class only to one laid out by the same base;
    # what is to override it goes into the derived class itself. Same name: other libraries recognize layers by it.
    own: dict[str, Any] = {name: property(_reader(name)) for name in attributes}
    own |= {name: vars(Adapted)[name] for name in ("_apply", "__reduce_ex__", *(() if attributes else ("forward",)))}
    own[OFFLOAD_HOOK] = property(_offload_hook, _set_offload_hook, _delete_offload_hook)
    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "attributes": attributes, BASE: cls}
    return type(cls.__name__, (cls, Adapted), own | names)


def _is_cut(x: Tensor, y: Tensor) -> bool:
    """Whether an output has no gradient although gradients are on and the input has one.

    False for outputs that are not floating point, which cannot have one.
    """
    return x.requires_grad and not y.requires_grad and torch.is_grad_enabled() and y.is_floating_point()


def _offload_hook(layer: Any) -> Any:
    if OFFLOAD_HOOK not in layer.__dict__:
        raise AttributeError(OFFLOAD_HOOK)
    return layer.__dict__[OFFLOAD_HOOK]


def _set_offload_hook(layer: Any, hook: Any) -> None:
    if any(getattr(each, "offload", False) for each in getattr(hook, "hooks", (hook,))):
        # By now the weights are away, and this brings them back; the adapters' turn would come next.
        hook.detach_hook(layer)
        layer.__dict__.pop("_old_forward", None)
        raise AttachError(
            "sequential CPU offload (of accelerate) does not work on a layer with attached adapters, here a "
            f"{type(layer).__name__}: it fetches weights by the names of the base's state_dict. Merge the adapters "
            "instead, or offload whole models with enable_model_cpu_offload(). To go on with this model, take the "
            "hooks off with accelerate.hooks.remove_hook_from_module(model, recurse=True)"
        )
    layer.__dict__[OFFLOAD_HOOK] = hook


def _delete_offload_hook(layer: Any) -> None:
    del layer.__dict__[OFFLOAD_HOOK]


def _reader(attribute: str) -> Callable[[Any], Tensor]:
    """What reading an adapted parameter gives: the parameter as its adapters make it."""

    def read(module: Any) -> Tensor:
        parameter: Tensor = module._parameters[attribute]
        if sharding.is_sharded(parameter):
            # FSDP, looking after its shards: it would take what the adapters make of one for the parameter.
            return parameter
        affine = Affine(parameter, None)
        for adapter in adapters_on(module, attribute):
            state = adapter.state_of_pass(parameter)
            if not is_exporting():
                adapter.seen.called = True
                if torch.is_grad_enabled() and not state.silent:
                    adapter.seen.trained = True
            if not state.silent:
                with replayed_random(state.random, parameter.device):
                    affine = adapter.adapt_affine(affine, adapter.draw_call(state, parameter))
        return affine.weight

    return read


def _new(cls: Any, attributes: tuple[str, ...]) -> Any:
    adapted = _derive_class(cls, attributes)
    return adapted.__new__(adapted)
