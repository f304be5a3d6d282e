"""SimpleTuner's config.json: which keys have a counterpart here, under which name, and which do not."""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

RENAMED_KEYS: Mapping[str, str] = {
    "checkpoint_step_interval": "checkpointing_steps",
    "validation_step_interval": "validation_steps",
    "optimizer_beta1": "adam_beta1",
    "optimizer_beta2": "adam_beta2",
    "validation_prompt": "validation_prompts",
}
"""SimpleTuner's key → the key here."""
EQUIVALENT_VALUES: Mapping[str, Mapping[str, str]] = {
    "optimizer": {"torch-adamw": "adamw", "adamw_bf16": "adamw"},
    "report_to": {"wandb": "tensorboard", "comet_ml": "tensorboard", "all": "tensorboard", "custom-tracker": "none"},
}
"""Key → SimpleTuner's value → the value used here."""
KEYS_WITHOUT_EFFECT: Mapping[str, str] = {
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
    "pictures are drawn at `resolution` with the validation_* settings that exist here": "validation_* "
    "user_prompt_library num_validation_images evaluation_type eval_* pretrained_evaluation_model_name_or_path "
    "validate_after_* enable_watermark",
    "all images in the folder are used": "disable_bucket_pruning allow_dataset_oversubscription",
}
"""Reason → keys, which may have wildcards, that do not change what is trained."""
UNSUPPORTED_KEYS: Mapping[str, str] = {
    "set instance_data_dir to the folder of images": "data_backend_config",
    "images are cropped to a square of `resolution` pixels": "aspect_bucket_* minimum_image_size maximum_image_size "
    "target_downsample_size resolution_type max_upscale_threshold *_nsfw_* nsfw_* delete_problematic_images "
    "delete_unwanted_images ignore_missing_files override_dataset_config data_backend_sampling caption_strategy "
    "*instance_prompt parquet_* audio_* conditioning_* tokenizer_max_length",
    "max_train_steps sets the length of training": "num_train_epochs checkpoint_epoch_interval strict_epoch_limit",
    "the base stays in float32": "base_model_precision text_encoder_*_precision quantize_activations "
    "quantization_config",
    "training runs in one process": "num_processes num_machines machine_rank main_process_* same_network fsdp_* "
    "deepspeed_config context_parallel_* accelerate_* seed_for_each_device",
    "only the adapter of a denoiser is trained": "train_text_encoder text_encoder_lr save_text_encoder controlnet* "
    "control refiner_training* distillation_* use_dora slider_lora_target assistant_lora_* disable_assistant_lora "
    "init_lora* init_lokr_norm singlora_* fuse_qkv_projections diffusion_blocks_config flux_lora_target",
    "the loss is the denoising loss of the base's own schedule": "snr_* use_soft_min_snr soft_min_snr_sigma_data "
    "loss_type huber_* masked_loss_probability flow_* noise_offset* offset_noise input_perturbation* timestep_bias_* "
    "*_scheduler_timestep_spacing disable_segmented_timestep_sampling prediction_type rescale_betas_zero_snr "
    "scheduled_sampling_* crepa_* urepa_* irepa_* layersync_* nextlat_* internal_guidance_* twinflow_* xm_* "
    "diff2flow_* mixflow_* tread_config sla_config t5_padding",
    "there is no moving average of the weights": "use_ema",
    "the only optimizer is AdamW with gradient norm clipping": "optimizer_config prodigy_steps grad_clip_method "
    "gradient_precision lr_end lr_scale* lr_num_cycles lr_power layer_freeze_strategy freeze_encoder_*",
    "a pipeline is one folder or repository": "model_flavour pretrained_*_model_name_or_path pretrained_*_subfolder "
    "revision variant *_text_encoder_model_name_or_path",
    "they are for other model families": "framerate ideogram_* cosmos3_* minimax_* ltx2_* hidream_* krea2_* "
    "max_grounding_entities data_aesthetic_score checkpointing_rolling_steps checkpoints_rolling_total_limit",
}
"""Reason → keys that would change what is trained, and are not supported."""
OFF_VALUES = (None, False, 0, "", "0", "0.0", "false", "none", "no_change", "[]", "{}")
"""Values, in lower case, with which such a key asks for nothing."""
NEUTRAL_VALUES: Mapping[str, tuple[Any, ...]] = {
    "loss_type": ("l2",),
    "num_processes": (1, "1"),
    "num_machines": (1, "1"),
    "grad_clip_method": ("norm",),
    "resolution_type": ("pixel",),
}
"""Key → values that describe what is done here anyway."""
MAX_SHOWN_KEYS = 4


