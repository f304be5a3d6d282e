"""What is in files beside adapters, or in place of them, by the names of its tensors."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from lycoris.adapters.load_report import some

LONGEST = 500
"""Characters of a name that is looked at."""
Shapes = Mapping[str, tuple[int, ...]]

ADAPTER = re.compile(
    r"lora|hada_|lokr_|oft_|glora|(^|[._])(dora_scale|magnitude|alpha|diff(_b|_m|_param)?|set_(weight|param))$|"
    r"reshape_weight|\b[wb]_norm$|\bon_input$|\b[ab][12m]\.weight$|\b[qp]_layer\b|\b(lambda_layer|rescale|ia3_l)\b|"
    r"\bbias_(indices|values|size)$|\bbase_([qp]\.weight|lambda)$"
)
"""Part of the names of an adapter's tensors, and hardly of others."""
EMBEDDING = re.compile(
    r"bundle_emb\..+|(.+\.)?(emb_params|string_to_param\.\*|string_to_token\.\*)|text_encoders_\d+|<[^<>]+>|"
    r"clip_[lgh](_out)?|t5(xxl)?(_out)?"
)
"""Textual inversions: the vectors of new words, alone or bundled with an adapter."""
ASIDE: Sequence[tuple[re.Pattern[str], str]] = (
    (EMBEDDING, "embeddings of new words (textual inversions)"),
    (re.compile(r"(.+\.)?(position_ids|num_batches_tracked|logit_scale|inv_freq)"), "buffers of the model"),
    (re.compile(r"(vae|first_stage_model|image_encoder|feature_extractor|controlnet)\..+"), "weights of another model"),
    (re.compile(r"(optimizer|lr_scheduler|ema|state|scheduler|global_step|epoch|step)(\..+)?"), "state of a trainer"),
)
"""Tensors beside adapters that are none, by their whole names."""


class Kind(NamedTuple):
    """What a file is that has no adapters as they are read here."""

    marks: re.Pattern[str]
    """Names of which one is enough."""
    what: str
    todo: str
    readable: bool = False
    """Whether layers of it may be read for the model that it is for."""


_KEEP = "load it with the program that it is of"
_AGAIN = "save it from that program as a diffusers or kohya file"
KINDS: Sequence[Kind] = (
    Kind(
        re.compile(r"(unet|text_encoder(_\d)?):\d+:(up|down)"),
        "a LoRA of cloneofsimo's lora, whose layers have only numbers",
        _AGAIN,
    ),
    Kind(
        re.compile(r"(.+\.)?lora_[ab]"),
        "an MLX LoRA: lora_a (I, r) and lora_b (r, O)",
        "transpose each of them and save them as lora_A.weight and lora_B.weight, the scale times the latter",
    ),
    Kind(re.compile(r"w_[ab]_\d+"), "a LoRA for Segment Anything (SAM), whose layers have only numbers", _KEEP),
    Kind(
        re.compile(r".+\.(qkv_proj(_context)?|out_proj(_context)?|mlp_(context_)?fc[12])\.lora_(down|up)"),
        "a LoRA that was packed for Nunchaku's quantized models",
        "convert the LoRA that it was made from",
    ),
    Kind(re.compile(r"(image_proj|ip_adapter)\..+"), "an IP-Adapter, which adds attention layers", _KEEP),
    Kind(re.compile(r"\d+\.\d+\.linear\.\d+\.(weight|bias)"), "a hypernetwork of WebUI's", _KEEP),
    Kind(re.compile(r"lllite_.+"), "a ControlNet-LLLite, which adds layers", _KEEP),
    Kind(re.compile(r"lora_controlnet"), "a Control-LoRA: a ControlNet in low rank, which adds layers", _KEEP),
    Kind(
        re.compile(r"(control_model|input_hint_block|controlnet_(cond_embedding|down_blocks|mid_block|blocks))\b.*"),
        "a ControlNet, a model of its own",
        _KEEP,
    ),
    Kind(re.compile(r".+_custom_diffusion(_out)?(\..+)?"), "a Custom Diffusion file: whole projections", _KEEP),
    Kind(re.compile(r".*motion_modules\..+"), "a motion module of AnimateDiff, or a LoRA of one", _KEEP, True),
    Kind(
        re.compile(r".*vera_lambda.*|.*\.lora_E(\..+)?|prompt_embeddings"),
        "an adapter of another method of PEFT's",
        "merge it into the model with PEFT's merge_and_unload",
        True,
    ),
    Kind(re.compile(r"state\.\d+\..+|.*\.exp_avg(_sq)?"), "the state of an optimizer", "name the adapter beside it"),
)
"""The first that has a mark counts."""
CHECKPOINT = re.compile(r"(.+\.)?(weight|bias|scale|gamma|beta|in_proj_weight|in_proj_bias)")


def split_foreign(names: Shapes) -> tuple[dict[str, tuple[int, ...]], str]:
    """The tensors that may be an adapter's, and a remark on those that are none; "" without any."""
    aside: dict[str, list[str]] = {}
    for name in names:
        what = _aside(name)
        if what:
            aside.setdefault(what, []).append(name)
    lost = {name for own in aside.values() for name in own}
    if len(lost) == len(names):
        return dict(names), ""
    told = "; ".join(f"{len(own)} {what}: {some(own)}" for what, own in aside.items())
    return {name: shape for name, shape in names.items() if name not in lost}, f"no adapter, left out: {told}" * bool(
        told
    )


def _aside(name: str) -> str:
    # A name of any length may be one of an adapter's.
    if len(name) > LONGEST or (ADAPTER.search(name) and not name.startswith("bundle_emb.")):
        return ""
    return next((what for pattern, what in ASIDE if pattern.fullmatch(name)), "")


def is_plain(name: str) -> bool:
    """Whether a tensor is hardly an adapter's, by its name."""
    return not ADAPTER.search(name)


def kind_of(names: Shapes, *, readable: bool = False) -> str:
    """What a file is that has no adapters as they are read here, and what to do with it; "" where not known.

    With `readable` also what could be read for the right model, when it was not.
    """
    short = [name for name in names if len(name) <= LONGEST]
    for kind in KINDS:
        if kind.readable and not readable:
            continue
        if mark := next((name for name in short if kind.marks.fullmatch(name)), None):
            return f"it is {kind.what} (by {mark}), not an adapter as they are read here; {kind.todo}"
    return ""


def whole(names: Shapes) -> str:
    """The same of files that have nothing of an adapter: no tensors, whole weights, embeddings."""
    if not names:
        return "it has no tensors; if it was just saved, nothing was given to be saved"
    short = [name for name in names if len(name) <= LONGEST]
    if any(ADAPTER.search(name) for name in short):
        return ""
    if what := kind_of(names):
        return what
    embeddings = [name for name in short if EMBEDDING.fullmatch(name)]
    if len(embeddings) * 2 >= len(names):
        return (
            f"it is a textual inversion, the embeddings of new words ({some(embeddings)}), not an adapter of layers; "
            "load it as an embedding"
        )
    own = [name for name in short if CHECKPOINT.fullmatch(name)]
    if len(own) * 2 > len(names) and any(len(names[name]) > 1 for name in own):
        return (
            f"it is the whole weights of a model, {len(names)} tensors such as {some(own[:2])}, not an adapter; "
            "extract one from it and the base model that it was trained from, or load it as the model"
        )
    return ""
