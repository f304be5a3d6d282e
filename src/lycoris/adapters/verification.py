"""`verify`: whether every adapter does on a model what training and merging take for granted."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lycoris.adapters import merging
from lycoris.adapters.adapter import Adapter
from lycoris.adapters.adapter_set import AdapterSet
from lycoris.adapters.check_result import APART, CheckedLayer, Verification, relative, tensors_in
from lycoris.adapters.restoring import in_evaluation_mode, perturb_parameters, same_draws, stand_ins, state_restored
from lycoris.adapters.usage import Seen
from lycoris.errors import AttachError, ConfigError
from lycoris.layers import base_weights, sharding
from lycoris.layers.sites import Site

WIDE_DTYPES = (torch.float32, torch.float64)

DIRECTIONS = 3
"""In which the gradient is compared with difference quotients: a wrong one may agree in a single one."""


class _CheckedLayer(NamedTuple):
    """One adapted layer, or parameter."""

    adapters: AdapterSet
    path: str

    @property
    def site(self) -> Site:
        return self.adapters.sites[self.path]

    @property
    def stack(self) -> tuple[Adapter, ...]:
        return self.adapters.stacks[self.path]


class _TrainingPass(NamedTuple):
    """What a forward and backward pass came to, by layer."""

    calls: list[int]
    gradients: list[float | None]
    error: float | None
    stopped: str
    cuts: tuple[str, ...]


def verify(adapters: Any, batch: Any) -> Verification:
    """Run a model on a batch and say of every adapted layer whether it is called, gets a gradient, acts, and merges.

    `adapters`: an `AdapterSet`, or a network of `create_lycoris`. `batch`: a tensor, a tuple of arguments or a mapping
    of keyword arguments for the model, or a function that runs the model and returns its output or loss; it has to do
    the same in every call. Of the output every floating-point tensor counts.

    For each layer: how often it is called; the norm of the gradient of its adapters, for a loss that weighs the
    outputs at random; the change of the output between strength 0 and 1; and how far the output is from it once they
    are merged. Changes are max|a - b| / max|a|. In float32 the gradient of all adapters is compared with difference
    quotients, which shows parts of it that something without a derivative has swallowed. Adapters draw no dropout, and
    those that change nothing yet are nudged. Takes up to three forward passes a layer. Everything is then as it was:
    weights, gradients, strengths, modes, random numbers.

    Raises `AttachError` while adapters are merged or the model is sharded.
    """
    sets = _sets(adapters)
    model = sets[0].model
    run = batch if callable(batch) and not isinstance(batch, Tensor) else lambda: _call_model(model, batch)
    layers = [_CheckedLayer(each, path) for each in sets for path in each.stacks]
    models, every = [each.model for each in sets], [adapter for layer in layers for adapter in layer.stack]
    for each in sets:
        _check_checkable(each)
    with ExitStack() as undo:
        undo.enter_context(state_restored(models, every))
        for each in sets:
            if not each.attached:
                each.attach(freeze=False)
                undo.callback(each.detach)
            if each.rank_masks.is_following:
                each.rank_masks.unfollow()
                undo.callback(each.rank_masks.follow)
            undo.enter_context(each.at())
            each.set_strength(1.0)
            each.set_rank_mask(None)
        again = undo.enter_context(same_draws(models))
        undo.enter_context(in_evaluation_mode(every))
        trained = _train_once(sets, layers, run, again)
        undo.enter_context(in_evaluation_mode(models))
        undo.enter_context(torch.no_grad())
        return _compare_layers(layers, lambda: tensors_in(again(run)), trained)


def _sets(adapters: Any) -> list[AdapterSet]:
    if isinstance(adapters, AdapterSet):
        return [adapters]
    found = [part.adapters for part in getattr(adapters, "parts", ())]
    if not found or not all(isinstance(each, AdapterSet) for each in found):
        raise ConfigError(f"verify takes an AdapterSet or a network of create_lycoris, not {type(adapters).__name__}")
    return found


def _check_checkable(adapters: AdapterSet) -> None:
    if adapters.merged:
        raise AttachError("these adapters are merged, and a check compares with that; unmerge them first")
    if any(sharding.is_sharded(parameter) for parameter in adapters.model.parameters()):
        raise AttachError("this model is sharded; check its adapters before that")


def _call_model(model: nn.Module, batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, tuple | list) else model(batch)


# -- forward and backward ----------------------------------------------------------------------------------------------


def _train_once(
    sets: list[AdapterSet],
    layers: list[_CheckedLayer],
    run: Callable[[], Any],
    again: Callable[[Callable[[], Any]], Any],
) -> _TrainingPass:
    """One pass as in training."""
    calls: dict[int, int] = {}
    cuts: list[str] = []
    stopped = ""
    models = [each.model for each in sets]
    with ExitStack() as undo, torch.enable_grad():
        undo.enter_context(stand_ins(models))
        for layer in layers:
            for adapter in layer.stack:
                adapter.seen = Seen()
                undo.callback(adapter.register_forward_hook(_counter(calls, adapter)).remove)
        hooks = [
            module.register_forward_hook(_cut_finder(name, cuts), with_kwargs=True)
            for model in models
            for name, module in model.named_modules()
            if not isinstance(module, Adapter)
        ]
        try:
            output = again(run)
        finally:
            for hook in hooks:
                hook.remove()
        counted = [_calls(layer, calls) for layer in layers]
        found = tensors_in(output)
        which = [at for at, tensor in enumerate(found) if tensor.requires_grad]
        if not which:
            raise AttachError(
                "nothing that the model returned has a gradient: no adapter was reached, or gradients are off inside"
            )
        try:
            _reduce_output(found, which).backward()  # type: ignore[no-untyped-call]  # torch's own has no types
        except AttachError as refused:
            stopped = str(refused)
        gradients = [_gradient(layer) for layer in layers]
        error = None if stopped else _gradient_error(layers, lambda: tensors_in(again(run)), which)
    innermost = [name for name in cuts if not any(other.startswith(f"{name}.") for other in cuts)]
    return _TrainingPass(counted, gradients, error, stopped, tuple(dict.fromkeys(innermost)))


def _counter(calls: dict[int, int], adapter: Adapter) -> Callable[..., None]:
    def count(*_: Any) -> None:
        calls[id(adapter)] = calls.get(id(adapter), 0) + 1

    return count


def _calls(layer: _CheckedLayer, calls: Mapping[int, int]) -> int:
    # A parameter is read, and a compiled graph has no hooks; both leave the flag.
    return max(max(calls.get(id(adapter), 0), int(adapter.seen.called)) for adapter in layer.stack)


def _cut_finder(name: str, cuts: list[str]) -> Callable[..., None]:
    def look(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        given, made = tensors_in((args, kwargs)), tensors_in(output)
        if made and any(x.requires_grad for x in given) and not any(y.requires_grad for y in made):
            cuts.append(name)

    return look


def _reduce_output(found: list[Tensor], which: list[int]) -> Tensor:
    """A number that depends on all of an output: with random weights, for sums of normalized values are constant."""
    if len(which) == 1 and found[which[0]].numel() == 1:
        return found[which[0]].sum()
    generator = torch.Generator().manual_seed(0)
    sums = []
    for at in which:
        weights = torch.randn(found[at].shape, generator=generator)
        sums.append((found[at].double() * weights.to(found[at].device)).sum().cpu())
    return torch.stack(sums).sum()


def _gradient(layer: _CheckedLayer) -> float | None:
    """Norm over the adapters of a layer; None where none arrived."""
    grads = [p.grad for adapter in layer.stack for p in adapter.parameters() if p.grad is not None]
    return float(torch.stack([grad.detach().double().norm().cpu() for grad in grads]).norm()) if grads else None


def _gradient_error(layers: list[_CheckedLayer], outputs: Callable[[], list[Tensor]], which: list[int]) -> float | None:
    """How far the gradient is from difference quotients in random directions; None where precision does not tell."""
    every = {id(p): p for layer in layers for adapter in layer.stack for p in adapter.parameters()}
    parameters = [p for p in every.values() if p.grad is not None]
    if not parameters or any(p.dtype not in WIDE_DTYPES for p in parameters):
        return None
    generator = torch.Generator().manual_seed(0)
    directions = [[_direction(parameter, generator) for parameter in parameters] for _ in range(DIRECTIONS)]
    grads = [p.grad for p in parameters if p.grad is not None]
    expected = [
        math.fsum(float((step * grad).sum(dtype=torch.float64)) for step, grad in zip(steps, grads, strict=True))
        for steps in directions
    ]

    def value() -> float:
        found = outputs()
        return (
            float(_reduce_output(found, which).detach())
            if all(found[at].dtype in WIDE_DTYPES for at in which)
            else math.nan
        )

    errors = []
    for size in (1e-2, 1e-3):
        found = []
        for steps in directions:
            ends = []
            for sign in (1, -1):
                with perturb_parameters(parameters, steps, sign * size), torch.no_grad():
                    ends.append(value())
            found.append((ends[0] - ends[1]) / (2 * size))
        if any(map(math.isnan, found)):
            return None
        scale = math.hypot(*(max(abs(f), abs(e)) for f, e in zip(found, expected, strict=True)))
        apart = math.hypot(*(f - e for f, e in zip(found, expected, strict=True)))
        errors.append(apart / scale if scale > 0 else 0.0)
        if errors[-1] < APART / 10:
            break
    return min(errors)


def _direction(parameter: nn.Parameter, generator: torch.Generator) -> Tensor:
    """A random step of the size of a parameter's own values, or a tenth where those are zero."""
    size = float(parameter.detach().square().mean().sqrt()) or 0.1
    return (size * torch.randn(parameter.shape, generator=generator)).to(parameter)


