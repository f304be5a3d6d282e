"""Adapters in the checkpoints of transformers' `Trainer`, and of what derives from it, such as TRL's trainers."""

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
    """Makes checkpoints hold the adapters and not the base: `Trainer(model, args, callbacks=[AdapterCallback(set)])`.

    In force from its making until `checkpoints.remove()`, see `lycoris.integrations.checkpoints.checkpoint_adapters`:
    resuming and `load_best_model_at_end` put the adapters back exactly, `save_model` and `push_to_hub` write adapter
    files.

    Raises `ConfigError` for sets of one name or of several models and, when training begins, for adapters that are not
    on the trainer's model and for a model that FSDP or DeepSpeed ZeRO-3 shares out.
    """

    def __init__(self, *adapters: AdapterSet, model: nn.Module | None = None) -> None:
        self.checkpoints = checkpoint_adapters(*adapters, model=model)
        root = self.checkpoints.model
        # What Trainer asks before it takes a model with quantised weights: whether adapters are on it.
        self._claimed = getattr(root, "is_quantized", False) and not getattr(root, "_hf_peft_config_loaded", False)
        if self._claimed:
            vars(root)["_hf_peft_config_loaded"] = True

    def on_init_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Take back what got it past the check of quantised models: these adapters are none of PEFT's."""
        if self._claimed:
            vars(self.checkpoints.model).pop("_hf_peft_config_loaded", None)

    def on_train_begin(self, args: Any, state: Any, control: Any, *, model: nn.Module, **_: Any) -> None:
        """Check that what trains is what will be saved."""
        own = self.checkpoints
        if all(each is not own.model for each in model.modules()):
            raise ConfigError(
                f"the adapters are on another {type(own.model).__name__} than the one that is trained; give both the "
                "same object"
            )
        waiting = [name for name, each in own.sets.items() if not each.attached]
        if waiting:
            raise ConfigError(f"the adapters {', '.join(waiting)} are not attached, and would not train")
        own.check_complete()
        _check_shared(own.model)
        if besides := list(own.names_besides()):
            logger.warning(
                "besides the adapters these train; checkpoints hold them, adapter files do not: %s", some(besides)
            )

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Write adapter files into the checkpoint of a model that has no `save_pretrained` to do so."""
        if args.should_save and not hasattr(self.checkpoints.model, "save_pretrained"):
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            if folder.is_dir():
                self.checkpoints.write(folder)
            else:
                logger.warning("no adapter file was written: there is no %s", folder)

    def on_push_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Write adapter files into the folder that is uploaded, to which Trainer copies weights alone."""
        if args.should_save:
            self.checkpoints.write(args.output_dir)


def _check_shared(model: nn.Module) -> None:
    for module in model.modules():
        managed = getattr(module, "_is_fsdp_managed_module", False)
        if managed or any(is_sharded(each) or hasattr(each, "ds_id") for each in module.parameters(recurse=False)):
            raise ConfigError(
                "this model is shared out by FSDP or DeepSpeed ZeRO-3, whose checkpoints Trainer writes without asking "
                "the model: adapters would be missing. Train it with accelerate and "
                "accelerator.register_for_checkpointing(adapters), or unsharded (DDP, ZeRO 1 and 2)"
            )
