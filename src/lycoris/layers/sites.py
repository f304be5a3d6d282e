"""The places in a model where adapters can go, found in one walk over its modules."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from torch import nn
from typing_extensions import Self

from lycoris.errors import AttachError
from lycoris.layers import paths
from lycoris.layers.geometry import IS_ADAPTER, Geometry, describe, describe_parameter


class Site(NamedTuple):
    """A place in a model where adapters can go.

    It refers to the module and does not copy it. `ModelSites` has those of a model; `Site.of` makes one for a module by
    itself.
    """

    path: str
    """Dotted path of the layer, or of the parameter."""
    module: nn.Module
    """The layer, or the module that owns the parameter."""
    attribute: str
    """Name of the parameter; "" when the site is a layer."""
    geometry: Geometry

    @classmethod
    def of(cls, module: nn.Module, attribute: str = "") -> Site:
        """Return the site that a layer, or a parameter of a module, is by itself; its path is the parameter's name.

        Raises:
            AttachError: Adapters cannot serve it.
        """
        if not attribute:
            geometry = describe(module)
            if geometry is None:
                raise AttachError(f"{type(module).__name__} is not a layer that adapters can serve")
            return cls(path="", module=module, attribute="", geometry=geometry)
        parameter = module._parameters.get(attribute)
        geometry = None if parameter is None else describe_parameter(parameter)
        if geometry is None:
            raise AttachError(f"{attribute} of this {type(module).__name__} is not a matrix or a stack of matrices")
        return cls(attribute, module, attribute, geometry)

    @property
    def owner(self) -> str:
        """Dotted path of `module`.

        The path itself for a layer, and without the parameter's name for a parameter; "" for the model.
        """
        return self.path.removesuffix(self.attribute).removesuffix(".") if self.attribute else self.path

    def is_in(self, model: nn.Module) -> bool:
        """Return whether the module is still at its path in a model.

        False where another module has taken its place, or there is none. Its parameters are not checked.
        """
        try:
            return paths.submodule(model, self.owner) is self.module
        except AttributeError:
            return False


class ModelSites(Mapping[str, Site]):
    """Every site of a model by path, in model order, together with the modules around them.

    A module that appears twice is listed once, under its first path; `find` knows the others too. Functions that need
    the sites of a model take either the model or its `ModelSites`, so that a caller who has them passes them on and no
    layer is described twice.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.modules: Mapping[str, nn.Module] = _modules_of(model)
        """Every module by path, without wrappers and adapters; the model itself under ""."""
        self._sites = {site.path: site for site in _sites_among(self.modules)}

    @classmethod
    def of(cls, model: nn.Module | Self) -> Self:
        """Return the sites of a model; those that were found already are returned as they are.

        They may be out of date where the model has changed since: see `are_current`.
        """
        return cls(model) if isinstance(model, nn.Module) else model

    def __getitem__(self, path: str) -> Site:
        return self._sites[path]

    def __iter__(self) -> Iterator[str]:
        return iter(self._sites)

    def __len__(self) -> int:
        return len(self._sites)

    @property
    def geometries(self) -> dict[str, Geometry]:
        """The geometry of every site by path, in model order.

        A new dictionary each time.
        """
        return {path: site.geometry for path, site in self._sites.items()}

    def find(self, path: str) -> Site:
        """Return the site at a path, which may be any of the paths of a module that appears several times.

        Raises:
            KeyError: There is none.
        """
        found = self._sites.get(path)
        return self._find_under_other_path(path) if found is None else found

    def around(self, path: str) -> list[nn.Module]:
        """Return the modules around the site at a path, nearest first, the model last.

        The module of a layer is not among its own; the one that owns a bare parameter is. Modules listed under another
        path are left out.
        """
        return [self.modules[name] for name in paths.ancestors(path) if name in self.modules]

    def are_current(self) -> bool:
        """Return whether the model still has these very modules at these paths.

        It takes a walk over the model. Parameters that were replaced within a module do not count as a change.
        """
        now = _modules_of(self.model)
        return now.keys() == self.modules.keys() and all(now[path] is module for path, module in self.modules.items())

    def _find_under_other_path(self, path: str) -> Site:
        for owner, attribute in ((path, ""), path.rpartition(".")[::2]):
            try:
                module = paths.submodule(self.model, owner)
            except AttributeError:
                continue
            for site in self._sites.values():
                if site.module is module and site.attribute == attribute:
                    return site._replace(path=path)
        raise KeyError(path)


def class_name(model: nn.Module) -> str:
    """Return the name of a model's class, without wrappers around it and without the class that FSDP2 derives."""
    own = type(paths.unwrap(model))
    return next(cls.__name__ for cls in own.__mro__ if not cls.__module__.startswith("torch.distributed"))


def _modules_of(model: nn.Module) -> dict[str, nn.Module]:
    return {path: each for path, each in paths.named_modules(model) if not getattr(each, IS_ADAPTER, False)}


def _sites_among(modules: Mapping[str, nn.Module]) -> Iterator[Site]:
    """Layers, and bare parameters of modules that are no such layers."""
    for path, module in modules.items():
        geometry = describe(module) if _holds_tensors(module) else None
        if geometry is not None:
            yield Site(path, module, "", geometry)
            continue
        for name, parameter in module._parameters.items():
            if parameter is not None and (own := describe_parameter(parameter)) is not None:
                yield Site(f"{path}.{name}" if path else name, module, name, own)


def _holds_tensors(module: nn.Module) -> bool:
    """Whether a module can be a site: containers and activations, most of a model's modules, have no tensors."""
    return bool(module._parameters or module._buffers) or "parametrizations" in module._modules
