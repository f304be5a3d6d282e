"""The settings of a training run in `config.json`, checked before anything is loaded."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from lycoris.errors import ConfigError, nearest, prefix_errors
from lycoris.json_io import read_json
from lycoris.targeting.recipe import Recipe
from lycoris.training.foreign import translate_config

logger = logging.getLogger("LyCORIS")

LATEST = "latest"
"""Value of `resume_from_checkpoint` for the newest checkpoint in `output_dir`."""
MAX_PROBLEMS, MAX_SHOWN_NAMES, MAX_VALUE_LENGTH = 8, 8, 80
"""Limits of an error message: problems, unknown names, and characters of a value."""

AnyPath: TypeAlias = Annotated[Path, Field(strict=False)]
Prompts: TypeAlias = Annotated[tuple[str, ...], Field(strict=False)]

TRAINABLE_FAMILIES = ("sd1x", "sd2x")
"""Values of `model_family` that can be trained, by SimpleTuner's names."""
FILE_PATHS = ("lycoris_config", "instance_data_dir", "output_dir")
"""Settings that are paths; in a file, relative to that file."""
FREE_ON_RESUME = (
    *("lycoris_config", "pretrained_model_name_or_path", "instance_data_dir", "output_dir", "resume_from_checkpoint"),
    *("max_train_steps", "skip_unreadable_images", "checkpointing_steps", "checkpoints_total_limit", "report_to"),
    *("eval_steps_interval", "validation_steps", "validation_prompts", "validation_prompts_outside"),
    *("validation_negative_prompt", "validation_num_inference_steps", "validation_guidance", "validation_seed"),
    *("validation_lycoris_strength", "keep_best"),
)
"""Settings that may change when a run is resumed: they move files or change what is shown, not what a step does.

The recipe and the images are compared by content, wherever they are stored.
"""


