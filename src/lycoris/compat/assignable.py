"""What scripts assign to networks and modules: it acts, or an error says what to do instead; never nothing."""

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

T = TypeVar("T")

SIZES: Mapping[str, Any] = {
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
"""What a network was made with, by the names of its attributes; these values where a file said all."""

_ADAPTERS = "a network keeps the adapters that it was made with; leave layers out with exclude_name in its preset"
FIXED: Mapping[str, str] = {
    **dict.fromkeys(SIZES, "it was read when this network was made; make a new one with it"),
    **dict.fromkeys(("loras", "unet_loras", "text_encoder_loras", "adapters", "algo_table"), _ADAPTERS),
    "weights_sd": "give the tensors to load_state_dict, or a file to load_weights",
    "prefix": "it was read when this network was made; give lora_prefix in the preset of a new one",
}
"""Attribute of a network → what to do instead of assigning to it."""


class Assignable(nn.Module):
    """A network whose attributes act when they are assigned, or refuse."""

    weights_sd: None = None

    @property
    def is_made(self) -> bool:
        """Whether it has its adapters. A subclass may do without them, and has attributes of its own then."""
        return "parts" in vars(self)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in FIXED and self.is_made:
            raise ConfigError(f"assigning to {name} of a {type(self).__name__} would do nothing: {FIXED[name]}")
        super().__setattr__(name, value)


def sizes(recipe: Recipe | None) -> dict[str, Any]:
    """The attributes of a network that say what it was made with."""
    if recipe is None:
        return dict(SIZES)
    found = {name: recipe.options.get(name, usual) for name, usual in SIZES.items()}
    conv_alpha = recipe.linear_alpha if recipe.conv_alpha is None else recipe.conv_alpha
    conv = (recipe.conv_dim or recipe.linear_dim) if recipe.preset.enable_conv else 0
    return found | {
        "lora_dim": recipe.linear_dim,
        "conv_lora_dim": conv,
        "alpha": recipe.linear_alpha,
        "conv_alpha": conv_alpha,
    }


def warn_of_both(weight: float, multiplier: float, *, told: bool) -> bool:
    """Say once that a merge at `weight` counts a multiplier too, if neither is 1; whether that is said now."""
    if told or 1 in (weight, multiplier):
        return told
    logger.warning(
        "merging at %s times the multiplier %s, so at %s: the two multiply; lycoris-lora 4.1.3 leaves the multiplier "
        "out. Give 1 for one of them",
        *(weight, multiplier, weight * multiplier),
    )
    return True


class Fixed(list[T]):
    """A list that is read off a network or a module each time: changing it would change nothing, and is refused."""

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise ConfigError(f"changing this list would do nothing, since it is a copy: {_ADAPTERS}")

    append = extend = insert = remove = pop = clear = sort = reverse = _refuse
    __setitem__ = __delitem__ = __iadd__ = __imul__ = _refuse

    def __reduce__(self) -> Any:
        return list, (list(self),)


class Fact(Generic[T]):
    """A property that is read off an adapter; a subclass that does without one may assign its own."""

    def __init__(self, read: Callable[[Any], T]) -> None:
        self._read, self.__doc__ = read, read.__doc__

    def __get__(self, module: Any, owner: Any = None) -> T:
        if module is None:
            return self  # type: ignore[return-value]  # as properties do
        return self._read(module)


class Constant(Tensor):
    """A setting of an algorithm as the tensor that scripts read. Writing to it would change nothing, and is refused."""

    _name: str

    @classmethod
    def of(cls, name: str, value: float) -> Constant:
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
        # `data` and `detach` share the storage.
        # Functions of torch.nn.init give what they write by its name.
        given = args[0] if args else (kwargs or {}).get("tensor")
        written = given if isinstance(given, cls) else None
        into = (kwargs or {}).get("out")
        if isinstance(into, cls):
            written, name = into, "out="
        if written is not None and (_writes(name) or (name == "__set__" and not _sets_no_numbers(func))):
            raise ConfigError(
                f"writing to {written._name} would change nothing: it is a setting, which does not change; make a new "
                "module with it"
            )
        with DisableTorchFunction():
            found = func(*args, **(kwargs or {}))
            if written is not None and _shares(name, func) and isinstance(found, Tensor):
                found = found.as_subclass(cls)
                found._name = written._name
        return found


def _writes(name: str) -> bool:
    in_place = name.endswith("_") and not name.endswith("__") and name not in ("requires_grad_", "retain_grad_")
    return in_place or name in ("__setitem__", "out=") or (name.startswith("__i") and name in _IN_PLACE)


_IN_PLACE = frozenset(
    f"__i{name}__" for name in ("add", "sub", "mul", "truediv", "floordiv", "pow", "mod", "and", "or")
)


def _sets_no_numbers(func: Any) -> bool:
    owner = getattr(func, "__self__", None)
    return getattr(owner, "__name__", "") != "data"


def _shares(name: str, func: Any) -> bool:
    owner = getattr(getattr(func, "__self__", None), "__name__", "")
    return name in ("detach", "view", "reshape", "view_as") or (name == "__get__" and owner == "data")
