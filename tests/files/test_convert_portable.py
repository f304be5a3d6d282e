"""`convert` for a program and `check` by that program: what the one writes, the other finds to be as trained."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from cases import relative
from lycoris import DoRA, Full, GLoRA, LoHa, LoKr, LoRA, Norm, read, write
from lycoris.adapters.bundle import Bundle
from lycoris.algorithms.base import Algorithm, Entry
from lycoris.algorithms.conversion import adapt_affine
from lycoris.errors import FileError
from lycoris.files import check, convert, detect
from lycoris.files.layout import NamedLayout
from lycoris.files.programs import PROGRAMS
from lycoris.layers.geometry import Affine
from lycoris.models.families import ARCHITECTURES, FAMILIES

ATTENTION = (
    r"(?!(up|mid)_block|down_blocks\.[02])"
    r".*\b(blocks|layers|block|(visual_|joint_)?transformer_blocks|double_stream_blocks|txt_mode_blocks)\.0\."
    r".*(attn|attention|SelfAttention).*"
)
ENDS = r"(?!.*\d\.).*"
"""What is in no block."""
BLOCK = r"(single_)?transformer_blocks\.0\..*"
FAMILY = {family.components[""]: name for name, family in reversed(FAMILIES.items())}


def source(
    folder: Path,
    architecture: str,
    *algorithms: Algorithm,
    layers: str = ".*",
    dialect: str = "lycoris",
    kind: str = "linear",
) -> Path:
    """A file with the same algorithms on some layers of a known model."""
    torch.manual_seed(0)
    layout = NamedLayout.from_outline(ARCHITECTURES[architecture], ARCHITECTURES[architecture].outlines[0])
    entries = {
        name: tuple(
            Entry(a, g, {slot: torch.randn(s.shape) for slot, s in a.slots(g).items()})
            for a in algorithms or (LoRA(rank=1),)
        )
        for name, g in layout.layers.items()
        if re.fullmatch(layers, name) and g.kind == kind
    }
    path = folder / f"{architecture}.safetensors"
    write(Bundle(entries), path, dialect, model=layout, family=FAMILY[architecture])
    return path


def agrees(path: Path, program: str, to: str | None = None) -> bool:
    """Whether it is written, which it is if and only if the program then reads it as trained."""
    out = path.with_name("out")
    try:
        convert(path, out, to, portable=program, allow_growth=True)
    except FileError:
        assert not out.exists(), (program, to)
        return False
    found = check(out, program)
    assert found.as_trained, (program, to, str(found))
    if out.is_file():
        out.unlink()
    return True


@pytest.mark.sample(8)
@pytest.mark.parametrize(
    ("architecture", "layers"), [(name, layers) for name in FAMILY for layers in (ATTENTION, f"{ATTENTION}|{ENDS}")]
)
def test_what_is_written_is_read_as_trained(architecture: str, layers: str, tmp_path: Path) -> None:
    path = source(tmp_path, architecture, layers=layers)
    for program in PROGRAMS.keys() - {"peft"}:
        agrees(path, program)
    assert agrees(path, "simpletuner")


@pytest.mark.parametrize(
    ("architecture", "layers", "program"),
    [
        ("wan", rf"blocks\.0\..*|{ENDS}", "diffusers"),
        ("z-image", rf"layers\.0\..*|{ENDS}", "comfyui"),
        pytest.param("flux1", f"{BLOCK}|{ENDS}", "invokeai", marks=pytest.mark.slow),
        pytest.param("flux1", f"{BLOCK}|{ENDS}", "comfyui", marks=pytest.mark.slow),
        pytest.param("flux1", f"{BLOCK}|{ENDS}", "musubi", marks=pytest.mark.slow),
        pytest.param("wan", rf"blocks\.0\..*|{ENDS}", "invokeai", marks=pytest.mark.slow),
    ],
)
def test_every_dialect(architecture: str, layers: str, program: str, tmp_path: Path) -> None:
    path = source(tmp_path, architecture, layers=layers)
    good = [to for to in PROGRAMS[program].keys if agrees(path, program, to)]
    assert agrees(path, program) == bool(good)


def test_the_first_dialect_that_passes(tmp_path: Path) -> None:
    """InvokeAI rejects kohya's files for the layers outside of Flux.1's blocks, and diffusers' that lack block 0."""
    path, out = source(tmp_path, "flux1", layers=f"{BLOCK}|{ENDS}"), tmp_path / "out.safetensors"
    convert(path, out, portable="invokeai", allow_growth=True)
    assert detect(out).dialect == "musubi-other"
    with pytest.raises(FileError) as caught:
        convert(path, tmp_path / "no.safetensors", "kohya", portable="invokeai", allow_growth=True)
    assert "kohya: InvokeAI rejects the file for lora_unet_" in str(caught.value)
    assert "lora_unet_guidance_in_" in str(caught.value)
    assert "\nAs musubi-other" in str(caught.value)
    assert not (tmp_path / "no.safetensors").exists()


