"""What trainers call on a network around a run: parameters for the optimizer, epochs and steps, max-norm."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from lycoris.compat.assignable import ReadOnlyList
from lycoris.compat.base_module import LycorisBaseModule
from lycoris.targeting.options import parse_optional


class TrainingHooks(nn.Module):
    """The methods of a network that trainers call around a run.

    `LycorisNetwork` derives from it. Arguments that trainers pass and that have no effect are ignored.
    """

    @property
    def loras(self) -> list[LycorisBaseModule]:
        """The modules, in the order of the models' layers.

        The list is read-only: changing it raises `ConfigError`.
        """
        return ReadOnlyList(child for child in self.children() if isinstance(child, LycorisBaseModule))

    def prepare_optimizer_params(self, lr: float | str | None = None) -> Any:
        """Return parameter groups for an optimizer, and make all parameters trainable.

        `lr` None leaves the learning rate to the optimizer.
        """
        self.requires_grad_(True)
        group: dict[str, Any] = {"params": list(self.parameters())}
        rate: float | None = parse_optional(lr, "lr", float)
        return [group if rate is None else group | {"lr": rate}]

    def enable_gradient_checkpointing(self) -> None:
        """Do nothing: the model's own gradient checkpointing covers its adapters."""

    def prepare_grad_etc(self, *_: Any) -> None:
        """Make all parameters trainable."""
        self.requires_grad_(True)

    def on_epoch_start(self, *_: Any) -> None:
        """Put the network in training mode, so that dropout is active."""
        self.train()

    def on_step_start(self, *_: Any) -> None:
        """Do nothing; trainers call it before every step."""

    def get_trainable_params(self, *_: Any) -> Iterator[nn.Parameter]:
        """Return the parameters, for gradient clipping."""
        return self.parameters()

    def apply_max_norm_regularization(self, max_norm_value: float, device: Any = None) -> tuple[int, float, float]:
        """Scale down every ΔW whose norm is above `max_norm_value`.

        Returns how many were above, and the mean and the largest norm afterwards. Algorithms without such a norm, such
        as (IA)³, are left out; without any other, the result is (0, 0.0, 0.0). `device` has no effect.
        """
        found = [module.apply_max_norm(max_norm_value, device) for module in self.loras]
        norms = [norm for _, norm in found if norm is not None]
        if not norms:
            return 0, 0.0, 0.0
        return sum(bool(above) for above, _ in found), sum(norms) / len(norms), max(norms)