@dataclass
class Translation:
    """The result of `translate_config`: the values to use, and what became of each key.

    A key is in one of `kept`, `mapped`, `ignored` and `unsupported`, or only in `values` when neither program knows it.
    """

    values: dict[str, Any] = field(default_factory=dict)
    """Values by the keys used here; keys that neither program knows are included."""
    kept: list[str] = field(default_factory=list)
    mapped: list[str] = field(default_factory=list)
    """One `key → key here` each."""
    ignored: dict[str, list[str]] = field(default_factory=dict)
    """Reason → keys."""
    unsupported: dict[str, list[str]] = field(default_factory=dict)
    """Reason → one `key = value` each."""

    def format_lines(self) -> list[str]:
        """Return a summary for the console: a line per group and reason, with at most `MAX_SHOWN_KEYS` keys each."""
        found = [f"used as they are: {len(self.kept)} keys"]
        if self.mapped:
            found.append(f"read as: {', '.join(self.mapped)}")
        if self.ignored:
            found.append(f"without effect here: {sum(map(len, self.ignored.values()))} keys")
            found += [f"  {_shorten_keys(keys)}: {why}" for why, keys in self.ignored.items()]
        if self.unsupported:
            found.append(f"not supported: {sum(map(len, self.unsupported.values()))} keys")
            found += [f"  {_shorten_keys(keys)}: {why}" for why, keys in self.unsupported.items()]
        return found


def translate_config(values: Mapping[str, Any], known: Mapping[str, bool]) -> Translation:
    """Translate a config with SimpleTuner's keys to the keys used here.

    Keys may carry the leading `--` of a command line; their values may then be text, and are parsed as on a command
    line. Keys that neither program knows are passed on unchanged, for `Settings.parse` to report.

    Args:
        known: Key used here → whether its value may be text.
    """
    found = Translation()
    for given, value in values.items():
        key = given.removeprefix("--")
        name = key if key in known else RENAMED_KEYS.get(key, key)
        if name in known:
            if given != key and not known[name]:
                value = _parse_text(value)
            _store_value(found, key, name, value, values)
        elif (why := _find_reason(key, UNSUPPORTED_KEYS)) is not None:
            if _is_off(key, value):
                found.ignored.setdefault("they are off, as they are here", []).append(key)
            else:
                found.unsupported.setdefault(why, []).append(f"{key} = {_shorten_json(value)}")
        elif (why := _find_reason(key, KEYS_WITHOUT_EFFECT)) is not None:
            found.ignored.setdefault(why, []).append(key)
        else:
            found.values[key] = value
    return found


def _store_value(found: Translation, key: str, name: str, value: Any, values: Mapping[str, Any]) -> None:
    if key != name and (name in values or f"--{name}" in values):
        found.unsupported.setdefault(f"the key here is {name}, which is given too; remove one of them", []).append(key)
        return
    if name == "validation_prompts" and key != name:
        value = [value] if isinstance(value, str) else value
    same = EQUIVALENT_VALUES.get(name, {}).get(value) if isinstance(value, str) else None
    if same is not None:
        found.mapped.append(f"{key} = {value} → {same}")
    elif key != name:
        found.mapped.append(f"{key} → {name}")
    else:
        found.kept.append(key)
    found.values[name] = value if same is None else same


def _find_reason(key: str, table: Mapping[str, str]) -> str | None:
    return next(
        (why for why, keys in table.items() if any(fnmatch.fnmatchcase(key, each) for each in keys.split())), None
    )


def _is_off(key: str, value: Any) -> bool:
    lowered = value.lower() if isinstance(value, str) else value
    return any(
        lowered is each or lowered == each
        for each in (*OFF_VALUES, *NEUTRAL_VALUES.get(key, ()))
        if _is_hashable(lowered)
    ) or lowered in ([], {})


def _is_hashable(value: Any) -> bool:
    return not isinstance(value, list | dict)


def _parse_text(value: Any) -> Any:
    """Parse text as a command line would: a number or a truth value where it is one."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value.lower() if value.lower() in ("true", "false") else value)
    except (ValueError, RecursionError):
        return value


def _shorten_json(value: Any) -> str:
    shown = json.dumps(value, ensure_ascii=False)
    return shown if len(shown) <= 40 else f"{shown[:37]}..."


def _shorten_keys(keys: Collection[str]) -> str:
    shown = list(keys)[:MAX_SHOWN_KEYS]
    return ", ".join(shown) + (f", ... ({len(keys)})" if len(keys) > MAX_SHOWN_KEYS else "")
