"""Recognize files, and tensors in them, that are not adapters."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from lycoris.adapters.load_report import some
from lycoris.algorithms.serialization import TensorShapes
from lycoris.files.dialects.base import LONGEST_NAME

TensorShape = tuple[int, ...]

ADAPTER_NAMES = re.compile(
    r"lora|hada_|lokr_|oft_|glora|(^|[._])(dora_scale|magnitude|alpha|diff(_b|_m|_param)?|set_(weight|param))$|"
    r"reshape_weight|\b[wb]_norm$|\bon_input$|\b[ab][12m]\.weight$|\b[qp]_layer\b|\b(lambda_layer|rescale|ia3_l)\b|"
    r"\bbias_(indices|values|size)$|\bbase_([qp]\.weight|lambda)$"
)
"""Part of the names of an adapter's tensors, and hardly of others."""
EMBEDDING_NAMES = re.compile(
    r"bundle_emb\..+|(.+\.)?(emb_params|string_to_param\.\*|string_to_token\.\*)|text_encoders_\d+|<[^<>]+>|"
    r"clip_[lgh](_out)?|t5(xxl)?(_out)?"
)
"""Textual inversions: the vectors of new words, alone or bundled with an adapter."""
IGNORED_NAMES: Sequence[tuple[re.Pattern[str], str]] = (
    (EMBEDDING_NAMES, "embeddings of new words (textual inversions)"),
    (re.compile(r"(.+\.)?(position_ids|num_batches_tracked|logit_scale|inv_freq)"), "buffers of the model"),
    (re.compile(r"(vae|first_stage_model|image_encoder|feature_extractor|controlnet)\..+"), "weights of another model"),
    (re.compile(r"(optimizer|lr_scheduler|ema|state|scheduler|global_step|epoch|step)(\..+)?"), "state of a trainer"),
)
"""Tensors next to adapters that are none, by their whole names."""


class ForeignKind(NamedTuple):
    """A kind of file that contains no adapters this library reads.

    `what` says what it is, and `todo` what to do with it; both become part of a message.
    """

    marks: re.Pattern[str]
    """Names of which one is enough."""
    what: str
    todo: str
    readable: bool = False
    """Whether layers of it may be read for the model that it is for."""


_KEEP_ADVICE = "load it with the program that it is of"
_RESAVE_ADVICE = "save it from that program as a diffusers or kohya file"
FOREIGN_KINDS: Sequence[ForeignKind] = (
    ForeignKind(
        re.compile(r"(unet|text_encoder(_\d)?):\d+:(up|down)"),
        "a LoRA of cloneofsimo's lora, whose layers are only numbered",
        _RESAVE_ADVICE,
    ),
    ForeignKind(
        re.compile(r"(.+\.)?lora_[ab]"),
        "an MLX LoRA: lora_a (I, r) and lora_b (r, O)",
        "transpose each of them and save them as lora_A.weight and lora_B.weight, the scale times the latter",
    ),
    ForeignKind(
        re.compile(r"w_[ab]_\d+"), "a LoRA for Segment Anything (SAM), whose layers are only numbered", _KEEP_ADVICE
    ),
    ForeignKind(
        re.compile(r".+\.(qkv_proj(_context)?|out_proj(_context)?|mlp_(context_)?fc[12])\.lora_(down|up)"),
        "a LoRA packed for Nunchaku's quantized models",
        "convert the original LoRA",
    ),
    ForeignKind(re.compile(r"(image_proj|ip_adapter)\..+"), "an IP-Adapter, which adds attention layers", _KEEP_ADVICE),
    ForeignKind(re.compile(r"\d+\.\d+\.linear\.\d+\.(weight|bias)"), "a hypernetwork of WebUI's", _KEEP_ADVICE),
    ForeignKind(re.compile(r"lllite_.+"), "a ControlNet-LLLite, which adds layers", _KEEP_ADVICE),
    ForeignKind(
        re.compile(r"lora_controlnet"), "a Control-LoRA: a ControlNet in low rank, which adds layers", _KEEP_ADVICE
    ),
    ForeignKind(
        re.compile(r"(control_model|input_hint_block|controlnet_(cond_embedding|down_blocks|mid_block|blocks))\b.*"),
        "a ControlNet, which is a separate model",
        _KEEP_ADVICE,
    ),
    ForeignKind(
        re.compile(r".+_custom_diffusion(_out)?(\..+)?"), "a Custom Diffusion file: full projections", _KEEP_ADVICE
    ),
    ForeignKind(
        re.compile(r".*motion_modules\..+"), "a motion module of AnimateDiff, or a LoRA of one", _KEEP_ADVICE, True
    ),
    ForeignKind(
        re.compile(r".*vera_lambda.*|.*\.lora_E(\..+)?|prompt_embeddings"),
        "an adapter of another method of PEFT's",
        "merge it into the model with PEFT's merge_and_unload",
        True,
    ),
    ForeignKind(
        re.compile(r"state\.\d+\..+|.*\.exp_avg(_sq)?"), "the state of an optimizer", "give the adapter next to it"
    ),
)
"""The first that has a mark counts."""
CHECKPOINT_NAMES = re.compile(r"(.+\.)?(weight|bias|scale|gamma|beta|in_proj_weight|in_proj_bias)")