# -- comparisons -------------------------------------------------------------------------------------------------------


def _compare_layers(
    layers: list[_CheckedLayer], outputs: Callable[[], list[Tensor]], trained: _TrainingPass
) -> Verification:
    """Every layer by itself: without it, and with it merged."""
    attached = outputs()
    noise = relative(attached, outputs())
    rows = []
    for at, layer in enumerate(layers):
        layer.adapters.set_strength(0.0, at=layer.path)
        without = outputs()
        layer.adapters.set_strength(1.0, at=layer.path)
        effect, now = relative(attached, without), attached
        with ExitStack() as undo:
            fresh = effect <= noise
            if fresh:
                undo.enter_context(_nudge(layer))
                now = outputs()
                effect = relative(now, without)
            difference, why = _merge_error(layer, now, outputs)
        rows.append(
            CheckedLayer(
                path=layer.path,
                calls=trained.calls[at],
                gradient=trained.gradients[at],
                trains=any(p.requires_grad for adapter in layer.stack for p in adapter.parameters()),
                effect=effect,
                fresh=fresh,
                difference=difference,
                remark=why,
            )
        )
    half = any(tensor.dtype not in WIDE_DTYPES for tensor in attached) or any(map(_is_half, layers))
    return Verification(
        tuple(rows), max(0.05 if half else 1e-4, 4 * noise), noise, trained.error, trained.stopped, trained.cuts
    )


