"""Adapters of any algorithm on the models of a diffusers pipeline."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import nn

from lycoris.adapters.adapter_set import AdapterSet
from lycoris.adapters.bundle import Bundle
from lycoris.adapters.merging import MergeReport
from lycoris.adapters.strengths import blocks_of
from lycoris.compat.timestep_masks import pipeline_schedule
from lycoris.errors import ConfigError, FileError, prefix_errors, unknown
from lycoris.files import judge, read_peft, resolve
from lycoris.files.source import open_source
from lycoris.layers import paths
from lycoris.targeting.rank_schedule import WITHOUT_SCHEDULE, RankSchedule, takes_timestep

Source = str | os.PathLike[str] | Bundle | Mapping[str, Bundle]
DENOISERS = ("unet", "transformer")
"""What pipelines call the model that files call none."""
TEXT_ENCODER = "text_encoder"
"""How the names of text encoders begin."""


@dataclass(frozen=True)
class Report:
    """What became of a file. Prints as a few lines."""

    applied: Mapping[str, str]
    """Component → what it got."""
    unused: tuple[str, ...] = ()
    """Components that the file has tensors for and the pipeline has no model for."""
    missing: tuple[str, ...] = ()
    """Components of the pipeline that the file has nothing for."""
    remarks: tuple[str, ...] = ()
    """What reading the file brought up besides."""

    def __str__(self) -> str:
        lines = [f"{component}: {what}" for component, what in self.applied.items()]
        lines += [f"{component}: not in this pipeline, left out" for component in self.unused]
        lines += [f"{component}: nothing in the file" for component in self.missing]
        return "\n".join([*lines, *self.remarks])


class Loaded:
    """Adapters on a pipeline: on at once, until `unload()` or the end of a `with` block."""

    def __init__(self, sets: Mapping[str, AdapterSet], report: Report, strength: float) -> None:
        self.sets: Mapping[str, AdapterSet] = dict(sets)
        """Component → its adapters."""
        self.report = report
        self._strength, self._enabled = strength, True
        self._components: Mapping[str, float] = {}
        self._blocks: Mapping[str, float] = {}

    def set(
        self,
        strength: float | None = None,
        *,
        components: Mapping[str, float] | None = None,
        blocks: Mapping[str, float] | None = None,
    ) -> None:
        """How much counts: `strength`, times a factor by component, times a factor by block.

        A block is the path of a module, such as `transformer_blocks.0`, in every component that has it, or
        `transformer.transformer_blocks.0` in one; of several that hold a layer the longest counts. What is not given
        stays as it is; `{}` takes factors away. Raises `ConfigError`, and changes nothing, for a name without adapters.
        """
        wanted = (
            self._strength if strength is None else strength,
            self._components if components is None else dict(components),
            self._blocks if blocks is None else dict(blocks),
        )
        self._apply(*wanted, self._enabled)
        self._strength, self._components, self._blocks = wanted

    def disable(self) -> None:
        """Let the pipeline give what it gives without these adapters, which stay where they are."""
        self._apply(self._strength, self._components, self._blocks, False)
        self._enabled = False

    def enable(self) -> None:
        """Let them act again, at the strengths they had."""
        self._apply(self._strength, self._components, self._blocks, True)
        self._enabled = True

    @property
    def enabled(self) -> bool:
        return self._enabled

    @property
    def loaded(self) -> bool:
        """Whether they are on the pipeline, acting or not."""
        return any(adapters.attached for adapters in self.sets.values())

    def merge(self) -> dict[str, MergeReport]:
        """Fold them into the weights at the strengths in force, for speed; `unmerge` and `unload` undo it exactly."""
        reports: dict[str, MergeReport] = {}
        with ExitStack() as undo:
            for component, adapters in self.sets.items():
                reports[component] = adapters.merge()
                undo.callback(adapters.unmerge)
            undo.pop_all()
        return reports

    def unmerge(self) -> None:
        """Put the weights back, exactly. All of them or none."""
        for adapters in self.sets.values():
            adapters.check_unmergeable()
        for adapters in self.sets.values():
            adapters.unmerge()

    def unload(self) -> None:
        """Take them off: the pipeline is what it was, to the object. All or none; a second call does nothing."""
        for adapters in self.sets.values():
            adapters.check_detachable()
        for adapters in self.sets.values():
            adapters.detach()

    def __enter__(self) -> Loaded:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.unload()

    def _apply(
        self, strength: float, components: Mapping[str, float], blocks: Mapping[str, float], enabled: bool
    ) -> None:
        for component in components:
            if component not in self.sets:
                raise ConfigError(unknown("component with adapters", component, self.sets))
        own = {component: self._own(component, blocks) for component in self.sets}
        found = {block for of in own.values() for block in of.values()}
        for block in blocks:
            if block not in found:
                known = {name for adapters in self.sets.values() for name in blocks_of(adapters.stacks)}
                raise ConfigError(unknown("block of layers with adapters", block, known))
        with ExitStack() as undo:
            for component, adapters in self.sets.items():
                before, factor = (
                    (adapters.strength, adapters.strengths.blocks),
                    components.get(component, 1.0) if enabled else 0.0,
                )
                adapters.set_strength(strength * factor, {path: blocks[name] for path, name in own[component].items()})
                undo.callback(adapters.set_strength, *before)
            undo.pop_all()

    def _own(self, component: str, blocks: Mapping[str, float]) -> dict[str, str]:
        """Paths of blocks in a component → the names they were given by; a name with the component wins."""
        known = set(blocks_of(self.sets[component].stacks))
        found = {block: block for block in blocks if block in known}
        return found | {
            path: block for block in blocks if (path := block.removeprefix(f"{component}.")) != block and path in known
        }


def load(
    pipe: Any,
    source: Source,
    *,
    strength: float = 1.0,
    name: str | None = None,
    to: str | Sequence[str] | None = None,
    dialect: str | None = None,
    schedule: RankSchedule | None = None,
) -> Loaded:
    """Put the adapters of a file, or of bundles, on the models of a pipeline. All of them or none.

    `source` is an adapter file, a folder of PEFT's for the denoiser, a `Bundle` for the denoiser, or bundles by the
    pipeline's names (`unet`, `transformer_2`, `text_encoder`, ...). `to` names the components that take what is for
    the denoiser, where a pipeline has two: `to="transformer_2"`, `to=("transformer", "transformer_2")`. `name` tells
    sets apart; None takes a free one. T-LoRA follows the timesteps of the pipeline by itself, by the schedule of the
    file, else by `schedule`, else by the pipeline's `_tlora_config`.

    Raises `FileError` or `AttachError`, with the pipeline as it was.
    """
    parts = models(pipe)
    bundles, unused = _read(source, parts, to, dialect)
    sets: dict[str, AdapterSet] = {}
    with ExitStack() as undo:
        for component, bundle in bundles.items():
            with prefix_errors(component):
                made = sets[component] = AdapterSet.load(parts[component], bundle, name)
            undo.callback(made.detach)
            made.attach(freeze=False)
            made.schedule = made.schedule or schedule or _schedule_of(pipe, made)
            if takes_timestep(made.model):
                made.rank_masks.follow()
        loaded = Loaded(sets, _report(parts, bundles, unused, sets), strength)
        loaded.set(strength)
        undo.pop_all()
    return loaded


def _schedule_of(pipe: Any, adapters: AdapterSet) -> RankSchedule | None:
    wanted = adapters.rank_masks.are_used and getattr(pipe, "_tlora_config", None)
    return pipeline_schedule(pipe, adapters) if wanted else None


def models(pipe: Any) -> dict[str, nn.Module]:
    """The models of a pipeline that adapters go on, by its names for them: denoisers, then text encoders."""
    named = [name for name in pipe.components if name.startswith((*DENOISERS, TEXT_ENCODER))]
    found = {name: getattr(pipe, name, None) for name in sorted(named, key=lambda name: TEXT_ENCODER in name)}
    return {name: paths.unwrap(model) for name, model in found.items() if isinstance(model, nn.Module)}


def _denoisers(parts: Mapping[str, nn.Module], to: str | Sequence[str] | None) -> tuple[str, ...]:
    """What takes what is for the denoiser; nothing in a pipeline without one."""
    if to is None:
        return tuple(name for name in DENOISERS if name in parts)[:1]
    names = (to,) if isinstance(to, str) else tuple(to)
    for name in names:
        if name not in parts:
            raise ConfigError(unknown("component of the pipeline", name, parts))
    return names


def _read(
    source: Source, parts: Mapping[str, nn.Module], to: str | Sequence[str] | None, dialect: str | None
) -> tuple[dict[str, Bundle], tuple[str, ...]]:
    """Bundles by the pipeline's names, and the components that it has no model for."""
    if isinstance(source, Bundle):
        return dict.fromkeys(_required_denoisers(parts, to), source), ()
    if isinstance(source, Mapping):
        if to is not None:
            raise ConfigError(f"these bundles say where they go, so that to={to!r} is one too many")
        for name in source:
            if name not in parts:
                raise ConfigError(unknown("component of the pipeline", name, parts))
        return dict(source), ()
    if Path(source).is_dir():
        return {name: read_peft(source, parts[name]) for name in _required_denoisers(parts, to)}, ()
    return _read_file(source, parts, to, dialect)


