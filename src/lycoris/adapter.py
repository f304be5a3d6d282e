"""Adapter: an algorithm with its tensors for one layer, the only `nn.Module` of the library."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lycoris import sharding
from lycoris.algorithm import Affine, Algorithm, Base, Call, interpolate, one_mask
from lycoris.errors import AttachError
from lycoris.geometry import Geometry
from lycoris.recall import Recall, in_backward, may_be_recomputed


class Adapter(nn.Module):
    """An algorithm, its tensors for one layer, and what is in force for the next forward pass."""

    is_lycoris_adapter = True
    """See `lycoris.geometry.IS_ADAPTER`."""
    saved_with_model = False
    """Whether the model's state holds it; see `lycoris.checkpoints`."""

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
        self.set_call(1.0, None)
        self.merged = False
        """Whether it is part of the layer's weight."""
        self.attribute = ""
        """Name of the parameter that it adapts; "" for a layer."""
        self._dropping = torch.tensor(1.0)
        self._recall = Recall()
        shapes = self._shapes()
        for name, slot in algorithm.slots(geometry).items():
            own = torch.promote_types(dtype, torch.float32) if slot.role == "length" else dtype
            tensor = torch.empty(shapes[name], dtype=own, device=device)
            if slot.trainable:
                self.register_parameter(name, nn.Parameter(tensor))
            else:
                self.register_buffer(name, tensor)

    def tensors(self) -> dict[str, Tensor]:
        """By slot name, live."""
        found: dict[str, Tensor | None] = {**self._parameters, **self._buffers}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def kept(self) -> dict[str, Tensor]:
        """By slot name, what training changes: of a sharded model the shards, never FSDP's passing whole copies."""
        # A module's own state_dict, which the one below hides, is what makes FSDP put its shards back.
        return nn.Module.state_dict(self, keep_vars=True)

    def whole(self) -> dict[str, Tensor]:
        """By slot name, detached and gathered from the processes that share them, all of which have to call this."""
        shapes = self._shapes()
        return {name: sharding.whole(name, tensor, shapes[name]) for name, tensor in self.kept().items()}

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        g = self.geometry
        return {name: g.stacked(slot.shape) for name, slot in self.algorithm.slots(g).items()}

    def set_call(self, strength: float, keep: Tensor | None) -> None:
        """What is in force from now on."""
        self.call = Call(strength, keep)
        # A compiled graph takes the strength as a tensor, so that it serves every value.
        self._traced = Call(torch.tensor(strength, dtype=torch.float64), keep)

    @property
    def silent(self) -> bool:
        """Whether it lets passes through: merged, and no mask asks for a part of that to be taken away again."""
        return self.merged and self.call.keep is None

    def train(self, mode: bool = True) -> Adapter:
        """Training draws dropout, evaluation is deterministic."""
        # A tensor, so that a compiled graph serves both.
        self._dropping = torch.tensor(1.0 if mode else 0.0)
        super().train(mode)
        return self

    @torch.no_grad()
    def initialise(self, below: Base) -> None:
        """Draw new tensors; the layer's effect does not change."""
        if not self.geometry.stack:
            self.algorithm.initialise(self.tensors(), below)
            return
        weights = below.affine().weight
        for at, weight in enumerate(weights):
            one = Matrix(replace(self.geometry, stack=0), weight)
            self.algorithm.initialise({name: tensor[at] for name, tensor in self.tensors().items()}, one)

    @torch.no_grad()
    def fill(self, values: Mapping[str, Tensor]) -> None:
        """Copy tensors in by slot name; all of them, with the right shapes."""
        own = self.kept()
        if own.keys() != values.keys():
            raise AttachError(f"{self.algorithm.name} has the tensors {sorted(own)}; given were {sorted(values)}")
        for name, value in values.items():
            if own[name].shape != value.shape:
                raise AttachError(f"{name} has shape {tuple(own[name].shape)}; given was {tuple(value.shape)}")
            sharding.assign(own[name], value)

    def adapted(self, base: Affine, call: Call | None = None) -> Affine:
        """Weight and bias that this adapter makes of those below, at the strength in force; without dropout."""
        call = self.call if call is None else call
        keep = None if call.keep is None else one_mask(call.keep).to(base.weight)
        tensors = {name: tensor.to(base.weight) for name, tensor in self.tensors().items()}
        if self.geometry.stack:
            weight = torch.func.vmap(
                lambda p, w: self.algorithm.transform(p, Affine(w, None), replace(self.geometry, stack=0), keep).weight
            )(tensors, base.weight)
            whole = Affine(weight, None)
        else:
            whole = self.algorithm.transform(tensors, base, self.geometry, keep)
        return interpolate(base, whole, torch.as_tensor(call.strength, dtype=torch.float64).to(base.weight))

    def in_force(self, x: Tensor) -> Call:
        """What is in force for a pass over x; in the recomputation of a pass, what was in force then."""
        if torch.compiler.is_compiling():
            return self._traced
        if in_backward():
            # Not noted: of several passes before one backward, the first recomputed would hide the others.
            return self._recall.of(self.call, x)
        if may_be_recomputed():
            self._recall.note(self.call, x)
        return self.call

    def drawn(self, call: Call, x: Tensor) -> Call:
        """A call with this pass's random choices made; the same call in evaluation."""
        if not self.algorithm.drops or not (torch.compiler.is_compiling() or self.training):
            return call
        return self.algorithm.draw(replace(call, dropping=self._dropping), x)

    def forward(self, below: Base, x: Tensor) -> Tensor:
        if self.silent:
            return below(x)
        call = self.in_force(x)
        # Not after drawing: an adapter that was dropped still gives its parameters a gradient, of zero.
        if not torch.compiler.is_compiling() and call.strength == 0:
            return below(x)
        return self.algorithm.forward(self.tensors(), below, x, self.drawn(call, x))

    def extra_repr(self) -> str:
        return str(self.algorithm)

    # An adapter is not part of the layer's own state: base checkpoints load and save as if it were not there.
    def state_dict(self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        return {} if destination is None else destination

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        return


class Matrix:
    """A weight alone, as what lies below an adapter."""

    def __init__(self, geometry: Geometry, weight: Tensor) -> None:
        self.geometry, self.weight = geometry, weight

    def affine(self) -> Affine:
        return Affine(self.weight, None)

    def bias(self) -> Tensor | None:
        return None

    def plain(self, x: Tensor) -> Affine | None:
        return None

    def __call__(self, x: Tensor) -> Tensor:
        raise AttachError("a parameter has no output of its own; its module uses it")

    def run(self, x: Tensor, affine: Affine) -> Tensor:
        return self(x)
