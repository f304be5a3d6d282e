"""What the table of keys says of diffusers, by diffusers' own readers of files, for every layer of published models."""

from __future__ import annotations

import re
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from cases import perturb
from covering import spread
from lycoris import AdapterSet, DoRA, LoKr, LoRA, Rule, plan
from lycoris.adapters.bundle import Bundle
from lycoris.algorithms.base import Entry
from lycoris.algorithms.conversion import adapt_affine
from lycoris.errors import FileError
from lycoris.files.dialects import DIALECTS
from lycoris.files.layout import NamedLayout
from lycoris.files.programs import PROGRAMS
from lycoris.files.programs.keys import DENOISER_ARCHITECTURES, DIFFUSERS_KEYS, KnownKeys
from lycoris.files.writing import compose
from lycoris.layers.geometry import Affine
from lycoris.models.families import ARCHITECTURES
from programs.pipelines import PIPELINES

pytestmark = pytest.mark.filterwarnings("ignore:::diffusers", "ignore:::peft")
SMALLEST = {"flux2": "flux.2-klein-4b", "wan": "wan2.1-i2v-14b", "sd3": "sd3.5-medium"}
CASES = spread(
    [
        (dialect, name)
        for dialect in DIALECTS
        for name in DENOISER_ARCHITECTURES
        if dialect not in ("peft", "processors") and not ("musubi" in dialect and "unet" in name)
    ],
    lambda dialect, name: name in DIFFUSERS_KEYS.get(dialect, {}),
)
"""Folders and attention processors have readers of their own; Musubi Tuner has no UNets."""
REFUSES = (ValueError, KeyError, IndexError, RuntimeError)
X = 3
"""Columns that a weight is told by."""


def layout_of(name: str) -> NamedLayout:
    return NamedLayout.from_outline(ARCHITECTURES[name], SMALLEST.get(name, ARCHITECTURES[name].outlines[0]))


def keys_of(dialect: str, layout: NamedLayout) -> dict[str, tuple[str, ...]]:
    """Key without the tensor's own name → layers that it stands for, by diffusers' names.

    Convolutions with groups are no question of keys: PEFT's LoRA has other shapes there.
    """
    own, architecture = DIALECTS[dialect], layout.architecture
    assert architecture is not None
    prefix = "unet." if layout.is_unet and "unet." in own.prefixes else own.find_prefix("")
    if dialect == "onetrainer-legacy" and layout.is_unet:
        prefix = "lora_unet_"
    naming = own.choose_naming(architecture)
    kinds = own.kinds or {"linear", "conv"}
    spans = layout.find_spans(naming)
    return {
        own.join(name, "", prefix).rstrip("."): span.parts
        for name, span in spans.items()
        if layout.fuse_parts(span).kind in kinds & {"linear", "conv"} and layout.fuse_parts(span).groups == 1
    }


def bundle_of(layout: NamedLayout, layers: set[str]) -> Bundle:
    """A LoRA of rank 2 at half its scale on each layer."""
    generator = torch.Generator().manual_seed(0)
    entries = {}
    for name, g in layout.layers.items():
        if name in layers:
            lora = LoRA(rank=2, alpha=1.0)
            tensors = {slot: torch.randn(s.shape, generator=generator) for slot, s in lora.slots(g).items()}
            entries[name] = (Entry(lora, g, tensors),)
    return Bundle(entries)


def product(up: Tensor, down: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(down.flatten(1).shape[1], X, generator=generator).double()
    return up.flatten(1).double() @ (down.flatten(1).double() @ x)


def read(dialect: str, layout: NamedLayout, bundle: Bundle) -> set[str]:
    """The layers that diffusers gives what they were given."""
    tensors = compose(bundle, dialect, model=layout).tensors
    if dialect == "onetrainer-legacy" and layout.is_unet:
        tensors = {key.replace("lora_transformer_", "lora_unet_"): tensor for key, tensor in tensors.items()}
    assert layout.architecture is not None
    pipeline: Any = getattr(diffusers, PIPELINES[layout.architecture.name], None)
    if not hasattr(pipeline, "lora_state_dict"):
        raise ValueError(f"{PIPELINES[layout.architecture.name]} loads no adapters")
    component, options = ("unet", {"unet_config": levels(layout)}) if layout.is_unet else ("transformer", {})
    # It scales some in place.
    found = pipeline.lora_state_dict({key: tensor.clone() for key, tensor in tensors.items()}, **options)
    state, alphas = found if isinstance(found, tuple) else (found, {})
    # Settings in the header are for the scale.
    told = 0.5 if DIALECTS[dialect].scale == "header" else 1.0
    right = set()
    for name, (entry,) in bundle.entries.items():
        begin = f"{component}.{name}"
        old = re.sub(r"\.(to_\w+?)(\.0)?$", r".processor.\1_lora", begin)
        ends = (
            (begin + ".lora_A.weight", begin + ".lora_B.weight"),
            (begin + ".lora.down.weight", begin + ".lora.up.weight"),
        )
        pairs = (*ends, (old + ".down.weight", old + ".up.weight"))
        down, up = next((pair for pair in pairs if pair[0] in state), ("", ""))
        if down:
            alpha = (alphas or {}).get(f"{down}.alpha", (alphas or {}).get(f"{begin}.alpha"))
            scale = told if alpha is None else float(alpha) / len(state[down])
            expected = 0.5 * product(entry.tensors["up"], entry.tensors["down"])
            shapes = state[up].shape[0] == len(expected) and state[down][0].numel() == entry.tensors["down"][0].numel()
            if shapes and float((scale * product(state[up], state[down]) - expected).norm() / expected.norm()) < 1e-4:
                right.add(name)
    return right


def levels(layout: NamedLayout) -> Any:
    """What diffusers asks of a UNet to tell its blocks."""
    count = 1 + max(int(name.split(".")[1]) for name in layout.layers if name.startswith("down_blocks."))
    model = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32,) * count,
        down_block_types=("DownBlock2D",) * count,
        up_block_types=("UpBlock2D",) * count,
        mid_block_type=None,
    )
    return model.config


