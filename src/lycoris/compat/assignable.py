"""Assignments by scripts to networks and modules: each has its effect, or raises an error that says what to do."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any, Generic, NoReturn, TypeVar

import torch
from torch import Tensor, nn

from lycoris.errors import ConfigError
from lycoris.ops.torch_private import DisableTorchFunction
from lycoris.targeting.recipe import Recipe

logger = logging.getLogger("LyCORIS")

ItemT = TypeVar("ItemT")

SIZE_ATTRIBUTES: Mapping[str, Any] = {
    "lora_dim": 0,
    "conv_lora_dim": 0,
    "alpha": 1.0,
    "conv_alpha": 1.0,
    "dropout": 0.0,
    "rank_dropout": 0.0,
    "module_dropout": 0.0,
    "use_tucker": False,
    "train_llm_adapter": False,
    "train_t5xxl": False,
}
"""Size attributes of a network → their values for one read from a file, whose tensors decide the sizes."""

_ADAPTERS = "a network keeps the adapters that it was built with; to leave layers out, use exclude_name in its preset"
READ_ONLY_ATTRIBUTES: Mapping[str, str] = {
    **dict.fromkeys(SIZE_ATTRIBUTES, "it is read when a network is built; build a new one with this value"),
    **dict.fromkeys(("loras", "unet_loras", "text_encoder_loras", "adapters", "algo_table"), _ADAPTERS),
    "weights_sd": "pass the tensors to load_state_dict, or a file to load_weights",
    "prefix": "it is read when a network is built; set lora_prefix in the preset of a new one",
}
"""Attribute of a network → what to do instead of assigning to it."""


class Assignable(nn.Module):
    """A network whose attributes have an effect when they are assigned.

    Those in `READ_ONLY_ATTRIBUTES`, which would have none once it is built, raise `ConfigError`.
    """

    weights_sd: None = None

    @property
    def is_built(self) -> bool:
        """Whether it has its adapters. A subclass may do without them, and may assign any attributes then."""
        return "parts" in vars(self)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in READ_ONLY_ATTRIBUTES and self.is_built:
            raise ConfigError(
                f"assigning to {name} of a {type(self).__name__} would have no effect: {READ_ONLY_ATTRIBUTES[name]}"
            )
        super().__setattr__(name, value)


def read_sizes(recipe: Recipe | None) -> dict[str, Any]:
    """Return the size attributes of a network, such as `lora_dim`, by the config that it was built with.

    None gives the constants for a network from a file, whose tensors decide the sizes.
    """
    if recipe is None:
        return dict(SIZE_ATTRIBUTES)
    found = {name: recipe.options.get(name, usual) for name, usual in SIZE_ATTRIBUTES.items()}
    conv_alpha = recipe.linear_alpha if recipe.conv_alpha is None else recipe.conv_alpha
    conv = (recipe.conv_dim or recipe.linear_dim) if recipe.preset.enable_conv else 0
    return found | {
        "lora_dim": recipe.linear_dim,
        "conv_lora_dim": conv,
        "alpha": recipe.linear_alpha,
        "conv_alpha": conv_alpha,
    }


def warn_of_both_strengths(weight: float, multiplier: float, *, warned: bool) -> bool:
    """Log a warning when a merge at `weight` also applies a multiplier, and neither is 1.

    Returns whether the warning was logged, now or before (`warned`).
    """
    if warned or 1 in (weight, multiplier):
        return warned
    logger.warning(
        "merging at strength %s times the multiplier %s, which is %s; lycoris-lora 4.1.3 ignores the multiplier here. "
        "Set one of them to 1",
        *(weight, multiplier, weight * multiplier),
    )
    return True


class ReadOnlyList(list[ItemT]):
    """A list that is a copy of a network's or module's contents.

    Modifying it would have no effect on them, and raises `ConfigError`.
    """

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise ConfigError(f"changing this list would have no effect, since it is a copy: {_ADAPTERS}")

    append = extend = insert = remove = pop = clear = sort = reverse = _refuse
    __setitem__ = __delitem__ = __iadd__ = __imul__ = _refuse

    def __reduce__(self) -> Any:
        return list, (list(self),)


class AdapterProperty(Generic[ItemT]):
    """A property that is read off the adapter.

    It has no setter, and a subclass without an adapter may assign its own value.
    """

    def __init__(self, read: Callable[[Any], ItemT]) -> None:
        self._read, self.__doc__ = read, read.__doc__

    def __get__(self, module: Any, owner: Any = None) -> ItemT:
        if module is None:
            return self  # type: ignore[return-value]  # as properties do
        return self._read(module)


class ConstantTensor(Tensor):
    """A setting of an algorithm, as the tensor that scripts read.

    Writing to it would have no effect, and raises `ConfigError`.
    """

    _name: str

    @classmethod
    def from_value(cls, name: str, value: float) -> ConstantTensor:
        """Return a constant; `name` is what errors call it."""
        made = torch.tensor(value).as_subclass(cls)
        made._name = name
        return made

    def __deepcopy__(self, memo: Any) -> Tensor:
        return self.clone()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.clone().__reduce_ex__(protocol)  # type: ignore[no-untyped-call]  # torch's own has no types

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        # Functions of torch.nn.init pass the tensor that they write to by keyword.
        given = args[0] if args else (kwargs or {}).get("tensor")
        written = given if isinstance(given, cls) else None
        into = (kwargs or {}).get("out")
        if isinstance(into, cls):
            written, name = into, "out="
        if written is not None and (_writes_in_place(name) or (name == "__set__" and not _keeps_values(func))):
            raise ConfigError(
                f"writing to {written._name} would have no effect: settings are fixed; build a new module with "
                "this value"
            )
        with DisableTorchFunction():
            found = func(*args, **(kwargs or {}))
            if written is not None and _shares_storage(name, func) and isinstance(found, Tensor):
                found = found.as_subclass(cls)
                found._name = written._name
        return found


def _writes_in_place(name: str) -> bool:
    in_place = name.endswith("_") and not name.endswith("__") and name not in ("requires_grad_", "retain_grad_")
    return in_place or name in ("__setitem__", "out=") or (name.startswith("__i") and name in _IN_PLACE)


_IN_PLACE = frozenset(
    f"__i{name}__" for name in ("add", "sub", "mul", "truediv", "floordiv", "pow", "mod", "and", "or")
)


def _keeps_values(func: Any) -> bool:
    owner = getattr(func, "__self__", None)
    return getattr(owner, "__name__", "") != "data"


def _shares_storage(name: str, func: Any) -> bool:
    owner = getattr(getattr(func, "__self__", None), "__name__", "")
    return name in ("detach", "view", "reshape", "view_as") or (name == "__get__" and owner == "data")
