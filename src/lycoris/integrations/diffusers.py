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
from lycoris.compat.timestep_masks import read_pipeline_schedule
from lycoris.errors import ConfigError, FileError, prefix_errors, unknown
from lycoris.files import judge, read_peft, resolve
from lycoris.files.source import open_source
from lycoris.layers import paths
from lycoris.targeting.rank_schedule import WITHOUT_SCHEDULE, RankSchedule, takes_timestep

AdapterSource = str | os.PathLike[str] | Bundle | Mapping[str, Bundle]
DENOISER_COMPONENTS = ("unet", "transformer")
"""Names of denoisers in pipelines; files have no name for theirs."""
TEXT_ENCODER_PREFIX = "text_encoder"
"""Prefix of the names of text encoders."""


@dataclass(frozen=True)
class PipelineReport:
    """What was loaded from a file, by component of the pipeline.

    `str()` gives a few lines for the console.
    """

    applied: Mapping[str, str]
    """Component → a description of what was loaded."""
    unused: tuple[str, ...] = ()
    """Components that are in the file and not in the pipeline."""
    missing: tuple[str, ...] = ()
    """Components of the pipeline that are not in the file."""
    remarks: tuple[str, ...] = ()
    """Remarks from reading the file."""

    def __str__(self) -> str:
        lines = [f"{component}: {what}" for component, what in self.applied.items()]
        lines += [f"{component}: not in this pipeline, left out" for component in self.unused]
        lines += [f"{component}: nothing in the file" for component in self.missing]
        return "\n".join([*lines, *self.remarks])


class Loaded:
    """Adapters on a pipeline, as `load` returns them.

    They are active until `unload()` or the end of a `with` block:

        with load(pipe, "adapter.safetensors") as adapters:
            adapters.set(0.7)
            image = pipe("a cat").images[0]
    """

    def __init__(self, sets: Mapping[str, AdapterSet], report: PipelineReport, strength: float) -> None:
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
        """Set the strength: `strength`, times a factor per component, times a factor per block.

        A block is the path of a module such as `transformer_blocks.0`, in every component that has it, or
        `transformer.transformer_blocks.0` for one component; where blocks are nested, the innermost counts. Arguments
        that are None keep their value; `{}` removes factors.

        Raises `ConfigError`, and changes nothing, for a component or block without adapters.
        """
        wanted = (
            self._strength if strength is None else strength,
            self._components if components is None else dict(components),
            self._blocks if blocks is None else dict(blocks),
        )
        self._apply(*wanted, self._enabled)
        self._strength, self._components, self._blocks = wanted

    def disable(self) -> None:
        """Deactivate the adapters without removing them: the pipeline gives the base model's output.

        Raises `AttachError` while they are merged.
        """
        self._apply(self._strength, self._components, self._blocks, False)
        self._enabled = False

    def enable(self) -> None:
        """Activate the adapters again, at the strengths from before `disable`, or set since.

        Raises `AttachError` while they are merged.
        """
        self._apply(self._strength, self._components, self._blocks, True)
        self._enabled = True

    @property
    def enabled(self) -> bool:
        return self._enabled

    @property
    def loaded(self) -> bool:
        """Whether the adapters are on the pipeline, enabled or not."""
        return any(adapters.attached for adapters in self.sets.values())

    def merge(self) -> dict[str, MergeReport]:
        """Merge the adapters into the weights at the current strengths, for speed.

        `unmerge` and `unload` undo it exactly. Returns a report per component. All components are merged or none.
        """
        reports: dict[str, MergeReport] = {}
        with ExitStack() as undo:
            for component, adapters in self.sets.items():
                reports[component] = adapters.merge()
                undo.callback(adapters.unmerge)
            undo.pop_all()
        return reports

    def unmerge(self) -> None:
        """Restore the weights exactly, in all components or in none.

        Raises `AttachError` when something else was merged on top.
        """
        for adapters in self.sets.values():
            adapters.check_unmergeable()
        for adapters in self.sets.values():
            adapters.unmerge()

    def unload(self) -> None:
        """Remove the adapters from all components or from none.

        The pipeline has its original modules and weights again. A second call does nothing. Raises `AttachError` when
        something else was put on top.
        """
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
        own = {component: self._match_blocks(component, blocks) for component in self.sets}
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

    def _match_blocks(self, component: str, blocks: Mapping[str, float]) -> dict[str, str]:
        """Return paths of blocks in a component → the names they were given by; a name with the component wins."""
        known = set(blocks_of(self.sets[component].stacks))
        found = {block: block for block in blocks if block in known}
        return found | {
            path: block for block in blocks if (path := block.removeprefix(f"{component}.")) != block and path in known
        }


def load(
    pipe: Any,
    source: AdapterSource,
    *,
    strength: float = 1.0,
    name: str | None = None,
    to: str | Sequence[str] | None = None,
    dialect: str | None = None,
    schedule: RankSchedule | None = None,
) -> Loaded:
    """Put the adapters of a file, or of bundles, on the models of a pipeline: on all of them or on none.

    T-LoRA follows the timesteps of the pipeline by itself, by the schedule of the file, else by `schedule`, else by the
    pipeline's `_tlora_config`.

    Args:
        source: An adapter file, a PEFT folder for the denoiser, a `Bundle` for the denoiser, or bundles by the
            pipeline's component names (`unet`, `transformer_2`, `text_encoder`, ...).
        strength: 0 is the base model, 1 the trained strength.
        name: Name of the adapter sets. None: a free one.
        to: Components that get the denoiser's adapters, where a pipeline has two denoisers: `to="transformer_2"`,
            `to=("transformer", "transformer_2")`.
        dialect: Format of the file. None: it is detected.

    Raises `FileError` or `AttachError`, and leaves the pipeline unchanged.
    """
    parts = models(pipe)
    bundles, unused = _read_source(source, parts, to, dialect)
    sets: dict[str, AdapterSet] = {}
    with ExitStack() as undo:
        for component, bundle in bundles.items():
            with prefix_errors(component):
                made = sets[component] = AdapterSet.load(parts[component], bundle, name)
            undo.callback(made.detach)
            made.attach(freeze=False)
            made.schedule = made.schedule or schedule or _read_schedule(pipe, made)
            if takes_timestep(made.model):
                made.rank_masks.follow()
        loaded = Loaded(sets, _build_report(parts, bundles, unused, sets), strength)
        loaded.set(strength)
        undo.pop_all()
    return loaded


