"""Folding adapters into a layer's weight: computed in full precision, rounded once, undone by putting things back."""

from __future__ import annotations

import math
import warnings
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lycoris.adapters import attach, watching
from lycoris.adapters.adapter import Adapter
from lycoris.algorithms.additive import Additive
from lycoris.algorithms.call import Call
from lycoris.errors import AttachError
from lycoris.layers import base_weights, freezing, paths, sharding, tied_parameters
from lycoris.layers.geometry import Affine
from lycoris.layers.sites import Site

MERGED_MARK = "_lycoris_merged"
"""Attribute of parameters that hold a merge."""

LOST = 3.0
"""dB at which the rounding error has half the power of the update."""


class Merge(NamedTuple):
    """A layer's parameters before and after a merge, which `fold` has made and nothing has installed yet.

    `base_weights.install` puts `new` on the layer, `restore_parameters` puts `old` back. `versions` counts the in-place
    writes to `new` when it was made, so that later ones show.
    """

    attribute: str
    """Name of the parameter; "" for a layer's weight and bias."""
    old: Affine
    new: Affine
    versions: tuple[int, ...]
    sqnr: float
    """See `MergedLayer.sqnr`."""


@dataclass(frozen=True)
class MergedLayer:
    """What a merge did to one layer.

    `stored_as` names how the layer stores its weight, such as a dtype or a low-bit format.
    """

    path: str
    stored_as: str
    sqnr: float
    """Signal-to-quantization-noise ratio in dB: 10·log10(‖V - W‖² / ‖V' - V‖²), Frobenius norms.

    W is the weight before, V the adapted weight as computed, V' what V is after storing. Infinite when V' is V; 0 dB
    when the update was lost whole, V' = W; less when rounding changed the weight more than the adapters did.
    """


@dataclass(frozen=True)
class MergeReport:
    """What rounding did to a merged update, layer by layer; prints as a table, worst first.

    `strength` is that of the model as a whole, without factors by block; `layers` are in the order of the set.
    """

    strength: float
    layers: tuple[MergedLayer, ...]
    untied: tuple[str, ...] = ()
    """Layers that shared a parameter with another module, and what it is called there."""
    uncalled: tuple[str, ...] = ()
    """Layers that no pass had reached, although passes had reached others: see `lycoris.verify`."""

    @property
    def lost_layers(self) -> tuple[MergedLayer, ...]:
        """Layers of which the update is of the size of the rounding error or below: less than `LOST` dB.

        From 3 dB down the error has at least half the power of the update; () where every update survived.
        """
        return tuple(layer for layer in self.layers if layer.sqnr < LOST)

    def __str__(self) -> str:
        exact = sum(math.isinf(layer.sqnr) and layer.sqnr > 0 for layer in self.layers)
        worst = sorted((layer for layer in self.layers if layer.sqnr < math.inf), key=lambda layer: layer.sqnr)
        lines = [
            f"merged {len(self.layers)} layers at strength {self.strength:g}; in {exact} of them nothing was rounded",
            *(f"  {layer.sqnr:7.1f} dB  {layer.stored_as}  {layer.path}" for layer in worst),
            *(f"  untied  {reason}" for reason in self.untied),
            *(f"  never called  {path}" for path in self.uncalled),
        ]
        return "\n".join(lines)

    def warn(self, stacklevel: int) -> None:
        """Warn of updates that did not survive, and of layers that nothing had used before; at most once for each.

        Args:
            stacklevel: As for `warnings.warn`: 1 is who calls this.
        """
        if self.uncalled:
            warnings.warn(
                f"{len(self.uncalled)} of {len(self.layers)} merged layers have not been called so far: "
                f"{watching.list_some_paths(self.uncalled)}. {watching.READ}. lycoris.verify checks each",
                stacklevel=stacklevel + 1,
            )
        if lost := self.lost_layers:
            some = ", ".join(f"{layer.path} ({layer.stored_as}, {layer.sqnr:.1f} dB)" for layer in lost[:5])
            warnings.warn(
                f"in {len(lost)} of {len(self.layers)} merged layers the update is below the quantization step: {some}"
                f"{', ...' if len(lost) > 5 else ''}. 0 dB is what merging nothing would give. Unmerge and leave the "
                "adapters attached, which is exact; stochastic rounding keeps the update in the mean",
                stacklevel=stacklevel + 1,
            )


