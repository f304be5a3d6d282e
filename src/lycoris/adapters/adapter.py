"""Adapter: an algorithm with its tensors for one layer, the only `nn.Module` of the library."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lycoris.adapters.recomputation import PassHistory, PassState, values_of_pass
from lycoris.adapters.usage import Seen, is_exporting
from lycoris.algorithms.base import Algorithm, interpolate
from lycoris.algorithms.call import Call, require_one_mask
from lycoris.algorithms.layer_below import BareWeight, LayerBelow
from lycoris.errors import AttachError
from lycoris.layers import sharding
from lycoris.layers.batch_layout import BatchLayout
from lycoris.layers.geometry import Affine, Geometry


class SharedTensors:
    """The identity of adapters that share their tensors, such as the slices of one adapter.

    It has no attributes: adapters share their tensors exactly if their `group` is the same object.
    """


class Adapter(nn.Module):
    """An algorithm, its tensors for one layer, and what is in force for the next forward pass.

    Trained tensors are parameters and fixed ones buffers, by slot name. New ones are uninitialized memory: call
    `initialize` or `fill` before the first pass. `state_dict` is empty, so that base checkpoints stay as they are.

    Args:
        dtype: Of the tensors; a magnitude is kept in float32 at least.
    """

    is_lycoris_adapter = True
    """See `lycoris.layers.geometry.IS_ADAPTER`."""
    saved_with_model = False
    """Whether the model's state holds it; see `lycoris.integrations.checkpoints`."""

    def __init__(
        self,
        algorithm: Algorithm,
        geometry: Geometry,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.algorithm, self.geometry = algorithm, geometry
        self.call = Call()
        """What is in force from now on."""
        self._strength = torch.tensor(1.0, dtype=torch.float64)
        self.merged = False
        """Whether it is part of the layer's weight."""
        self._drops = algorithm.has_dropout
        self._state = PassState(self.call, False, False)
        self.attribute = ""
        """Name of the parameter that it adapts; "" for a layer."""
        self.path = ""
        """Of the layer, for messages; known once it is attached."""
        self.seen = Seen()
        self.group: SharedTensors | None = None
        """Of the adapters whose tensors these are too; None: no others."""
        self._dropping = torch.tensor(1.0)
        # A tensor, so that a graph compiled for one block serves the others.
        self._identity, self._history = torch.tensor(id(self)), PassHistory(id(self))
        shapes = self._shapes()
        for name, slot in algorithm.slots(geometry).items():
            own = torch.promote_types(dtype, torch.float32) if slot.role == "magnitude" else dtype
            tensor = torch.empty(shapes[name], dtype=own, device=device)
            if slot.trainable:
                self.register_parameter(name, nn.Parameter(tensor))
            else:
                self.register_buffer(name, tensor)

    @classmethod
    def sharing(cls, first: Adapter, algorithm: Algorithm, geometry: Geometry) -> Adapter:
        """Make an adapter whose tensors are those of another, the very same objects.

        Both are in one `group` afterwards, which `first` gets if it had none.

        Args:
            algorithm: One with the slots that the algorithm of `first` has.
        """
        made = cls(algorithm, geometry, device="meta")
        made.group = first.group = first.group or SharedTensors()
        for name, parameter in first._parameters.items():
            made._parameters[name] = parameter
        for name, buffer in first._buffers.items():
            made._buffers[name] = buffer
        return made

    def tensors(self) -> dict[str, Tensor]:
        """Return parameters and buffers by slot name.

        They are the adapter's own, not copies; of a model that FSDP sharded, what is in their place at the time.
        """
        found: dict[str, Tensor | None] = {**self._parameters, **self._buffers}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def trained_tensors(self) -> dict[str, Tensor]:
        """Return what training changes, by slot name, and the fixed tensors with it; not copies.

        Of a sharded model these are the shards (DTensors), never the whole copies that FSDP has during a pass.
        """
        # A module's own state_dict, which the one below hides, is what makes FSDP put its shards back.
        return nn.Module.state_dict(self, keep_vars=True)

    def whole(self) -> dict[str, Tensor]:
        """Return every tensor by slot name, detached and gathered from the processes that share it.

        Collective on a sharded model: every process has to call it. Elsewhere the tensors share memory with the
        adapter.

        Raises:
            AttachError: DeepSpeed ZeRO-3 or FSDP1 holds a part of a tensor; gather with their own means first.
        """
        shapes = self._shapes()
        return {name: sharding.gather(name, tensor, shapes[name]) for name, tensor in self.trained_tensors().items()}

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        g = self.geometry
        return {name: g.stacked_shape(slot.shape) for name, slot in self.algorithm.slots(g).items()}

    def set_call(self, strength: float, keep: Tensor | None, layout: BatchLayout | None = None) -> None:
        """Set strength and rank mask for the passes from now on.

        Args:
            keep: The mask, (1, r) for all samples or (B, r) for one each, of this adapter's rank. None: all ranks act.
            layout: Where the samples of a batch are in the input. None: not said; only masks of several rows need it.
        """
        if strength == self.call.strength and keep is self.call.rank_mask and layout is self.call.layout:
            return
        self.call = Call(strength, keep, layout)
        # A compiled graph takes the strength as a tensor, so that it serves every value.
        self._strength = torch.tensor(strength, dtype=torch.float64)

    def train(self, mode: bool = True) -> Adapter:
        """Set training mode, which draws dropout, or evaluation, which is deterministic; return self.

        Graphs that `torch.compile` has made follow the change without being compiled again.
        """
        # A tensor, so that a compiled graph serves both.
        self._dropping = torch.tensor(1.0 if mode else 0.0)
        super().train(mode)
        return self

    @torch.no_grad()
    def initialize(self, below: LayerBelow) -> None:
        """Draw new tensors in place, such that the layer's output stays as it is.

        Random values come from torch's global random number generator; of a stack each matrix gets its own.

        Args:
            below: The layer with the adapters that are under this one; data-dependent algorithms read its weight.
        """
        if not self.geometry.stack:
            self.algorithm.initialize(self.tensors(), below)
            return
        weights = below.affine().weight
        for at, weight in enumerate(weights):
            one = BareWeight(replace(self.geometry, stack=0), weight)
            self.algorithm.initialize({name: tensor[at] for name, tensor in self.tensors().items()}, one)

    @torch.no_grad()
    def fill(self, values: Mapping[str, Tensor]) -> None:
        """Copy tensors in by slot name, cast to the adapter's precision and device.

        Collective on a sharded model, where the first process's values count.

        Raises:
            AttachError: The names are not those of this adapter's slots, and nothing was copied; or a shape differs,
                and slots before that one have their new values.
        """
        own = self.trained_tensors()
        if own.keys() != values.keys():
            raise AttachError(f"{self.algorithm.name} has the tensors {sorted(own)}; given were {sorted(values)}")
        for name, value in values.items():
            if own[name].shape != value.shape:
                raise AttachError(f"{name} has shape {tuple(own[name].shape)}; given was {tuple(value.shape)}")
            sharding.assign(own[name], value)

    def adapt_affine(self, base: Affine, call: Call | None = None) -> Affine:
        """Return the weight and bias that this adapter makes of those below: W + s·(V - W), without dropout.

        Computed in the precision of `base.weight`, which stays as it is.

        Args:
            call: Strength s and rank mask to use. None: those in force.

        Raises:
            PlanError: The rank mask has several rows: one weight cannot follow them all.
        """
        call = self.call if call is None else call
        keep = None if call.rank_mask is None else require_one_mask(call.rank_mask).to(base.weight)
        tensors = {name: tensor.to(base.weight) for name, tensor in self.tensors().items()}
        if self.geometry.stack:
            weight = torch.func.vmap(
                lambda p, w: self.algorithm.transform(p, Affine(w, None), replace(self.geometry, stack=0), keep).weight
            )(tensors, base.weight)
            whole = Affine(weight, None)
        else:
            whole = self.algorithm.transform(tensors, base, self.geometry, keep)
        return interpolate(base, whole, torch.as_tensor(call.strength, dtype=torch.float64).to(base.weight))

    @property
    def state(self) -> PassState:
        """What is in force for a pass that begins now and is no recomputation.

        The same object as long as nothing changes.
        """
        last, draws = self._state, self.training and self._drops
        if last.call is not self.call or last.draws is not draws or last.merged is not self.merged:
            self._state = last = PassState(self.call, draws, self.merged)
        return last

    def state_of_pass(self, x: Tensor) -> PassState:
        """Return what is in force for a pass over x; in the recomputation of a pass, what was in force then.

        Call it once for each pass: under gradient checkpointing passes are distinguished by their order.

        Raises:
            AttachError: See `PassHistory.state_of_pass`.
        """
        if torch.compiler.is_compiling():
            return self._compiled_state()
        return self._history.state_of_pass(self.state, x)

    def _compiled_state(self) -> PassState:
        # Nothing here may depend on whether the layer trains: a graph serves both.
        keep, draws = self.call.rank_mask, self._drops
        if self.merged and keep is None:
            return PassState(self.call, False, self.merged)
        values = [self._strength, self._dropping, *(() if keep is None else (keep,))]
        strength, dropping, *mask = values_of_pass(values, self._identity)
        call = Call(strength, mask[0] if mask else None, self.call.layout, dropping if draws else None)
        return PassState(call, draws, self.merged)

    def draw_call(self, state: PassState, x: Tensor) -> Call:
        """Return the call of a pass with its random choices made; in evaluation the same call.

        They are drawn on the device of `x`. A call without a `dropout_scale` draws at the full probabilities.
        """
        if not state.draws:
            return state.call
        call = state.call
        return self.algorithm.sample_dropout(
            call if call.dropout_scale is not None else replace(call, dropout_scale=torch.ones(())), x
        )

    def forward(self, below: LayerBelow, x: Tensor, state: PassState) -> Tensor:
        if not is_exporting():
            self.seen.called = True
        if state.silent:
            return below(x)
        # Not after drawing: an adapter that was dropped still gives its parameters a gradient, of zero.
        if not torch.compiler.is_compiling() and state.call.strength == 0:
            return below(x)
        if torch.is_grad_enabled() and not is_exporting():
            self.seen.trained = True
        return self.algorithm.forward(self.tensors(), below, x, self.draw_call(state, x))

    def extra_repr(self) -> str:
        return str(self.algorithm)

    # An adapter is not part of the layer's own state: base checkpoints load and save as if it were not there.
    def state_dict(self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        return {} if destination is None else destination

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        return
