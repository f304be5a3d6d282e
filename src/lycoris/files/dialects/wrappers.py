"""Remove from a file's names what wrappers, other programs and merges of files have added.

Some additions are never part of a model's own names and always go (`strip_wrappers`). Others may be: a language model's
layers do begin with `model.`, and an attribute may end in an underscore. `strip_surroundings` is only for names that no
model has as they are.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping

WRAPPER_STEPS = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module", "_flat_param")
"""Steps of paths that `torch.compile`, activation checkpointing and FSDP add; see `lycoris.layers.paths`."""
OUTER_STEPS = ("module", "model", "base_model", "network", "net", "lora", "pipe", "pipeline", "dit", "denoiser")
"""Steps that programs put before all names of a model."""
COMPONENT_STEPS = (
    *("transformer", "unet", "diffusion_model", "transformer_2"),
    *("text_encoder", "text_encoder_2", "text_encoder_3", "text_encoders"),
)
"""Steps that name a component of a pipeline; a repeated one adds nothing."""
FLAT_OUTER_STEPS = ("base_model_model_", "model_diffusion_model_", "diffusion_model_", "module_", "model_")
FLAT_PREFIX = r"(?:lora|oft|lycoris)_(?:unet_{1,2}|transformer_|te\d?_)?"

_ADDED = re.compile(rf"[._](?:{'|'.join(WRAPPER_STEPS)})(?=[._])|^(?:{'|'.join(WRAPPER_STEPS)})\.")
_FLAT_PLACE = re.compile(rf"({FLAT_PREFIX})(?:{'|'.join(FLAT_OUTER_STEPS)})+(.+)")
_FLATTENED = re.compile(
    r"(.+?)_(lora_(?:up|down|mid|A|B)|hada_.+|lokr_.+|alpha|dora_scale|oft_blocks)(?:[._](weight))?"
)
_JOINED = re.compile(r"(.+\..+)_(lora_(?:up|down|mid|A|B)\.weight)")
"""A dotted path with the tensor's name behind an underscore."""
_PARAMETER = re.compile(r"(.+)\.scale\.((?:diff|set)(?:_weight|_param)?)")
_MODULATION = re.compile(r"(.+\.)?diff_m")


def strip_wrappers(name: str) -> str:
    """Return a name without the steps that wrappers add, dotted or flat.

    lightx2v's `diff_m` becomes a change of the parameter `modulation`.
    """
    found = _MODULATION.fullmatch(name)
    return f"{found[1] or ''}modulation.diff" if found is not None else _ADDED.sub("", name)


def strip_surroundings(name: str) -> str:
    """Return a name without what was added before and after its path.

    Includes `strip_wrappers`. Steps such as `module.` or `pipe.` go, a component stays once, and flat names get a dot
    before the tensor's name and a usual prefix.
    """
    name = strip_wrappers(name)
    if "_" in name.partition(".")[0] and name.count(".") <= 3:
        name = _flatten_surroundings(name)
    head, *steps = name.split(".")
    component: list[str] = []
    steps = [head, *steps]
    while len(steps) > 2 and steps[0] in (*OUTER_STEPS, *COMPONENT_STEPS):
        step = steps.pop(0)
        if step in COMPONENT_STEPS:
            component = [step]
    name = _JOINED.sub(r"\1.\2", ".".join([*component, *steps]))
    found = _PARAMETER.fullmatch(name)
    return name if found is None else f"{found[1]}.{found[2]}"


def _flatten_surroundings(name: str) -> str:
    """Underscores where others have dots: before the tensor's name, and for what stands before the path."""
    layer, dot, suffix = name.partition(".")
    if not dot or suffix == "weight":
        found = _FLATTENED.fullmatch(name)
        if found is None:
            return name
        layer, suffix = found[1], ".".join(filter(None, (found[2], found[3])))
    layer = layer.rstrip("_")
    if (found := _FLAT_PLACE.fullmatch(layer)) is not None:
        layer = f"{found[1]}{found[2]}"
    if not re.match(FLAT_PREFIX, layer):
        if not re.search(r"_\d+_", layer):
            return name
        layer = f"{'lora_te_' if layer.startswith('text_model_') else 'lora_unet_'}{layer}"
    return f"{layer}.{suffix}"


def find_renames(names: Iterable[str], how: Callable[[str], str]) -> dict[str, str]:
    """Return the names that `how` changes, with their new names.

    {} if two names would become the same.
    """
    names = list(names)
    made = {name: how(name) for name in names}
    return {} if len({*made.values()}) < len(names) else {name: new for name, new in made.items() if new != name}


def describe_renames(renamed: Mapping[str, str]) -> str:
    """Return a remark on names that were read as others.

    Gives their number and the first as an example; `renamed` must not be empty.
    """
    first, new = next(iter(renamed.items()))
    return f"{len(renamed)} names have parts that are not of the model, left out: {first} is read as {new}"