def _read_schedule(pipe: Any, adapters: AdapterSet) -> RankSchedule | None:
    wanted = adapters.rank_masks.are_used and getattr(pipe, "_tlora_config", None)
    return read_pipeline_schedule(pipe, adapters) if wanted else None


def models(pipe: Any) -> dict[str, nn.Module]:
    """Return the models of a pipeline that adapters can go on, by component name: denoisers first, then text encoders.

    Wrappers such as `torch.compile` are removed.
    """
    named = [name for name in pipe.components if name.startswith((*DENOISER_COMPONENTS, TEXT_ENCODER_PREFIX))]
    found = {name: getattr(pipe, name, None) for name in sorted(named, key=lambda name: TEXT_ENCODER_PREFIX in name)}
    return {name: paths.unwrap(model) for name, model in found.items() if isinstance(model, nn.Module)}


def _select_denoisers(parts: Mapping[str, nn.Module], to: str | Sequence[str] | None) -> tuple[str, ...]:
    """Return the components that get the denoiser's adapters; none in a pipeline without a denoiser."""
    if to is None:
        return tuple(name for name in DENOISER_COMPONENTS if name in parts)[:1]
    names = (to,) if isinstance(to, str) else tuple(to)
    for name in names:
        if name not in parts:
            raise ConfigError(unknown("component of the pipeline", name, parts))
    return names


def _read_source(
    source: AdapterSource, parts: Mapping[str, nn.Module], to: str | Sequence[str] | None, dialect: str | None
) -> tuple[dict[str, Bundle], tuple[str, ...]]:
    """Return bundles by component name, and the components of the file that the pipeline has no model for."""
    if isinstance(source, Bundle):
        return dict.fromkeys(_require_denoisers(parts, to), source), ()
    if isinstance(source, Mapping):
        if to is not None:
            raise ConfigError(f"to={to!r} cannot be combined with bundles by component name; leave it out")
        for name in source:
            if name not in parts:
                raise ConfigError(unknown("component of the pipeline", name, parts))
        return dict(source), ()
    if Path(source).is_dir():
        return {name: read_peft(source, parts[name]) for name in _require_denoisers(parts, to)}, ()
    return _read_file(source, parts, to, dialect)


def _read_file(
    path: str | os.PathLike[str], parts: Mapping[str, nn.Module], to: str | Sequence[str] | None, dialect: str | None
) -> tuple[dict[str, Bundle], tuple[str, ...]]:
    """Read a file. Only this function knows how files name components: "" is the denoiser."""
    into = _select_denoisers(parts, to)
    with open_source(path) as (tensors, header):
        detected = judge({name: tuple(tensor.shape) for name, tensor in tensors.items()}, header)
        held = {component: into if not component else (component,) for component in detected.components}
        if to is not None and ("" not in held or not held.keys().isdisjoint(into)):
            has = " and ".join(component or "the denoiser" for component in sorted(held))
            raise ConfigError(
                f"{path} has adapters for {has}; to={to!r} is for files with adapters for the denoiser and none for "
                "that component. Leave it out, and each goes to its own component"
            )
        unused = tuple(component or "the denoiser" for component, names in held.items() if not {*names} & parts.keys())
        bundles = {
            name: resolve(tensors, parts[name], dialect, metadata=header, component=component, family=detected.family)
            for name in parts
            for component, names in held.items()
            if name in names
        }
        if not bundles:
            raise FileError(f"the file has adapters for {', '.join(unused)}; this pipeline has {', '.join(parts)}")
    # Those for other components are in the report, by component.
    return {name: replace(b, report=replace(b.report, elsewhere={})) for name, b in bundles.items()}, unused


def _require_denoisers(parts: Mapping[str, nn.Module], to: str | Sequence[str] | None) -> tuple[str, ...]:
    into = _select_denoisers(parts, to)
    if not into:
        raise FileError(
            f"this pipeline has no {' and no '.join(DENOISER_COMPONENTS)}; it has {', '.join(parts) or 'no models'}"
        )
    return into


def _build_report(
    parts: Mapping[str, nn.Module],
    bundles: Mapping[str, Bundle],
    unused: tuple[str, ...],
    sets: Mapping[str, AdapterSet],
) -> PipelineReport:
    remarks = (f"{name}: {remark}" for name, of in bundles.items() for remark in of.remarks)
    masked = {name: made for name, made in sets.items() if made.rank_masks.are_used}
    unscheduled = {
        name: WITHOUT_SCHEDULE if takes_timestep(made.model) else "it takes no timestep; all ranks count at every step"
        for name, made in masked.items()
        if made.schedule is None or not takes_timestep(made.model)
    }
    return PipelineReport(
        applied={name: str(bundle) for name, bundle in bundles.items()},
        unused=unused,
        missing=tuple(name for name in parts if name not in bundles),
        remarks=(*remarks, *(f"{name}: {why}" for name, why in unscheduled.items())),
    )