def test_keys_decide_about_an_export(tmp_path: Path) -> None:
    """diffusers reads LoKr for Z-Image, but not on what the original code calls attention.out."""
    layers = r"layers\.0\.(attention\.to_out|feed_forward).*"
    path, out = source(tmp_path, "z-image", LoKr(rank=4, factor=-1), layers=layers), tmp_path / "out"
    convert(path, out, "comfyui", portable="diffusers", allow_growth=True)
    found = check(out, "diffusers")
    assert found.as_trained
    assert {layer for layer, name in found.algorithms.items() if name == "lora"} == {"layers.0.attention.out"}
    assert len(found.layers) == 4


def test_a_folder_of_pefts_has_the_models_own_names(tmp_path: Path) -> None:
    path = source(tmp_path, "flux1", layers=BLOCK, dialect="kohya")
    convert(path, tmp_path / "folder", portable="peft")
    assert check(tmp_path / "folder", "peft").as_trained
    layers = {key.partition("base_model.model.")[2].rsplit(".", 2)[0] for key in load_file(
        tmp_path / "folder" / "adapter_model.safetensors"
    )}  # fmt: skip
    layout = NamedLayout.from_outline(ARCHITECTURES["flux1"], "flux.1-dev")
    assert layers == {name for name, g in layout.layers.items() if re.fullmatch(BLOCK, name) and g.kind == "linear"}