def report(
    model: nn.Module,
    sites: Mapping[str, Site],
    merges: Mapping[str, Merge],
    strength: float,
    stacks: Mapping[str, Sequence[Adapter]],
) -> MergeReport:
    """Report what the merges of a model's layers are about to do.

    Call it before they are installed: a layer with its new parameters no longer shares those of other modules.

    Args:
        strength: Overall, for the report.
        stacks: The adapters that passes can have reached; {} where they are not attached.
    """
    layers = (
        MergedLayer(path, base_weights.kind(weight_holder(sites[path])), merge.sqnr) for path, merge in merges.items()
    )
    parted = tuple(f"{path} from {', '.join(names)}" for path, names in _find_tied_sites(model, sites).items())
    return MergeReport(strength, tuple(layers), parted, watching.never_called(stacks))


def weight_holder(site: Site) -> nn.Module:
    """Return what has the weight of a site: the layer, or a stand-in for a bare parameter.

    The stand-in has the very parameter as its `weight`. Giving it another one does not change the model.
    """
    return base_weights.holder(site.module, site.attribute)


def _find_tied_sites(model: nn.Module, sites: Mapping[str, Site]) -> dict[str, tuple[str, ...]]:
    """The sites that share a parameter with other modules of a model, and its names there."""
    shared = tied_parameters.find_shared_parameters(dict(paths.named_modules(model)))
    found = {path: tied_parameters.tied_to(site, shared) for path, site in sites.items()} if shared else {}
    return {path: names for path, names in found.items() if names}


def _check_untied(model: nn.Module, sites: Mapping[str, Site]) -> None:
    """Raise `AttachError` for layers that share a parameter with other modules."""
    found = _find_tied_sites(model, sites)
    for path, names in found.items():
        raise AttachError(
            f"{path} shares its weight with {', '.join(names)}. The adapter changes {path} alone; a merge that kept "
            "them tied would change both. Leave it attached, or merge with untie=True, which gives it a weight of its "
            f"own{f' ({len(found) - 1} more such layers)' if len(found) > 1 else ''}"
        )


def check_writable(path: str, layer: nn.Module, into_low_bit: bool, stochastic: bool) -> None:
    """Raise `AttachError` unless a weight can be written as asked; nothing is changed.

    Args:
        into_low_bit: Whether low-bit weights may be decoded, changed and rounded again.
        stochastic: Whether rounding is to be stochastic, which some formats of other libraries do not do.
    """
    row = base_weights.storage(layer)
    stored = f"the weight of {path} is stored as {row.label(layer)}"
    if row.low_bit and not into_low_bit:
        raise AttachError(
            f"{stored}, and a merge would round the update to that. Attached and unmerged the adapters act exactly; "
            "merge(into_low_bit=True) dequantizes, folds, rounds once and reports the loss"
        )
    if why := row.why_unreadable(layer) or row.why_unwritable(layer):
        raise AttachError(f"{stored} and cannot be merged into: {why}. Leave the adapters attached")
    if stochastic and not row.stochastic(layer):
        raise AttachError(
            f"{stored}, which is written by its own library, to nearest; merge without stochastic_seed, or those "
            "layers in a set of their own"
        )


@torch.no_grad()
def fold(path: str, layer: nn.Module, stack: Sequence[Adapter], strength: float, seed: int | None = None) -> Merge:
    """The parameters of a layer (a `bases.holder`), and new ones with a stack folded in. Nothing is changed yet.

    float32 throughout (float64 for such weights), and one rounding to the layer's own precision, stochastic with a
    seed. What is drawn depends on the seed and the path alone.
    """
    base, turned = base_weights.read(layer), stack[0].geometry.transpose_stored
    full = torch.promote_types(base.weight.dtype, torch.float32)
    before = Affine(turned(base.weight.to(full)), None if base.bias is None else base.bias.to(full))
    affine = before
    for adapter in stack:
        affine = adapter.adapt_affine(affine, Call(strength))
    generator = None
    if seed is not None:
        # 32 bits: torch's generator for CPUs takes no more.
        generator = torch.Generator(affine.weight.device).manual_seed(zlib.crc32(f"{seed} {path}".encode()))
    whole = turned(affine.weight).contiguous()
    new = base_weights.rewritten(layer, Affine(whole, affine.bias), generator)
    sqnr = _decibel(
        affine.weight - before.weight, turned(base_weights.read_as(layer, new).weight.to(full)) - affine.weight
    )
    setattr(new.weight, MERGED_MARK, True)
    old = base_weights.own(layer)
    for one, other in zip(old, new, strict=True):
        if one is not None and other is not None:
            freezing.carry(one, other)
    return Merge(stack[0].attribute, old, new, _versions(new), sqnr)


