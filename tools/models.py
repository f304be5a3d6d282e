"""Write the outline of every known model, and the table of families, from the real classes.

`make models`, or `python -m tools.models [NAME ...]` for some. Classes are built on the meta device, without weights.
What each is built with is in its family's file, `lycoris.models.families`.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lycoris.errors import ConfigError, unknown
from lycoris.models import outline
from lycoris.models.families import ARCHITECTURES, FAMILIES
from lycoris.models.families.family import Architecture, ModelConfig

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "src" / "lycoris" / "models"
PAGE = ROOT / "docs" / "models.md"
START, END = "<!-- written by make models -->\n", "<!-- until here -->\n"


def source(architecture: Architecture) -> str:
    """The library whose class it is."""
    import diffusers

    return "diffusers" if hasattr(diffusers, architecture.classes[0]) else "transformers"


def made(architecture: Architecture, config: ModelConfig) -> nn.Module:
    """The model of a config, without weights."""
    with torch.device("meta"):
        if "architectures" in config:
            import transformers

            (name,) = config["architectures"]
            settings = transformers.AutoConfig.for_model(**config).get_text_config()
            model: nn.Module = getattr(transformers, name)(settings)
            return model
        import diffusers

        return getattr(diffusers, architecture.classes[0]).from_config(dict(config))


def described(architecture: Architecture, config: ModelConfig) -> dict[str, Any]:
    """What a file in `FOLDER` has: the config as libraries write it, and the outline."""
    named = {} if "architectures" in config else {"_class_name": architecture.classes[0]}
    return {"config": named | dict(config), "outline": outline.make_outline(made(architecture, config))}


def known() -> dict[str, tuple[Architecture, ModelConfig]]:
    """Every known model by name."""
    return {name: (each, config) for each in ARCHITECTURES.values() for name, config in each.models.items()}


def text(value: Mapping[str, Any]) -> str:
    """As a file has it."""
    return json.dumps(value, separators=(",", ":")) + "\n"


def rows() -> Iterator[str]:
    """Of the table of denoisers, a line for each known model."""
    yield "| family | model | class, from | parameters | tensors | layers | names besides diffusers' |"
    yield "|---|---|---|---|---|---|---|"
    for family in FAMILIES.values():
        architecture = ARCHITECTURES[family.components[""]]
        for name in architecture.models:
            model = outline.load_model(name)
            sizes = [each.numel() for each in model.parameters()]
            kinds = Counter(geometry.kind for _, geometry in outline.iterate_layers(outline.load_outline(name)))
            yield (
                f"| {family.name} | {name} | `{outline.load_outline(name)['class']}`, {source(architecture)} | "
                f"{sum(sizes) / 1e9:.2f} B | {len(sizes)} | {kinds['linear'] + kinds['conv']} | "
                f"{', '.join(architecture.namings) or 'the same'} |"
            )


def table() -> str:
    """The page with the table as it should be."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(START)
    return before + START + "\n".join(rows()) + "\n" + END + rest.partition(END)[2]


def main() -> None:
    """Write the outlines that are asked for, all by default, and the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="known models; all when none is given")
    there = known()
    wanted = parser.parse_args().names or [*there]
    for name in wanted:
        if name not in there:
            raise ConfigError(unknown("model", name, there))
        (FOLDER / f"{name}.json").write_text(text(described(*there[name])), encoding="utf-8")
    PAGE.write_text(table(), encoding="utf-8")


if __name__ == "__main__":
    main()
