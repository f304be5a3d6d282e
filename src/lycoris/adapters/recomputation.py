"""What was in force at a forward pass is in force again when backward recomputes that pass.

Gradient checkpointing runs layers a second time during backward. By then a trainer may have set another strength, mask
or mode. Nothing is inferred from inputs: each checkpointed region has an object that lives as long as its part of the
graph, and what was in force at each pass through the region is kept on that object, in order.

- `torch.utils.checkpoint(use_reentrant=False)`: the region's frame, which the hooks for saved tensors refer to during
  the first run and during the recomputation alike.
- `use_reentrant=True`, and the autograd functions of other libraries that recompute: the context of the function, which
  is on the call stack during the first run and is the node that autograd executes during the recomputation.
- A compiled layer inside a checkpointed region looks the region up by an operator that stays in the graph.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lycoris.algorithms.call import Call
from lycoris.errors import AttachError
from lycoris.ops.torch_private import (
    CheckpointFrame,
    current_graph_task,
    current_node,
    pop_saved_tensors_hooks,
    push_saved_tensors_hooks,
    sequence_number,
    top_saved_tensors_hooks,
)

PASSES = "_lycoris_passes"
"""Attribute of a region's object: what was in force at the passes through it."""


class PassState(NamedTuple):
    """What is in force for one pass through one layer.

    A value: a recomputation of the pass gets the same one, whatever was set since.
    """

    call: Call
    draws: bool
    """Whether dropout is drawn: the algorithm has some, and the layer is in training mode."""
    merged: bool
    """Whether the adapter is part of the layer's weight."""
    random: Tensor | None = None
    """State of the random number generator before dropout is drawn, for passes that may be recomputed."""

    @property
    def silent(self) -> bool:
        """Whether the adapter lets the pass through: merged, and no mask takes a part of it away again.

        Strength 0 alone does not make it silent.
        """
        return self.merged and self.call.rank_mask is None


class _Region(NamedTuple):
    """A part of a forward pass that is, or is going to be, recomputed."""

    owner: Any
    """Lives as long as the region's part of the graph."""
    run: Any
    """Identity of the recomputation that is under way; None during the first run."""


class _Passes:
    """What was in force at each pass of each adapter through one region, in order."""

    def __init__(self) -> None:
        self._states: dict[int, list[Any]] = {}
        self._run: Any = None
        self._next: Counter[int] = Counter()

    def append(self, adapter: int, state: Any) -> None:
        self._states.setdefault(adapter, []).append(state)

    def replay(self, adapter: int, run: Any) -> Any:
        """What was in force at the pass that is recomputed now."""
        if run is not self._run and run != self._run:
            self._run, self._next = run, Counter()
        states, at = self._states.get(adapter, ()), self._next[adapter]
        if at >= len(states):
            raise AttachError(
                f"a layer is called {at + 1} times in the recomputation of a checkpointed pass and was called "
                f"{len(states)} times in the pass itself; call backward() before adapters are attached or detached"
            )
        self._next[adapter] += 1
        return states[at]


class PassHistory:
    """The passes of one adapter, as far as a recomputation has to know of them.

    Args:
        adapter: A number that no other adapter has, under which checkpointed regions keep its passes.
    """

    def __init__(self, adapter: int) -> None:
        self.adapter = adapter
        self._first: PassState | None = None
        self._varied = False
        self._outside: tuple[int, int] | None = None

    def state_of_pass(self, now: PassState, x: Tensor) -> PassState:
        """What is in force for a pass over x that begins with `now` set: in a recomputation, what was in force then.

        Raises `AttachError` where adapters were merged or unmerged since, and for a recomputation of which the first
        run is not known while it could have had another state.
        """
        in_backward = current_graph_task() != -1
        if (
            not in_backward
            and top_saved_tensors_hooks(True) is None
            and (torch.is_grad_enabled() or self._outside_functions())
        ):
            self._note(now)
            return now
        regions = _regions() + _functions()
        state = _find_replayed_state(regions, self.adapter)
        if state is None:
            self._check_known(in_backward)
            self._note(now)
            state = now if not now.draws else now._replace(random=_read_random_state(x.device))
        elif state.merged != now.merged:
            raise AttachError(
                "adapters were merged or unmerged between a checkpointed forward pass and its recomputation, which "
                "would see other weights; call backward() first"
            )
        _remember(regions, self.adapter, state)
        return state

    def _note(self, now: PassState) -> None:
        """Remember whether all passes so far had the same state."""
        if self._first is None:
            self._first = now
        elif now is not self._first and now != self._first:
            self._varied = True

    def _check_known(self, in_backward: bool) -> None:
        if in_backward and torch.is_grad_enabled() and self._varied:
            raise AttachError(
                "a pass is recomputed in backward by something else than torch.utils.checkpoint.checkpoint, and "
                "different strengths, masks or modes have been in force, so that the one of this pass is not known; "
                "use torch.utils.checkpoint.checkpoint, in either form"
            )

    def _outside_functions(self) -> bool:
        """Whether no autograd function that may recompute this pass is running, for passes without gradients."""
        # A function takes a sequence number when it starts: until the next number, none can have started.
        here = (threading.get_ident(), sequence_number())
        if here != self._outside and not _functions():
            self._outside = here
        return here == self._outside