def split_foreign(names: TensorShapes) -> tuple[dict[str, tuple[int, ...]], str]:
    """Split off tensors that cannot be an adapter's, by their names.

    Returns:
        The tensors that may be an adapter's, and a remark on the others ("" if there are none). If no tensor would be
            left, all are returned, so that `explain_no_adapter` can say what the file is.
    """
    aside: dict[str, list[str]] = {}
    for name in names:
        what = _explain_ignored(name)
        if what:
            aside.setdefault(what, []).append(name)
    lost = {name for own in aside.values() for name in own}
    if len(lost) == len(names):
        return dict(names), ""
    listed = "; ".join(f"{len(own)} {what}: {some(own)}" for what, own in aside.items())
    return {name: shape for name, shape in names.items() if name not in lost}, f"no adapter, left out: {listed}" * bool(
        listed
    )


def _explain_ignored(name: str) -> str:
    # A name of any length may be one of an adapter's.
    if len(name) > LONGEST_NAME or (ADAPTER_NAMES.search(name) and not name.startswith("bundle_emb.")):
        return ""
    return next((what for pattern, what in IGNORED_NAMES if pattern.fullmatch(name)), "")


def is_foreign(name: str) -> bool:
    """Return whether a name is unlikely to be that of an adapter's tensor.

    By the parts that names of adapters' tensors have; it does not look at the layer.
    """
    return not ADAPTER_NAMES.search(name)


def explain_kind(names: TensorShapes, *, readable: bool = False) -> str:
    """Return what a file without adapters is and what to do with it, or "" if not known.

    Args:
        names: Shapes by name.
        readable: Whether to include kinds of which some layers can be read for the right model; ask so after reading
            failed.
    """
    short = [name for name in names if len(name) <= LONGEST_NAME]
    for kind in FOREIGN_KINDS:
        if kind.readable and not readable:
            continue
        if mark := next((name for name in short if kind.marks.fullmatch(name)), None):
            return f"it is {kind.what} (by {mark}), not an adapter as they are read here; {kind.todo}"
    return ""


def explain_no_adapter(names: TensorShapes) -> str:
    """Return why a file has no adapters, or "" if it may have some.

    Covers empty files, embeddings, entire models, and the kinds in `FOREIGN_KINDS`.
    """
    if not names:
        return "it has no tensors; if it was just saved, there was nothing to save"
    short = [name for name in names if len(name) <= LONGEST_NAME]
    if any(ADAPTER_NAMES.search(name) for name in short):
        return ""
    if what := explain_kind(names):
        return what
    embeddings = [name for name in short if EMBEDDING_NAMES.fullmatch(name)]
    if len(embeddings) * 2 >= len(names):
        return (
            f"it is a textual inversion, the embeddings of new words ({some(embeddings)}), not an adapter of layers; "
            "load it as an embedding"
        )
    own = [name for name in short if CHECKPOINT_NAMES.fullmatch(name)]
    if len(own) * 2 > len(names) and any(len(names[name]) > 1 for name in own):
        return (
            f"it is the full weights of a model, {len(names)} tensors such as {some(own[:2])}, not an adapter; "
            "extract one from it and the base model that it was trained from, or load it as the model"
        )
    return ""
