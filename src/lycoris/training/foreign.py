"""A config.json of SimpleTuner's: which of its keys mean something here, under which name, and which do not."""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

RENAMED: Mapping[str, str] = {
    "checkpoint_step_interval": "checkpointing_steps",
    "validation_step_interval": "validation_steps",
    "optimizer_beta1": "adam_beta1",
    "optimizer_beta2": "adam_beta2",
    "validation_prompt": "validation_prompts",
}
"""SimpleTuner's key → the one here."""
SAME: Mapping[str, Mapping[str, str]] = {
    "optimizer": {"torch-adamw": "adamw", "adamw_bf16": "adamw"},
    "report_to": {"wandb": "tensorboard", "comet_ml": "tensorboard", "all": "tensorboard", "custom-tracker": "none"},
}
"""Key → value of SimpleTuner's → what stands for it here."""
NO_EFFECT: Mapping[str, str] = {
    "nothing is uploaded or announced": "hub_model_id push_* model_card_* publishing_config webhook_* post_*_script "
    "modelspec_comment",
    "losses go to TensorBoard in output_dir": "tracker_* custom_tracker logging_dir",
    "memory and speed only": "vae_batch_size vae_enable_* vae_cache_* vae_dtype quantize_via offload_* "
    "compress_disk_cache text_cache_* text_embed_full_cache text_encoder_batch_size dataloader_* attention_mechanism "
    "sageattention_usage dynamo_* ramtorch* musubi_* group_offload_* enable_group_offload gradient_checkpointing_* "
    "disable_benchmark sdnq_* torch_num_threads read_batch_size write_batch_size image_processing_batch_size "
    "max_workers aws_max_pool_connections cache_dir* aspect_bucket_worker_count metadata_update_interval "
    "keep_vae_loaded fully_unload_text_encoder delete_model_after_load disable_tf32 set_grads_to_none "
    "accelerator_cache_clear_interval enable_multiprocessing unet_attention_slice fuse_optimizer "
    "optimizer_cpu_offload_method optimizer_offload_gradients optimizer_release_gradients skip_file_discovery "
    "preserve_data_backend_cache print_* debug_* ddp_* find_unused_parameters trust_remote_code "
    "base_model_default_dtype delete_invalid_checkpoints disk_low_* checkpointing_use_tempdir "
    "i_know_what_i_am_doing merge_environment_config configs_dir local_rank ema_* ",
    "the sizes are those in lycoris_config": "lora_rank lora_alpha lora_dropout lora_format lora_init_type peft_lora_*",
    "pictures are drawn at `resolution` and by the validation_* settings that are here": "validation_* "
    "user_prompt_library num_validation_images evaluation_type eval_* pretrained_evaluation_model_name_or_path "
    "validate_after_* enable_watermark",
    "it starts from the images that are there": "disable_bucket_pruning allow_dataset_oversubscription",
}
"""Why → keys, which may have wildcards, that change nothing that is trained."""
UNSUPPORTED: Mapping[str, str] = {
    "name the folder of images as instance_data_dir": "data_backend_config",
    "images are cropped to a square of `resolution` pixels": "aspect_bucket_* minimum_image_size maximum_image_size "
    "target_downsample_size resolution_type max_upscale_threshold *_nsfw_* nsfw_* delete_problematic_images "
    "delete_unwanted_images ignore_missing_files override_dataset_config data_backend_sampling caption_strategy "
    "*instance_prompt parquet_* audio_* conditioning_* tokenizer_max_length",
    "max_train_steps says how long training takes": "num_train_epochs checkpoint_epoch_interval strict_epoch_limit",
    "the base stays in float32": "base_model_precision text_encoder_*_precision quantize_activations "
    "quantization_config",
    "it is one process here": "num_processes num_machines machine_rank main_process_* same_network fsdp_* "
    "deepspeed_config context_parallel_* accelerate_* seed_for_each_device",
    "only the adapter of a denoiser is trained": "train_text_encoder text_encoder_lr save_text_encoder controlnet* "
    "control refiner_training* distillation_* use_dora slider_lora_target assistant_lora_* disable_assistant_lora "
    "init_lora* init_lokr_norm singlora_* fuse_qkv_projections diffusion_blocks_config flux_lora_target",
    "the loss is the denoising loss of the base's own schedule": "snr_* use_soft_min_snr soft_min_snr_sigma_data "
    "loss_type huber_* masked_loss_probability flow_* noise_offset* offset_noise input_perturbation* timestep_bias_* "
    "*_scheduler_timestep_spacing disable_segmented_timestep_sampling prediction_type rescale_betas_zero_snr "
    "scheduled_sampling_* crepa_* urepa_* irepa_* layersync_* nextlat_* internal_guidance_* twinflow_* xm_* "
    "diff2flow_* mixflow_* tread_config sla_config t5_padding",
    "the average of the weights is not kept": "use_ema",
    "AdamW with a clipped norm is all there is": "optimizer_config prodigy_steps grad_clip_method gradient_precision "
    "lr_end lr_scale* lr_num_cycles lr_power layer_freeze_strategy freeze_encoder_*",
    "a pipeline is one folder or repository": "model_flavour pretrained_*_model_name_or_path pretrained_*_subfolder "
    "revision variant *_text_encoder_model_name_or_path",
    "it is for other families of models": "framerate ideogram_* cosmos3_* minimax_* ltx2_* hidream_* krea2_* "
    "max_grounding_entities data_aesthetic_score checkpointing_rolling_steps checkpoints_rolling_total_limit",
}
"""Why → keys that would change what is trained, and do not."""
OFF = (None, False, 0, "", "0", "0.0", "false", "none", "no_change", "[]", "{}")
"""Values, in small letters, with which such a key asks for nothing."""
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "loss_type": ("l2",),
    "num_processes": (1, "1"),
    "num_machines": (1, "1"),
    "grad_clip_method": ("norm",),
    "resolution_type": ("pixel",),
}
"""Key → values that say what is done anyway."""
SHOWN = 4