def _read_file(
    path: str | os.PathLike[str], parts: Mapping[str, nn.Module], to: str | Sequence[str] | None, dialect: str | None
) -> tuple[dict[str, Bundle], tuple[str, ...]]:
    """The one place that knows how files name components: "" for the denoiser, the others as pipelines do."""
    into = _denoisers(parts, to)
    with open_source(path) as (tensors, header):
        detected = judge({name: tuple(tensor.shape) for name, tensor in tensors.items()}, header)
        held = {component: into if not component else (component,) for component in detected.components}
        if to is not None and ("" not in held or not held.keys().isdisjoint(into)):
            has = " and ".join(component or "the denoiser" for component in sorted(held))
            raise ConfigError(
                f"{path} has adapters for {has}: to={to!r} is for files that have some for the denoiser and none for "
                "what they go to; leave it out, and each goes to its own component"
            )
        unused = tuple(component or "the denoiser" for component, names in held.items() if not {*names} & parts.keys())
        bundles = {
            name: resolve(tensors, parts[name], dialect, metadata=header, component=component, family=detected.family)
            for name in parts
            for component, names in held.items()
            if name in names
        }
        if not bundles:
            raise FileError(f"it is for {', '.join(unused)}, and this pipeline has {', '.join(parts)}")
    # Those for other components are in the report, by component.
    return {name: replace(b, report=replace(b.report, elsewhere={})) for name, b in bundles.items()}, unused


def _required_denoisers(parts: Mapping[str, nn.Module], to: str | Sequence[str] | None) -> tuple[str, ...]:
    into = _denoisers(parts, to)
    if not into:
        raise FileError(f"this pipeline has no {' and no '.join(DENOISERS)}; it has {', '.join(parts) or 'no models'}")
    return into


def _report(
    parts: Mapping[str, nn.Module],
    bundles: Mapping[str, Bundle],
    unused: tuple[str, ...],
    sets: Mapping[str, AdapterSet],
) -> Report:
    remarks = (f"{name}: {remark}" for name, of in bundles.items() for remark in of.remarks)
    masked = {name: made for name, made in sets.items() if made.rank_masks.are_used}
    untold = {
        name: WITHOUT_SCHEDULE
        if takes_timestep(made.model)
        else "it takes no timestep, and all ranks count at every step"
        for name, made in masked.items()
        if made.schedule is None or not takes_timestep(made.model)
    }
    return Report(
        applied={name: str(bundle) for name, bundle in bundles.items()},
        unused=unused,
        missing=tuple(name for name in parts if name not in bundles),
        remarks=(*remarks, *(f"{name}: {why}" for name, why in untold.items())),
    )
