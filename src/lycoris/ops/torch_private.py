"""Every function and class of torch that this library uses and that torch does not document, and why.

Nothing else in the library touches a private name of torch; `tests/test_torch_private.py` names and tries them all.
"""

from __future__ import annotations

import torch
from torch.utils.checkpoint import _CheckpointFrame

CheckpointFrame = _CheckpointFrame
"""The object of a region under `checkpoint(use_reentrant=False)`; hooks for saved tensors refer to it."""

top_saved_tensors_hooks = torch._C._autograd._top_saved_tensors_default_hooks
pop_saved_tensors_hooks = torch._C._autograd._pop_saved_tensors_default_hooks
push_saved_tensors_hooks = torch._C._autograd._push_saved_tensors_default_hooks
"""The three read which hooks for saved tensors are in force, and so which checkpointed regions a pass is in."""

sequence_number = torch._C._autograd._get_sequence_nr
"""Counts the autograd functions that this thread has started: cheaper than a walk up the call stack."""

current_node = torch._C._current_autograd_node
"""The node that autograd executes now, or None: the function that recomputes a pass, or an outer backward pass."""

current_graph_task = torch._C._current_graph_task_id
"""Number of the backward pass under way; -1 outside of one."""

queue_callback = torch.autograd.Variable._execution_engine.queue_callback
"""Calls a function at the end of the backward pass under way. DDP and FSDP use it, too."""

DisableTorchFunction = torch._C.DisableTorchFunctionSubclass
"""Within it, functions of torch take a subclass of Tensor for the tensor that it is."""

unsafe_view = torch.ops.aten._unsafe_view
"""A reshape that is no view, so that work in place on the result keeps what hangs on it."""


def has_bfloat16_on_cpu() -> bool:
    """Return whether products in bfloat16 are fast on this processor.

    False for builds of torch without oneDNN, which have no such operator.
    """
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return supported is not None and bool(supported())