@dataclass
class Translation:
    """What became of the keys of a config."""

    values: dict[str, Any] = field(default_factory=dict)
    """By the names that are known here, and whatever nothing is known of."""
    kept: list[str] = field(default_factory=list)
    mapped: list[str] = field(default_factory=list)
    """`key → key here`, one each."""
    ignored: dict[str, list[str]] = field(default_factory=dict)
    """Why → keys."""
    unsupported: dict[str, list[str]] = field(default_factory=dict)
    """Why → `key = value`, one each."""

    def lines(self) -> list[str]:
        """One screen: a line for each group, and one for each reason."""
        found = [f"kept: {len(self.kept)} keys"]
        if self.mapped:
            found.append(f"read as: {', '.join(self.mapped)}")
        if self.ignored:
            found.append(f"without effect here: {sum(map(len, self.ignored.values()))} keys")
            found += [f"  {_some(keys)}: {why}" for why, keys in self.ignored.items()]
        if self.unsupported:
            found.append(f"not supported: {sum(map(len, self.unsupported.values()))} keys")
            found += [f"  {_some(keys)}: {why}" for why, keys in self.unsupported.items()]
        return found


def translate(values: Mapping[str, Any], known: Mapping[str, bool]) -> Translation:
    """A config with SimpleTuner's keys by the names here; `known` are those, and whether each takes text.

    Keys may carry the leading `--` of a command line; their values may then be text, as on one.
    """
    found = Translation()
    for given, value in values.items():
        key = given.removeprefix("--")
        name = key if key in known else RENAMED.get(key, key)
        if name in known:
            if given != key and not known[name]:
                value = _parse_text(value)
            _keep(found, key, name, value, values)
        elif (why := _reason(key, UNSUPPORTED)) is not None:
            if _is_off(key, value):
                found.ignored.setdefault("they are off, as here", []).append(key)
            else:
                found.unsupported.setdefault(why, []).append(f"{key} = {_short(value)}")
        elif (why := _reason(key, NO_EFFECT)) is not None:
            found.ignored.setdefault(why, []).append(key)
        else:
            found.values[key] = value
    return found


def _keep(found: Translation, key: str, name: str, value: Any, values: Mapping[str, Any]) -> None:
    if key != name and (name in values or f"--{name}" in values):
        found.unsupported.setdefault(f"it is {name} here, which is given too: leave one out", []).append(key)
        return
    if name == "validation_prompts" and key != name:
        value = [value] if isinstance(value, str) else value
    same = SAME.get(name, {}).get(value) if isinstance(value, str) else None
    if same is not None:
        found.mapped.append(f"{key} = {value} → {same}")
    elif key != name:
        found.mapped.append(f"{key} → {name}")
    else:
        found.kept.append(key)
    found.values[name] = value if same is None else same


def _reason(key: str, table: Mapping[str, str]) -> str | None:
    return next(
        (why for why, keys in table.items() if any(fnmatch.fnmatchcase(key, each) for each in keys.split())), None
    )


def _is_off(key: str, value: Any) -> bool:
    plain = value.lower() if isinstance(value, str) else value
    return any(
        plain is each or plain == each for each in (*OFF, *NEUTRAL.get(key, ())) if _hashable(plain)
    ) or plain in ([], {})


def _hashable(value: Any) -> bool:
    return not isinstance(value, list | dict)


def _parse_text(value: Any) -> Any:
    """Text as a command line would read it: a number or a truth value where it is one."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value.lower() if value.lower() in ("true", "false") else value)
    except (ValueError, RecursionError):
        return value


def _short(value: Any) -> str:
    shown = json.dumps(value, ensure_ascii=False)
    return shown if len(shown) <= 40 else f"{shown[:37]}..."


def _some(keys: Collection[str]) -> str:
    shown = list(keys)[:SHOWN]
    return ", ".join(shown) + (f", ... ({len(keys)})" if len(keys) > SHOWN else "")