class Settings(BaseModel):
    """The settings of one training run. Names and meaning are SimpleTuner's wherever it has the option too.

    Relative paths are relative to the working directory here; `load_settings` makes those in a file relative to that
    file.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    model_type: Literal["lora"] = "lora"
    """What is trained: adapters (`lora`)."""
    lora_type: Literal["lycoris"] = "lycoris"
    """Which kind of adapter; the details are in `lycoris_config`."""
    lycoris_config: AnyPath
    """Path of lycoris_config.json: algo, linear_dim, linear_alpha, apply_preset, ..."""

    model_family: str | None = None
    """`sd1x` or `sd2x`; None reads it from the pipeline's model_index.json."""
    pretrained_model_name_or_path: str
    """The base: a folder as `StableDiffusionPipeline.save_pretrained` writes it, or a repository on the hub."""

    instance_data_dir: AnyPath
    """The images: a folder with `name.png` and its caption `name.txt`, or a sheet (`sheet.json` next to its PNG)."""
    skip_unreadable_images: bool = False
    """False: an unreadable image or a missing caption is an error. True: the rest is used, and they are counted."""
    resolution: Annotated[int, Field(ge=8, multiple_of=8)] = 512
    """Side in pixels to which images are cropped and resized, in training and in the report."""
    caption_dropout_probability: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Share of samples trained with an empty caption, which classifier-free guidance needs."""
    num_eval_images: Annotated[int, Field(ge=0)] = 4
    """Images held out of training for the held-out loss. 0 holds out only those of `validation_prompts_outside`."""

    output_dir: AnyPath = Path("output")
    """Folder for the adapter, checkpoints, logs and the report."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 42
    """Seed of the adapter's initialization, the order of images, noise, timesteps and the held-out images."""

    learning_rate: Annotated[float, Field(gt=0)] = 1e-4
    """Peak learning rate."""
    lr_scheduler: Literal["constant", "constant_with_warmup", "linear", "cosine", "polynomial"] = "constant_with_warmup"
    """Course of the learning rate after the warm-up."""
    lr_warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Optimizer steps in which the learning rate rises from 0."""
    max_train_steps: Annotated[int, Field(gt=0)] = 1000
    """Total number of optimizer steps."""
    train_batch_size: Annotated[int, Field(gt=0)] = 1
    """Images in one forward pass."""
    gradient_accumulation_steps: Annotated[int, Field(gt=0)] = 1
    """Forward passes whose gradients are averaged into one optimizer step."""
    max_grad_norm: Annotated[float, Field(ge=0)] = 1.0
    """Gradient norm clipping; 0 turns it off."""
    optimizer: Literal["adamw"] = "adamw"
    """The optimizer."""
    adam_beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """AdamW's decay of the mean of gradients."""
    adam_beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """AdamW's decay of the mean of squared gradients."""
    adam_epsilon: Annotated[float, Field(gt=0)] = 1e-8
    """AdamW's term against division by zero."""
    adam_weight_decay: Annotated[float, Field(ge=0)] = 0.01
    """AdamW's weight decay."""
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    """Precision of the forward pass; weights and adapters stay float32. fp16 needs a GPU."""
    gradient_checkpointing: bool = False
    """Trade time for memory: recompute activations in the backward pass."""

    checkpointing_steps: Annotated[int, Field(ge=0)] = 500
    """Save a checkpoint every so many steps; 0 saves one only when training is interrupted."""
    checkpoints_total_limit: Annotated[int, Field(ge=1)] | None = None
    """Maximum number of checkpoints, of which the newest are kept; None keeps all."""
    resume_from_checkpoint: str | None = None
    """`latest`, the path of a checkpoint folder, or its name in `output_dir`; None starts a new run."""

    eval_steps_interval: Annotated[int, Field(ge=0)] = 0
    """Measure the held-out loss every so many steps; 0 measures it only before and after training."""
    keep_best: bool = False
    """Save the adapter with the lowest held-out loss, measured every `eval_steps_interval` steps, instead of the last.
    Checkpoints contain both."""
    validation_steps: Annotated[int, Field(ge=0)] = 0
    """Draw the validation prompts every so many steps; 0 draws them only in the final report."""
    validation_prompts: Prompts = ()
    """Prompts of the report's first block. Images with such a caption are never held out."""
    validation_prompts_outside: Prompts = ()
    """Prompts of the block labeled as outside the fine-tuning set. Images with such a caption are held out."""
    validation_negative_prompt: str = ""
    """Negative prompt of all validation pictures."""
    validation_num_inference_steps: Annotated[int, Field(gt=0)] = 30
    """Denoising steps of a validation picture."""
    validation_guidance: Annotated[float, Field(ge=0)] = 7.5
    """Classifier-free guidance scale of validation pictures."""
    validation_seed: Annotated[int, Field(ge=0, lt=2**63)] = 42
    """Seed of the first validation picture; each next one has the next seed."""
    validation_lycoris_strength: float = 1.0
    """Strength of the adapter in validation pictures; the report also shows half of it."""

    report_to: Literal["tensorboard", "none"] = "tensorboard"
    """Where losses are logged; TensorBoard files are written to `output_dir/logs`."""

    @field_validator("model_family")
    @classmethod
    def _family_is_supported(cls, family: str | None) -> str | None:
        if family is not None and family not in TRAINABLE_FAMILIES:
            raise ValueError(f"this family cannot be trained yet; supported: {', '.join(TRAINABLE_FAMILIES)}")
        return family

    @model_validator(mode="after")
    def _prompts_are_inside_or_outside(self) -> Settings:
        both = sorted(set(self.validation_prompts) & set(self.validation_prompts_outside))
        if both:
            raise ValueError(
                f"{both} are in both validation_prompts and validation_prompts_outside; remove them from one"
            )
        return self

    @model_validator(mode="after")
    def _the_best_is_measured(self) -> Settings:
        if self.keep_best and not self.eval_steps_interval:
            raise ValueError("keep_best needs the held-out loss during training; set eval_steps_interval above 0")
        return self

    @classmethod
    def parse(cls, values: Mapping[str, Any], source: str = "config") -> Settings:
        """Check `values` and return the settings. `source` is what an error calls them.

        Keys may carry the leading `--` of a command line, as older SimpleTuner files have them. Raises `ConfigError`,
        which lists every wrong key with its value, and for an unknown key the nearest known one.
        """
        values = {key.removeprefix("--"): value for key, value in values.items()}
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            lines = "\n".join(f"  {line}" for line in _explain_problems(error.errors(), cls))
            raise ConfigError(f"{source} is not a valid training config:\n{lines}") from None


def load_settings(
    path: Path,
    overrides: Mapping[str, Any] | None = None,
    *,
    allow_unsupported: bool = False,
    say: Callable[[str], object] = logger.warning,
) -> Settings:
    """Read a config file and return its settings.

    Relative paths in the file are relative to its folder. Files written for SimpleTuner are accepted: keys without a
    counterpart are reported, and those that would change what is trained are refused.

    Args:
        overrides: Settings that replace those in the file.
        allow_unsupported: Whether to continue when the file asks for something that is not supported.
        say: Called with one text about the keys of SimpleTuner's, if there are any.

    Raises `ConfigError` for wrong values, and for unsupported keys unless they are allowed.
    """
    found = translate_config(read_json(path), {name: _takes_text(name) for name in Settings.model_fields})
    if found.mapped or found.ignored or found.unsupported:
        report = "\n".join([f"{path} has keys of SimpleTuner:", *(f"  {line}" for line in found.format_lines())])
        if found.unsupported and not allow_unsupported:
            wrong = _list_problems(found.values)
            raise ConfigError(f"{report}\n{wrong}remove them, or ignore them with --allow-unsupported")
        say(report)
    values = found.values
    for key in FILE_PATHS:
        if isinstance(values.get(key), str):
            values[key] = path.parent / values[key]
    resume = values.get("resume_from_checkpoint")
    if isinstance(resume, str) and resume != LATEST and not _is_name_in_output_dir(resume, path.parent):
        values["resume_from_checkpoint"] = str(path.parent / resume)
    base = values.get("pretrained_model_name_or_path")
    if isinstance(base, str) and (path.parent / base).is_dir():
        values["pretrained_model_name_or_path"] = str(path.parent / base)
    return Settings.parse({**values, **(overrides or {})}, str(path))


