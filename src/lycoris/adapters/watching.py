"""What happens to adapters once they are attached: which are called, and which get a gradient.

An adapter only sets flags. Hooks on the parameters wait for the first backward pass that reaches any of them, one on
the model for passes that reach none; all go at the end of that backward pass, when what is amiss is said once.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lycoris.adapters.adapter import Adapter
from lycoris.adapters.usage import Seen
from lycoris.ops.torch_private import current_node, queue_callback

PATHS_SHOWN = 10
READ = (
    "A layer whose weight is read by other code instead of the layer being called (tied and fused projections, custom "
    "heads) leaves its adapter idle, and a merge would change what the model does"
)


class Watch:
    """A check of adapters at the end of their first backward pass; what it finds comes as one warning.

    Making one puts hooks on the model and on the trained parameters, tells every adapter its path and clears its flags.
    The hooks go at the end of that backward pass, or with `stop`.
    """

    def __init__(self, model: nn.Module, stacks: Mapping[str, Sequence[Adapter]]) -> None:
        self._stacks = stacks
        self._handles: list[Any] = [model.register_forward_hook(_FirstPassHook(stacks))]
        for path, stack in stacks.items():
            for adapter in stack:
                adapter.path, adapter.seen = path, Seen()
                self._wait_for(adapter)

    def _wait_for(self, adapter: Adapter) -> None:
        def note(_: Tensor) -> None:
            adapter.seen.reached = True
            if not self._ending:
                self._ending = True
                _at_end_of_backward(self._end)

        trained = [parameter for parameter in adapter.parameters() if parameter.requires_grad and parameter.is_leaf]
        self._handles += [parameter.register_post_accumulate_grad_hook(note) for parameter in trained]  # type: ignore[no-untyped-call]

    _ending = False

    def __getstate__(self) -> dict[str, Any]:
        # Hooks on parameters stay behind when a model is copied or pickled.
        return {**self.__dict__, "_handles": []}

    def stop(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _end(self) -> None:
        if self._handles:
            self.stop()
            warn_of_idle(self._stacks)


class _FirstPassHook:
    """Notes that the model was called, and warns when that reached none of its adapters. A class, to be pickled."""

    def __init__(self, stacks: Mapping[str, Sequence[Adapter]]) -> None:
        self._stacks, self._noted = stacks, False

    def __call__(self, model: nn.Module, *_: Any) -> None:
        if torch.compiler.is_compiling() or self._noted:
            return
        self._noted = True
        every = [adapter for stack in self._stacks.values() for adapter in stack]
        for adapter in every:
            adapter.seen.ran = True
        if every and not any(adapter.seen.called for adapter in every):
            warnings.warn(
                f"a pass through {type(model).__name__} called none of its {len(self._stacks)} adapted layers: "
                f"{list_some_paths(self._stacks)}. {READ}. lycoris.verify checks each",
                stacklevel=2,
            )


def never_called(stacks: Mapping[str, Sequence[Adapter]]) -> tuple[str, ...]:
    """Return the paths of layers whose adapters no pass has reached.

    () as long as the model has not run, as far as is known: then nothing says that they are idle.
    """
    idle = tuple(path for path, stack in stacks.items() if not any(adapter.seen.called for adapter in stack))
    ran = len(idle) < len(stacks) or any(adapter.seen.ran for stack in stacks.values() for adapter in stack)
    return idle if ran else ()


def without_gradient(stacks: Mapping[str, Sequence[Adapter]]) -> tuple[str, ...]:
    """Return the paths of layers with an adapter that took part in a pass with gradients, and has got none.

    Adapters without trained parameters, and those whose parameters have a `grad` from elsewhere, do not count.
    """
    return tuple(path for path, stack in stacks.items() if any(map(_is_missed, stack)))


def without_derivative(stacks: Mapping[str, Sequence[Adapter]]) -> tuple[str, ...]:
    """Return the paths of layers that were seen to give an output without a gradient for an input with one.

    So do layers of other libraries whose low-bit operation has no backward.
    """
    return tuple(path for path, stack in stacks.items() if any(adapter.seen.cut for adapter in stack))


def warn_of_idle(stacks: Mapping[str, Sequence[Adapter]]) -> None:
    """Warn of adapters that a first training step did not reach, or whose parameters got no gradient.

    One warning for both; none where there are no such adapters.
    """
    idle, missed = never_called(stacks), without_gradient(stacks)
    said = []
    if idle:
        said.append(
            f"{len(idle)} of {len(stacks)} adapted layers have not been called so far: {list_some_paths(idle)}. {READ}."
        )
    if missed:
        said.append(
            f"{len(missed)} of {len(stacks)} adapted layers were called and got no gradient so far: "
            f"{list_some_paths(missed)}. "
            "Something between them and the loss has no derivative, or their output is not used."
        )
    if said:
        said.append("Right for parts that a pass may skip (experts, blocks, encoders); lycoris.verify checks each.")
        warnings.warn("after the first backward pass, " + " ".join(said), stacklevel=2)


def list_some_paths(paths: Iterable[str]) -> str:
    """Return the first few of many paths as one text, with how many more there are.

    At most `PATHS_SHOWN`, in the order given.
    """
    every = list(paths)
    more = f" and {len(every) - PATHS_SHOWN} more" if len(every) > PATHS_SHOWN else ""
    return ", ".join(every[:PATHS_SHOWN]) + more


def _is_missed(adapter: Adapter) -> bool:
    trained = [parameter for parameter in adapter.parameters() if parameter.requires_grad]
    waited = adapter.seen.trained and bool(trained) and not adapter.seen.reached
    return waited and all(parameter.grad is None for parameter in trained)


def _at_end_of_backward(call: Callable[[], None]) -> None:
    """Call something when the backward pass under way has ended: the outermost, where checkpointing nests them."""

    def end_pass() -> None:
        node = current_node()
        if node is None:
            call()
        else:
            # The end of a nested pass: the node of the outer one that ran it is still at work.
            node.register_hook(again)

    def again(*_: Any) -> None:
        queue_callback(end_pass)

    again()