def fold_all(
    sites: Mapping[str, Site],
    stacks: Mapping[str, Sequence[Adapter]],
    strength_at: Callable[[str], float],
    seed: int | None = None,
) -> dict[str, Merge]:
    """Fold the stacks of all layers, and return the merges by path. Nothing is changed yet; see `fold`.

    Args:
        strength_at: Strength of the layer of a path.
        seed: Of stochastic rounding. None: to nearest.
    """
    return {
        path: fold(path, weight_holder(site), stacks[path], strength_at(path), seed) for path, site in sites.items()
    }


def _decibel(signal: Tensor, noise: Tensor) -> float:
    power, error = (float(torch.linalg.vector_norm(part)) for part in (signal, noise))
    if error == 0:
        return math.inf
    return 20 * math.log10(power / error) if power > 0 else -math.inf


def is_merged(layer: nn.Module, attribute: str = "") -> bool:
    """Return whether a layer's weight, or the parameter of that name, has adapters folded in.

    By a mark on the parameter that the merge made: one that takes its place later has none.
    """
    return bool(getattr(layer._parameters.get(attribute or "weight"), MERGED_MARK, False))


def check_untouched(path: str, layer: nn.Module, merge: Merge) -> None:
    """Raise `AttachError` unless the layer still has just what the merge gave it.

    Refused: another parameter in its place, an in-place write since, and for formats that keep scales beside the weight
    a move or cast. Moving or casting is fine for all others.
    """
    own = base_weights.holder(layer, merge.attribute)
    now = base_weights.own(own)
    if now.weight is not merge.new.weight or now.bias is not merge.new.bias:
        raise AttachError(
            f"the weight of {path} was replaced after this merge; undo later merges first, newest to oldest"
        )
    if _versions(merge.new) != merge.versions:
        raise AttachError(
            f"the weight of {path} was written to after this merge, by load_state_dict or by training; "
            "undoing the merge would lose that"
        )
    if not base_weights.movable(own) and _where(merge.old) != _where(merge.new):
        raise AttachError(
            f"{path} was moved or cast after this merge, and what {base_weights.kind(layer)} stores next to its weight "
            f"did not follow; move it back to {_where(merge.old)} first"
        )


def restore_parameters(layer: nn.Module, merge: Merge) -> None:
    """Put a layer's own parameters back, where and in the precision to which the layer was moved since.

    They are the very objects of before, and train, or not, as those of the merge did. `check_untouched` tells
    beforehand whether something would be lost.
    """
    for old, new in zip(merge.old, merge.new, strict=True):
        if old is not None and new is not None and (old.dtype, old.device) != (new.dtype, new.device):
            old.data = old.data.to(new)
        if old is not None and new is not None:
            freezing.carry(new, old)
    base_weights.install(layer, merge.old, merge.attribute)


def _where(affine: Affine) -> str:
    return f"{affine.weight.device}, {affine.weight.dtype}"


def _versions(affine: Affine) -> tuple[int, ...]:
    # Tensors made in inference mode do not count their writes.
    return tuple(t._version for t in affine if t is not None and not t.is_inference())


def check_foldable(
    model: nn.Module,
    sites: Mapping[str, Site],
    stacks: Mapping[str, Sequence[Adapter]],
    into_low_bit: bool,
    stochastic: bool,
    untie: bool,
) -> None:
    """Raise `AttachError` unless stacks can be folded into the weights of a model's layers as asked.

    Nothing is changed. Refused: a stack that does not commute with adapters under it, a weight that cannot be written
    (see `check_writable`), a sharded layer and, unless `untie`, a layer that shares a parameter with another module.
    """
    for path, site in sites.items():
        check_order(path, site.module, stacks[path])
        check_writable(path, weight_holder(site), into_low_bit, stochastic)
        sharding.check_own(path, site.module)
    if not untie:
        _check_untied(model, sites)


def check_order(path: str, layer: nn.Module, own: Sequence[Adapter]) -> None:
    """Merging puts a stack below the adapters of other sets; that is the same only if all of them add.

    A stack that is not attached would have come on top. Raises `AttachError` otherwise.
    """
    order = list(attach.adapters_on(layer, own[0].attribute))
    first = next((at for at, adapter in enumerate(order) if adapter is own[0]), len(order))
    lower = [adapter for adapter in order[:first] if not adapter.state.silent]
    moved = [adapter.algorithm for adapter in (*lower, *own)]
    if lower and not all(isinstance(algorithm, Additive) for algorithm in moved):
        names = ", ".join(algorithm.name for algorithm in moved)
        raise AttachError(f"on {path} {names} do not commute; merge or detach the lower set first")