def load_recipe(path: Path) -> Recipe:
    """Read a `lycoris_config.json` and return its recipe.

    Raises `ConfigError` for wrong values, and for a multiplier of 0, at which nothing would be trained.
    """
    given = read_json(path)
    with prefix_errors(path):
        recipe = Recipe.parse(given)
    if recipe.multiplier == 0 or not math.isfinite(recipe.multiplier):
        raise ConfigError(
            f"{path}: multiplier = {given['multiplier']!r} would train nothing; it is the strength at which the "
            "adapter is trained, usually 1"
        )
    return recipe


def describe_settings() -> str:
    """Return every setting with its default and its description, one per line."""
    lines = []
    for name, entry in Settings.model_fields.items():
        default = "required" if entry.is_required() else json.dumps(entry.get_default(), default=str)
        lines.append(f"{name} ({default}): {(entry.description or '').splitlines()[0]}")
    return "\n".join(lines)


def _takes_text(name: str) -> bool:
    return str in _list_types(Settings.model_fields[name].annotation)


def _list_types(annotation: Any) -> set[Any]:
    """Return the types in an annotation; of a choice of words, that of the words."""
    inner = get_args(annotation)
    return (
        {annotation}
        if not inner
        else set().union(*({type(each)} if isinstance(each, str) else _list_types(each) for each in inner))
    )


def _list_problems(values: Mapping[str, Any]) -> str:
    """Return the other problems of a config, one per line."""
    try:
        Settings.model_validate(values)
    except ValidationError as error:
        return "".join(f"  wrong: {line}\n" for line in _explain_problems(error.errors(), Settings))
    return ""


def _is_name_in_output_dir(resume: str, folder: Path) -> bool:
    """`checkpoint-500` is the one in output_dir, unless the config's folder has one of that name itself."""
    return Path(resume).name == resume and not (folder / resume).exists()


def _explain_problems(problems: Sequence[Any], model: type[BaseModel]) -> list[str]:
    """Return one line for each problem; many unknown keys share some."""
    unknown = {str(each["loc"][0]): each["input"] for each in problems if each["type"] == "extra_forbidden"}
    lines = [_explain_problem(each, model) for each in problems if each["type"] != "extra_forbidden"]
    if len(lines) > MAX_PROBLEMS:
        lines = [*lines[:MAX_PROBLEMS], f"and {len(lines) - MAX_PROBLEMS} more"]
    known = list(model.model_fields)
    close = {key: nearest(key, known, limit=1) for key in unknown}
    hinted = [
        f"unknown key {key!r}; did you mean {near[0]!r}? (its value was {_shorten_repr(unknown[key])})"
        for key, near in close.items()
        if near
    ]
    if len(hinted) > MAX_PROBLEMS:
        hinted = [*hinted[:MAX_PROBLEMS], f"and {len(hinted) - MAX_PROBLEMS} more like these"]
    lost = [key for key, near in close.items() if not near]
    if lost:
        more = f", ... ({len(lost)})" if len(lost) > MAX_SHOWN_NAMES else ""
        lines.append(f"unknown key{'s' if len(lost) > 1 else ''} {', '.join(map(repr, lost[:MAX_SHOWN_NAMES]))}{more}")
    if unknown:
        hinted.append("`lycoris train --list-settings` lists all keys")
    return [*lines, *hinted]


def _explain_problem(problem: Any, model: type[BaseModel]) -> str:
    key = ".".join(str(part) for part in problem["loc"])
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "missing":
        return f"{key} is missing: {model.model_fields[key].description}"
    if not key:
        return str(message)
    return f"{key} = {_shorten_repr(problem['input'])}: {message[0].lower()}{message[1:]}"


def _shorten_repr(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= MAX_VALUE_LENGTH else f"{shown[:MAX_VALUE_LENGTH]}..."