def refuses(dialect: str, layout: NamedLayout, layers: set[str]) -> bool:
    try:
        read(dialect, layout, bundle_of(layout, layers))
    except REFUSES:
        return True
    return False


@pytest.mark.sample(12)
@pytest.mark.parametrize(("dialect", "name"), CASES)
def test_the_table_of_keys_says_what_diffusers_does(dialect: str, name: str) -> None:
    layout, known = layout_of(name), DIFFUSERS_KEYS.get(dialect, {}).get(name)
    keys = keys_of(dialect, layout)
    rejected = {key for key in keys if known and known.stops and re.fullmatch(known.stops, key)}
    taken = {part for key in keys.keys() - rejected for part in keys[key]}
    lora = next(iter(bundle_of(layout, taken).entries.values()))[0]
    held = PROGRAMS["diffusers"].judge(lora, dialect=dialect, architecture=name).reads == "as trained"
    try:
        right = read(dialect, layout, bundle_of(layout, taken))
    except REFUSES:
        assert known is None or not held
        return
    reads = {key for key in keys.keys() - rejected if right >= set(keys[key])}
    if known is None:
        assert len(reads) < len(keys), "the table does not list what diffusers reads"
        return
    said = {key for key in keys.keys() - rejected if held and not re.fullmatch(f"{known.lost}|{known.misplaced}", key)}
    assert reads == said


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    ("dialect", "name", "known"),
    [
        (d, n, known)
        for d, each in DIFFUSERS_KEYS.items()
        for n, known in each.items()
        # OneTrainer's old files are rejected when the model gets them; LoKr is not what this test writes.
        if (known.stops or known.complete_groups) and d not in ("lycoris", "onetrainer-legacy")
    ],
)
def test_it_rejects_what_the_table_says(dialect: str, name: str, known: KnownKeys) -> None:
    layout = layout_of(name)
    keys = keys_of(dialect, layout)
    stops = {key for key in keys if known.stops and re.fullmatch(known.stops, key)}
    fine = {part for key in keys.keys() - stops for part in keys[key]}
    for kind, key in {re.sub(r"\d+", "*", key): key for key in stops}.items():
        assert refuses(dialect, layout, fine | set(keys[key])), kind
    for key in {
        re.sub(r"\d+", "*", key): key
        for key in keys
        if known.complete_groups and re.fullmatch(known.complete_groups, key)
    }.values():
        assert refuses(dialect, layout, fine - set(keys[key])), key


def test_whose_keys_it_does_not_know() -> None:
    """The pipeline of HunyuanVideo-1.5 loads no adapters."""
    assert not any("hunyuanvideo-1.5" in each for each in DIFFUSERS_KEYS.values())


TINY = {
    "flux2": lambda: diffusers.Flux2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        timestep_guidance_channels=16,
        axes_dims_rope=(4, 4, 4, 4),
    ),
    "z-image": lambda: diffusers.ZImageTransformer2DModel(
        dim=64, n_layers=1, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=32, axes_dims=[8, 12, 12]
    ),
}


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("dialect", [each for each in DIALECTS if each not in ("peft", "processors", "diffusers")])
@pytest.mark.parametrize("name", TINY)
def test_lokr(name: str, dialect: str, dora: bool) -> None:
    """Each adapter of a file, by the weight that PEFT gives its layer."""
    torch.manual_seed(0)
    model = TINY[name]()
    layout = NamedLayout.from_model(model)
    over = LoKr(rank=2, alpha=1.0)
    use = DoRA(inner=over) if dora else over
    path = "*transformer_blocks.*attn.to_out*" if name == "flux2" else "layers.*.feed_forward.*"
    adapters = AdapterSet.build(model, plan(model, Rule(use, path=path), strict=False))
    perturb(adapters)
    bundle = adapters.bundle()
    try:
        tensors = compose(bundle, dialect, model=layout).tensors
    except FileError:
        assert DIALECTS[dialect].algorithms is not None, "it holds no such adapters"
        return
    prefix = DIALECTS[dialect].find_prefix("") or ""
    if dialect == "ai-toolkit":
        prefix = "diffusion_model."
        tensors = {key.replace("transformer.", prefix, 1): tensor for key, tensor in tensors.items()}
    verdicts = {
        PROGRAMS["diffusers"].judge(entry, dialect=dialect, architecture=name, key=prefix).reads
        for (entry,) in bundle.entries.values()
    }
    pipeline: Any = getattr(diffusers, PIPELINES[name])
    try:
        state = pipeline.lora_state_dict({key: tensor.clone() for key, tensor in tensors.items()})
        if not all("lora" in key or "lokr" in key for key in state):
            raise ValueError("load_lora_weights refuses such keys")
        pipeline.load_lora_into_transformer(state, model, adapter_name="a")
        found = {path: delta(model.get_submodule(path)) for path in bundle.entries}
    except (*REFUSES, TypeError, AttributeError):
        found = {}
    for path, (entry,) in bundle.entries.items():
        weight = model.get_submodule(path).weight.detach()
        expected = adapt_affine(entry, Affine(weight, None)).weight - weight
        same = path in found and torch.allclose(found[path], expected, atol=1e-5)
        assert verdicts == {"as trained" if same else "differently" if path in found else "not at all"}, path


def delta(layer: Any) -> Tensor:
    return layer.get_delta_weight("a").detach()
