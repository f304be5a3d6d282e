"""Adapters in the checkpoints of transformers' `Trainer` and of trainers derived from it, such as TRL's."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerCallback

from lycoris.adapters.adapter_set import AdapterSet
from lycoris.adapters.load_report import some
from lycoris.errors import ConfigError
from lycoris.integrations.checkpoints import checkpoint_adapters
from lycoris.layers.sharding import is_sharded

logger = logging.getLogger("LyCORIS")


class AdapterCallback(TrainerCallback):  # type: ignore[misc]
    """Callback that makes checkpoints hold the adapters and not the base model.

        Trainer(model, args, callbacks=[AdapterCallback(adapters)])

    In effect from its construction until `checkpoints.remove()`, see
    `lycoris.integrations.checkpoints.checkpoint_adapters`: resuming and `load_best_model_at_end` restore the adapters
    exactly, `save_model` and `push_to_hub` write adapter files.

    Raises `ConfigError` for sets of one name or of several models and, when training begins, for adapters that are not
    on the trainer's model and for a model sharded by FSDP or DeepSpeed ZeRO-3.
    """

    def __init__(self, *adapters: AdapterSet, model: nn.Module | None = None) -> None:
        self.checkpoints = checkpoint_adapters(*adapters, model=model)
        root = self.checkpoints.model
        # Trainer accepts a model with quantized weights only if adapters are on it, which it reads off this flag.
        self._claimed = getattr(root, "is_quantized", False) and not getattr(root, "_hf_peft_config_loaded", False)
        if self._claimed:
            vars(root)["_hf_peft_config_loaded"] = True

    def on_init_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Reset the flag that got a quantized model past Trainer's check: these adapters are not PEFT's."""
        if self._claimed:
            vars(self.checkpoints.model).pop("_hf_peft_config_loaded", None)

    def on_train_begin(self, args: Any, state: Any, control: Any, *, model: nn.Module, **_: Any) -> None:
        """Check that what trains is what will be saved.

        Raises `ConfigError` otherwise. Parameters that train in addition to the adapters are logged as a warning.
        """
        own = self.checkpoints
        if all(each is not own.model for each in model.modules()):
            raise ConfigError(
                f"the adapters are on another {type(own.model).__name__} than the one being trained; pass the same "
                "object to both"
            )
        waiting = [name for name, each in own.sets.items() if not each.attached]
        if waiting:
            raise ConfigError(
                f"the adapters {', '.join(waiting)} are not attached and would not train; call attach() first"
            )
        own.check_complete()
        _check_unsharded(own.model)
        if besides := list(own.iterate_other_trainable()):
            logger.warning(
                "these parameters train in addition to the adapters; checkpoints contain them, adapter files do not: "
                "%s",
                some(besides),
            )

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Write adapter files into the checkpoint of a model that has no `save_pretrained` to do so.

        Only the process that saves does this. A missing checkpoint folder is a warning.
        """
        if args.should_save and not hasattr(self.checkpoints.model, "save_pretrained"):
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            if folder.is_dir():
                self.checkpoints.write(folder)
            else:
                logger.warning("no adapter file was written, since the folder %s does not exist", folder)

    def on_push_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Write adapter files into the folder that is uploaded, to which Trainer copies weights only."""
        if args.should_save:
            self.checkpoints.write(args.output_dir)


def _check_unsharded(model: nn.Module) -> None:
    for module in model.modules():
        managed = getattr(module, "_is_fsdp_managed_module", False)
        if managed or any(is_sharded(each) or hasattr(each, "ds_id") for each in module.parameters(recurse=False)):
            raise ConfigError(
                "this model is sharded by FSDP or DeepSpeed ZeRO-3, whose checkpoints Trainer writes without calling "
                "the model's state_dict: adapters would be missing. Train it with accelerate and "
                "accelerator.register_for_checkpointing(adapters), or unsharded (DDP, ZeRO 1 and 2)"
            )