def _is_half(layer: _CheckedLayer) -> bool:
    return base_weights.precision(merging.weight_holder(layer.site)) not in WIDE_DTYPES


@contextmanager
def _nudge(layer: _CheckedLayer) -> Iterator[None]:
    """Adapters that do something, in place of ones that do not yet."""
    parameters = [p for adapter in layer.stack for p in adapter.parameters()]
    generator = torch.Generator().manual_seed(0)
    steps = [torch.randn(p.shape, generator=generator) for p in parameters]
    with perturb_parameters(parameters, steps, 0.1):
        yield


def _merge_error(
    layer: _CheckedLayer, now: list[Tensor], outputs: Callable[[], list[Tensor]]
) -> tuple[float | None, str]:
    """How far the output is from `now` with a layer merged; None, and why, where it cannot be."""
    adapters, path = layer.adapters, layer.path
    module = layer.site.module
    try:
        merging.check_foldable(adapters.model, {path: layer.site}, adapters.stacks, False, False, True)
    except AttachError as error:
        return None, str(error)
    merge = merging.fold(path, merging.weight_holder(layer.site), layer.stack, 1.0)
    base_weights.install(module, merge.new, merge.attribute)
    adapters.set_strength(0.0, at=path)
    try:
        return relative(now, outputs()), ""
    finally:
        merging.restore_parameters(module, merge)
        adapters.set_strength(1.0, at=path)
