"""What ComfyUI, Forge and the WebUI made of whole files when their own code was run, against what is said of them."""

from __future__ import annotations

import pytest
import torch

from lycoris import OFT, Full, GLoRA, LoRA
from lycoris.adapters.bundle import Bundle
from lycoris.algorithms.base import Algorithm, Entry
from lycoris.files.layout import NamedLayout
from lycoris.files.opening import parse_opened
from lycoris.files.programs import PROGRAMS
from lycoris.files.programs.check import ProgramCheck, check_opened
from lycoris.files.writing import compose
from lycoris.layers.geometry import Geometry
from lycoris.models.families import ARCHITECTURES

OUTLINES = {"flux1": "flux.1-dev", "flux2": "flux.2-klein-4b", "sd1.5-unet": "sd-1.5"}
ATTENTION = "transformer_blocks.0.attn.to_q"
UNET = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
CASES = [
    ("comfyui", "flux1", "diffusers", LoRA(rank=4, alpha=1.0), (ATTENTION,), "differently", 3.0),
    ("forge", "flux1", "diffusers", LoRA(rank=4, alpha=1.0), (ATTENTION,), "differently", 3.0),
    ("comfyui", "flux1", "diffusers", LoRA(rank=4, alpha=4.0), (ATTENTION,), "as trained", None),
    ("comfyui", "flux1", "lycoris", Full(weight=False), (ATTENTION,), "not at all", None),
    ("comfyui", "flux1", "lycoris", Full(), (ATTENTION,), "differently", None),
    ("comfyui", "flux1", "lycoris", Full(bias=False), (ATTENTION,), "as trained", None),
    ("comfyui", "flux1", "lycoris", GLoRA(rank=2), ("norm_out.linear",), "differently", None),
    ("comfyui", "flux1", "lycoris", OFT(block_size=4), ("norm_out.linear",), "differently", None),
    ("comfyui", "flux1", "lycoris", LoRA(rank=2), ("norm_out.linear",), "as trained", None),
    ("comfyui", "flux2", "lycoris", LoRA(rank=2), (ATTENTION,), "as trained", None),
    ("comfyui", "flux2", "lycoris", LoRA(rank=2), ("single_stream_modulation.linear",), "not at all", None),
    ("forge", "flux1", "lycoris", LoRA(rank=2), (ATTENTION,), "as trained", None),
    ("forge", "sd1.5-unet", "lycoris", LoRA(rank=2), (UNET,), "as trained", None),
    ("webui", "sd1.5-unet", "lycoris", LoRA(rank=2), (UNET,), "not at all", None),
    ("webui", "sd1.5-unet", "kohya-diffusers", LoRA(rank=2), (UNET,), "as trained", None),
]


def said(program: str, architecture: str, dialect: str, algorithm: Algorithm, layers: tuple[str, ...]) -> ProgramCheck:
    layout = NamedLayout.from_outline(ARCHITECTURES[architecture], OUTLINES[architecture])
    beside = [path for path in layout.layers if path.endswith(("attn.to_k", "attn1.to_k", "add_k_proj"))]
    entries = {}
    for path in {*layers, *beside}:
        g = layout.layers[path]
        own = algorithm if path in layers else LoRA(rank=1)
        entries[path] = (Entry(own, g, {name: torch.ones(slot.shape) for name, slot in own.slots(g).items()}),)
    made = compose(Bundle(entries), dialect, model=layout)
    return check_opened(parse_opened(made.tensors, made.header), program)


@pytest.mark.parametrize(("program", "architecture", "dialect", "algorithm", "layers", "reads", "error"), CASES)
def test_what_is_said_is_what_was_measured(
    program: str,
    architecture: str,
    dialect: str,
    algorithm: Algorithm,
    layers: tuple[str, ...],
    reads: str,
    error: float | None,
) -> None:
    found = said(program, architecture, dialect, algorithm, layers)
    for layer in layers:
        assert found.layers[layer].reads == reads
        if error is not None:
            assert found.layers[layer].error == pytest.approx(error)


def test_nothing_is_claimed_of_what_was_not_looked_at() -> None:
    layout = NamedLayout.from_outline(ARCHITECTURES["flux1"], "flux.1-dev")
    g = layout.layers[ATTENTION]
    own = LoRA(rank=1)
    entry = Entry(own, g, {name: torch.ones(slot.shape) for name, slot in own.slots(g).items()})
    for program in ("comfyui", "forge", "webui"):
        strange = PROGRAMS[program].judge(entry, stored={"lora_up.weight": (1,), "lora_new.weight": (1,)})
        assert strange.reads == "not known", program
        assert not PROGRAMS[program].is_examined("a family of tomorrow")


class Unheard(LoRA):
    """An algorithm that came after the tables."""

    name = "unheard"


@pytest.mark.parametrize("program", PROGRAMS)
def test_nothing_is_claimed_of_what_no_rule_knows(program: str) -> None:
    """Not of a new algorithm, nor of a new tensor next to a known one's."""
    geometry = Geometry(kind="linear", shape=(8, 8), has_bias=False)
    tensors = {"up": torch.randn(8, 2), "down": torch.randn(2, 8)}
    consumer, known = PROGRAMS[program], Entry(LoRA(rank=2), geometry, tensors)
    stored = {"lora_up.weight": (8, 2), "lora_down.weight": (2, 8), "alpha": ()}
    assert consumer.judge(known, stored=stored).reads == "as trained"
    assert consumer.judge(Entry(Unheard(rank=2), geometry, tensors), stored=stored).reads != "as trained"
    assert consumer.judge(known, stored=stored | {"lora_sideways.weight": (2, 2)}).reads == "not known"
