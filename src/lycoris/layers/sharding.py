"""Adapters on a model that several processes share: gathering their tensors, filling them, and what has to come first.

FSDP2 keeps parameters as DTensors and swaps whole ones in while a forward or backward pass needs them. Everything
below that reads or writes a sharded tensor is collective: every process has to call it.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lycoris.errors import AttachError

ATTACH_FIRST = "attach the adapters first, then wrap the model, so that their gradients are shared too"


def is_sharded(tensor: Tensor) -> bool:
    """Return whether a tensor is a DTensor.

    Recognized by its method `full_tensor`: importing the class takes a second that most never need.
    """
    return hasattr(tensor, "full_tensor")


def gather(what: str, tensor: Any, shape: tuple[int, ...]) -> Tensor:
    """The whole of a tensor, on every process. Collective for DTensors.

    Raises `AttachError` for a tensor of another shape: DeepSpeed ZeRO-3 and FSDP1 leave a piece or nothing in its
    place, and only they can gather it.
    """
    found: Tensor = tensor.full_tensor() if is_sharded(tensor) else tensor
    if found.shape != shape:
        raise AttachError(
            f"{what} should be {tuple(shape)} and is {tuple(found.shape)}: another library holds the rest of it. "
            "Gather on every process first, with deepspeed.zero.GatheredParameters(list(adapters.parameters())) or "
            "FullyShardedDataParallel.summon_full_params(model), and do this inside"
        )
    return found.detach()


def assign(own: Any, value: Tensor) -> None:
    """Copy a whole tensor into one that may be sharded, which is changed in place.

    Collective for DTensors, where the value of the first process counts. Call it under `torch.no_grad()` if the tensor
    trains.

    Args:
        own: the tensor to fill, whose device and dtype it keeps.
        value: the whole tensor, on any device.
    """
    if is_sharded(own):
        from torch.distributed.tensor import distribute_tensor

        value = distribute_tensor(value.to(own.device, own.dtype), own.device_mesh, own.placements)
    own.copy_(value)


def check_unwrapped(model: nn.Module) -> None:
    """Check that a model is no DDP wrapper, which would not know of the adapters.

    Raises:
        AttachError: it is a `DistributedDataParallel`. Other wrappers pass.
    """
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise AttachError(
            f"this is a DistributedDataParallel wrapper; {ATTACH_FIRST}: build on its .module, then wrap again"
        )


def check_shared(layer: nn.Module, adapter: nn.Module) -> None:
    """Check that a layer was not sharded before this adapter was there.

    The adapter's copies on the processes would go apart unnoticed.

    Raises:
        AttachError: the layer is sharded and the adapter is not.
    """
    if _is_managed(layer) and not _is_managed(adapter):
        raise AttachError(f"the parameters of this {type(layer).__name__} are sharded already; {ATTACH_FIRST}")


def check_own(path: str, layer: nn.Module) -> None:
    """Check that a layer's weight is not in the hands of FSDP, which would undo a change to it.

    Args:
        path: the layer's path, for the error.

    Raises:
        AttachError: the layer is sharded.
    """
    if _is_managed(layer):
        raise AttachError(
            f"the parameters of {path} are sharded, and a merge replaces them; merge before the model is sharded, or "
            "write the adapters and merge them into an unsharded model"
        )


def check_readable(layer: nn.Module, weight: Tensor) -> None:
    """Check that this process has the whole of a weight.

    Raises:
        AttachError: it has a part, as a DTensor, or nothing, as DeepSpeed ZeRO-3 leaves it outside a forward pass.
    """
    if is_sharded(weight) or weight.numel() == 0:
        raise AttachError(
            f"the weight of this {type(layer).__name__} is sharded, and whole only inside the forward pass; do what "
            "needs it (the start of DoRA and T-LoRA, a merge) before the model is sharded, or under DeepSpeed ZeRO-3 "
            "inside deepspeed.zero.GatheredParameters(list(model.parameters()))"
        )


def _is_managed(module: nn.Module) -> bool:
    # The mark of both FSDPs: after a forward pass without backward the outermost parameters stay whole for a while.
    marked = bool(getattr(module, "_is_fsdp_managed_module", False))
    return marked or any(is_sharded(parameter) for parameter in module.parameters())