def _functions() -> list[_Region]:
    """Autograd functions whose forward is on the call stack; autograd runs that without gradients."""
    if torch.is_grad_enabled() or torch.is_inference_mode_enabled():
        return []
    return [_Region(context, None) for context in _contexts_on_stack()]


def _regions() -> list[_Region]:
    """Checkpointed regions around the pass that is about to begin, innermost first, without those of `_functions`."""
    regions = [region for pack in _pack_hooks() if (region := _region_of(pack)) is not None]
    node = current_node()
    if node is not None and hasattr(node, PASSES):
        regions.append(_Region(node, current_graph_task()))
    return regions


def _pack_hooks() -> list[Any]:
    """The pack functions of all hooks for saved tensors that are in force, innermost first."""
    stack = []
    try:
        while (hooks := top_saved_tensors_hooks(True)) is not None:
            stack.append(hooks)
            pop_saved_tensors_hooks()
    finally:
        for hooks in reversed(stack):
            push_saved_tensors_hooks(*hooks)
    return [pack for pack, _ in stack]


def _region_of(pack: Any) -> _Region | None:
    """The checkpoint that hooks for saved tensors belong to, if they do."""
    # The first run's hooks hold the frame, those of the recomputation a weak reference to it.
    for cell in getattr(pack, "_torchdynamo_orig_callable", pack).__closure__ or ():
        content = cell.cell_contents
        if isinstance(content, CheckpointFrame):
            return _Region(content, None)
        if isinstance(content, weakref.ref) and isinstance(content(), CheckpointFrame):
            return _Region(content(), pack)
    return None


def _contexts_on_stack() -> Iterator[Any]:
    """Contexts of the autograd functions whose `forward(ctx, ...)` is on the call stack, innermost first."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        # "self" is what the forward of modules begins with, and most frames are.
        if code.co_name == "forward" and code.co_argcount and code.co_varnames[0] != "self":
            context = frame.f_locals.get(code.co_varnames[0])
            if isinstance(context, torch.autograd.function.FunctionCtx):
                yield context
        frame = frame.f_back


def _find_replayed_state(regions: Sequence[_Region], adapter: int) -> Any:
    """What was in force at the pass that is recomputed now; None in a first run."""
    again = next((region for region in regions if region.run is not None), None)
    return None if again is None else _passes(again.owner).replay(adapter, again.run)


def _remember(regions: Sequence[_Region], adapter: int, state: Any) -> None:
    """Keep what is in force at a pass for the recomputations of all regions around it."""
    for region in regions:
        if region.run is None:
            _passes(region.owner).append(adapter, state)


def _passes(owner: Any) -> _Passes:
    found: _Passes | None = getattr(owner, PASSES, None)
    if found is None:
        found = _Passes()
        setattr(owner, PASSES, found)
    return found


@contextmanager
def replayed_random(state: Tensor | None, device: torch.device) -> Iterator[None]:
    """Draw dropout from this state of the random number generator, whatever a checkpoint does about it.

    Afterwards the generator continues from where it was, unless it was in this very state already.

    Args:
        state: Of the generator of `device`. None: draw from the generator as it is.
    """
    if state is None or torch.equal(now := _read_random_state(device), state):
        # A checkpoint that has put the state back itself: what is drawn after this pass continues from here.
        yield
        return
    _set_random_state(state, device)
    try:
        yield
    finally:
        _set_random_state(now, device)


def _read_random_state(device: torch.device) -> Tensor:
    found: Tensor = torch.get_rng_state() if device.type == "cpu" else _module(device).get_rng_state(device)
    return found


def _set_random_state(state: Tensor, device: torch.device) -> None:
    if device.type == "cpu":
        torch.set_rng_state(state)
    else:
        _module(device).set_rng_state(state, device)


def _module(device: torch.device) -> Any:
    return torch.get_device_module(device)


OPERATOR = "lycoris::values_of_pass"

# Defined by its schema: an operator of `torch.library.custom_op` takes twice as long to call.
torch.library.define(OPERATOR, "(Tensor[] values, Tensor adapter) -> Tensor[]")


def values_of_pass(values: list[Tensor], adapter: Tensor) -> list[Tensor]:
    """For compiled layers: the values (strength, dropout, mask) set now, or in a recomputation those set then.

    Raises `AttachError` where those had other shapes, which a compiled graph cannot take.
    """
    found: list[Tensor] = torch.ops.lycoris.values_of_pass(values, adapter)
    return found


@torch.library.impl(OPERATOR, "CompositeExplicitAutograd")
def _values_of_pass(values: list[Tensor], adapter: Tensor) -> list[Tensor]:
    regions, key = _regions() + _functions(), int(adapter)
    replayed = _find_replayed_state(regions, key)
    if replayed is not None and [value.shape for value in replayed] != [value.shape for value in values]:
        raise AttachError(
            "a rank mask was set or cleared, or one for another batch size set, between a checkpointed pass of a "
            "compiled layer and its recomputation; leave the mask (timesteps) in force until backward() is done"
        )
    current = values if replayed is None else replayed
    _remember(regions, key, current)
    return [value.clone() for value in current]


@torch.library.register_fake(OPERATOR)  # type: ignore[untyped-decorator]  # torch's own has no types
def _values_of_pass_shapes(values: list[Tensor], adapter: Tensor) -> list[Tensor]:
    return [torch.empty_like(value) for value in values]
