"""Make the empty model that a command line names: a known one, or one that a `config.json` describes."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lycoris.errors import ConfigError, nearest, unknown
from lycoris.json_io import read_json
from lycoris.models import outline


def load_empty_model(model: str) -> nn.Module:
    """Build a model on torch's meta device.

    `model` is a known name, the path of a `config.json` of diffusers or transformers, or a folder with one.

    Raises:
        ConfigError: There is neither, the config describes no model, or its library is not installed.
    """
    path = Path(model)
    if path.is_dir():
        path = path / "config.json"
    elif not path.is_file():
        if path.suffix == ".json" or len(path.parts) > 1:
            raise ConfigError(f"{model} is no file and no folder; known models: {', '.join(outline.list_models())}")
        return outline.load_model(model)
    config = _read_model_config(path)
    if "_class_name" in config:
        return _make_diffusers_model(path, config)
    if "architectures" in config or "model_type" in config:
        return _make_transformers_model(path, config)
    parts = sorted(each.parent.name for each in path.parent.glob("*/config.json"))
    hint = f"; folders in {path.parent} that have a model: {', '.join(parts)}" if parts else ""
    raise ConfigError(f"{path} names no model: it has neither _class_name nor architectures nor model_type{hint}")


def _read_model_config(path: Path) -> dict[str, Any]:
    if not path.exists():
        parts = sorted(each.parent.name for each in path.parent.glob("*/config.json"))
        hint = f"; folders in it that have one: {', '.join(parts)}" if parts else ""
        raise ConfigError(f"{path.parent} has no config.json{hint}")
    return read_json(path)


def _make_diffusers_model(path: Path, config: dict[str, Any]) -> nn.Module:
    diffusers = _import_library("diffusers", path)
    name = config["_class_name"]
    cls = getattr(diffusers, str(name), None)
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        models = [each for each in dir(diffusers) if "Model" in each]
        raise ConfigError(f"{path}: {unknown('model class', str(name), nearest(str(name), models))}")
    return _make_model(path, lambda: cls.from_config(config))  # type: ignore[attr-defined]  # of ModelMixin


def _make_transformers_model(path: Path, config: dict[str, Any]) -> nn.Module:
    transformers = _import_library("transformers", path)
    name = next(iter(config.get("architectures") or []), None)
    if name is not None and not hasattr(transformers, name):
        models = [each for each in dir(transformers) if each.endswith(("Model", "LM", "Projection"))]
        raise ConfigError(f"{path}: {unknown('model class', name, nearest(name, models))}")

    def make() -> Any:
        settings = transformers.AutoConfig.for_model(**config)
        cls = transformers.AutoModel if name is None else getattr(transformers, name)
        return cls.from_config(settings) if name is None else cls(settings)

    return _make_model(path, make)


def _make_model(path: Path, make: Any) -> nn.Module:
    try:
        with torch.device("meta"):
            made: nn.Module = make()
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise ConfigError(f"{path}: no model can be built from this: {error}") from error
    return made


def _import_library(name: str, path: Path) -> Any:
    if importlib.util.find_spec(name) is None:
        raise ConfigError(
            f'{path} describes a model of {name}, which is not installed: pip install "lycoris-lora[train]"'
        )
    return importlib.import_module(name)