def pruned(path: Path, spare: str, renamed: Mapping[str, str] = MappingProxyType({})) -> Path:
    """The file without the tensors of a name, and with others called otherwise."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = {}
    for key, tensor in load_file(path).items():
        layer, _, suffix = key.partition(".")
        if suffix != spare:
            tensors[f"{layer}.{renamed.get(suffix, suffix)}"] = tensor
    save_file(tensors, path, metadata)
    return path


UNET = r"down_blocks\.1\.attentions\.0\..*"


@pytest.mark.parametrize("spare", ["b_norm", "w_norm"])
def test_half_of_a_norm(spare: str, tmp_path: Path) -> None:
    """WebUI wants both; that reading puts the other half there says nothing about the file."""
    path = source(tmp_path, "sd1.5-unet", Norm(), layers=UNET, kind="norm", dialect="kohya")
    assert check(path, "webui").as_trained
    assert not check(pruned(path, spare), "webui").as_trained
    assert check(path, "comfyui").as_trained == (spare == "b_norm"), "it passes a shift alone over"
    assert agrees(path, "webui")


def test_a_norm_without_a_shift_gets_one_of_zeros(tmp_path: Path) -> None:
    """Reading drops the zeros again where the layer has no shift, and they are in the file all the same."""
    torch.manual_seed(0)
    path = source(tmp_path, "sd1.5-unet", Norm(), layers=UNET, kind="norm", dialect="kohya")
    names = {"w_norm": "diff", "b_norm": "diff_b"}
    assert check(pruned(path, "", names), "webui").as_trained
    assert not check(pruned(path, "diff"), "webui").as_trained
    assert agrees(path, "webui")


@pytest.mark.parametrize(("alpha", "reads"), [(2.0, "as trained"), (1.0, "differently")])
def test_the_first_layout_of_glora(alpha: float, reads: str, tmp_path: Path) -> None:
    """It is the one that WebUI knows, without its scale; the later one costs the file."""
    path = source(tmp_path, "sd1.5-unet", GLoRA(rank=2, alpha=alpha), layers=f"{UNET}attn2.to_k", dialect="kohya")
    (later,) = check(path, "webui").layers.values()
    swapped = {"a1": "a2", "a2": "a1", "b1": "b2", "b2": "b1"}
    pruned(path, "", {f"{one}.weight": f"{other}.weight" for one, other in swapped.items()})
    (first,) = check(path, "webui").layers.values()
    assert (later.reads, first.reads) == ("not at all", reads)
    assert check(path, "comfyui").as_trained


def with_bias(folder: Path, algorithm: Algorithm) -> tuple[Path, NamedLayout]:
    path = source(folder, "sd1.5-unet", algorithm, Full(weight=False), layers=f"{UNET}to_out.0", dialect="kohya")
    return path, NamedLayout.from_outline(ARCHITECTURES["sd1.5-unet"], "sd-1.5")


@pytest.mark.parametrize("algorithm", [LoRA(rank=2), LoHa(rank=2)], ids=lambda a: a.name)
@pytest.mark.parametrize("program", ["webui", "invokeai", "simpletuner", "comfyui"])
def test_a_change_of_the_bias_goes_along(algorithm: Algorithm, program: str, tmp_path: Path) -> None:
    path, layout = with_bias(tmp_path, algorithm)
    out = tmp_path / "out.safetensors"
    convert(path, out, portable=program, allow_growth=True)
    assert check(out, program).as_trained
    before, after = (read(each, layout).entries for each in (path, out))
    for layer, stack in before.items():
        assert len(after[layer]) == (2 if program == "comfyui" else 1)
        g = stack[0].geometry
        below = Affine(torch.zeros(g.shape), torch.zeros(g.out_features))
        made = below
        for entry in stack:
            made = adapt_affine(entry, made)
        found = below
        for entry in after[layer]:
            found = adapt_affine(entry, found)
        assert made.bias is not None
        assert found.bias is not None
        assert relative(found.weight, made.weight) < 1e-6
        assert torch.equal(found.bias, made.bias)


@pytest.mark.parametrize("program", ["diffusers", "musubi"])
def test_a_change_of_the_bias_that_has_no_counterpart(program: str, tmp_path: Path) -> None:
    path = source(tmp_path, "qwen-image", LoRA(rank=1), Full(weight=False), layers=BLOCK)
    with pytest.raises(FileError, match=r"bias.*; no export of lora on a"):
        convert(path, tmp_path / "out.safetensors", portable=program)


def test_lengths_beside_a_bias_need_the_weights(tmp_path: Path) -> None:
    path, _ = with_bias(tmp_path, DoRA(inner=LoRA(rank=1)))
    with pytest.raises(FileError, match="--base"):
        convert(path, tmp_path / "out.safetensors", portable="webui")


def test_single_places_of_the_weight(tmp_path: Path) -> None:
    """No program reads them; a conversion puts them into the difference."""
    path = source(tmp_path, "sd1.5-unet", LoRA(rank=1), layers=f"{UNET}attn2.to_k", dialect="kohya")
    tensors = load_file(path)
    key = next(iter(tensors)).partition(".")[0]
    shape = [tensors[f"{key}.lora_up.weight"].shape[0], tensors[f"{key}.lora_down.weight"].shape[1]]
    more = {
        f"{key}.bias_indices": torch.tensor([[0], [1]], dtype=torch.int16),
        f"{key}.bias_values": torch.ones(1),
        f"{key}.bias_size": torch.tensor(shape, dtype=torch.int16),
    }
    save_file(tensors | more, path)
    (found,) = check(path, "comfyui").layers.values()
    assert (found.reads, found.remedy) == ("differently", "joined")
    assert agrees(path, "comfyui")
    assert agrees(path, "diffusers")
