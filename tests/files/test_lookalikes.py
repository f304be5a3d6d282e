"""Models that have the names of a known family, and not its sizes or not all of its layers, read their own files."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest
import torch
from test_families import spelt
from torch import nn

import lycoris
from covering import spread
from lycoris import AdapterSet, LoRA, Rule, create_lycoris, create_lycoris_from_weights, plan, read
from lycoris.compat.network import LycorisNetwork
from lycoris.files.layout import NamedLayout
from lycoris.files.skeleton import list_namings
from lycoris.kohya import create_network, create_network_from_weights
from lycoris.models.families import ARCHITECTURES

Sizes = dict[str, tuple[int, int]]

EVERY = [
    (each.name, naming, each.outlines[0])
    for each in ARCHITECTURES.values()
    for naming in list_namings(each)
    if each.outlines
]
FEW = [("flux1", "original"), ("flux1", "diffusers"), ("sd3", "original"), ("hunyuanvideo", "original")]


def sizes(architecture: str, naming: str, outline: str) -> Sizes:
    """Of the first two blocks of everything, each size divided by 64."""
    layers = spelt(architecture, naming, outline)
    return {
        path: (max(1, g.out_features // 64), max(1, g.fan_in // 64))
        for path, g in layers.items()
        if g.kind == "linear" and all(int(n) < 2 for n in re.findall(r"(?<![^.])\d+(?![^.])", path))
    }


def as_they_are(own: Sizes, random: Random) -> Sizes:
    return own


def of_any_size(own: Sizes, random: Random) -> Sizes:
    return {path: (random.randint(4, 24), random.randint(4, 24)) for path in own}


def of_one_size(own: Sizes, random: Random) -> Sizes:
    return dict.fromkeys(own, (8, 8))


def without_some(own: Sizes, random: Random) -> Sizes:
    return {path: size for path, size in of_any_size(own, random).items() if random.random() > 0.07}


def with_others(own: Sizes, random: Random) -> Sizes:
    return own | {f"extra_{at}.thing": (8, 8) for at in range(len(own) // 15 + 1)}


def renamed(own: Sizes, random: Random) -> Sizes:
    return {f"{path}x" if random.random() < 0.06 else path: size for path, size in own.items()}


CHANGES = (as_they_are, of_any_size, of_one_size, without_some, with_others, renamed)


def model(own: Sizes, name: str) -> nn.Module:
    root = type(name, (nn.Module,), {})()
    for path, (o, i) in own.items():
        at = root
        *steps, last = path.split(".")
        for step in steps:
            if step not in at._modules:
                at.add_module(step, nn.Module())
            at = at.get_submodule(step)
        if last not in at._modules:
            at.add_module(last, nn.Linear(i, o, bias=False))
    return root


def check(own: Sizes, name: str, folder: Path) -> None:
    """By all ways that a file goes out and comes in."""
    file = folder / "own.safetensors"

    def drawn(network: LycorisNetwork) -> LycorisNetwork:
        for parameter in network.parameters():
            nn.init.normal_(parameter)
        network.save_weights(file, None, {})
        assert network.load_weights(file) == {}
        return network

    def same(one: LycorisNetwork, other: LycorisNetwork) -> None:
        first, second = one.state_dict(), other.state_dict()
        assert first.keys() == second.keys()
        assert all(torch.equal(first[key], second[key]) for key in first)

    targets = {"target_module": ["Linear"]}
    network = drawn(create_lycoris(model(own, name), 1.0, 2, 1.0, apply_preset=targets))
    same(network, create_lycoris_from_weights(1.0, file, model(own, name))[0])
    kohya = drawn(
        create_network(1.0, 2, 1.0, None, None, model(own, name), apply_preset={"unet_target_module": ["Linear"]})
    )
    same(kohya, create_network_from_weights(1.0, file, None, None, model(own, name))[0])
    first, second = (model(own, name) for _ in range(2))
    second.load_state_dict(first.state_dict())
    adapters = AdapterSet.build(first, plan(first, Rule(LoRA(rank=1))))
    for parameter in adapters.parameters():
        nn.init.normal_(parameter)
    lycoris.write(adapters.bundle(), file)
    again = AdapterSet.load(second, read(file, second))
    adapters.merge()
    again.merge()
    for key, tensor in first.state_dict().items():
        torch.testing.assert_close(second.state_dict()[key], tensor, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("architecture", "naming", "change"), spread([(*few, each) for few in FEW for each in CHANGES])
)
def test_some(architecture: str, naming: str, change: Callable[[Sizes, Random], Sizes], tmp_path: Path) -> None:
    known = ARCHITECTURES[architecture]
    check(change(sizes(architecture, naming, known.outlines[0]), Random(0)), known.classes[-1], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize(("architecture", "naming", "outline"), EVERY)
def test_all(
    architecture: str, naming: str, outline: str, change: Callable[[Sizes, Random], Sizes], tmp_path: Path
) -> None:
    own = change(sizes(architecture, naming, outline), Random(1))
    for name in ("Net", ARCHITECTURES[architecture].classes[-1]):
        check(own, name, tmp_path)


def test_a_family_that_fits_is_still_known() -> None:
    own = sizes("flux1", "original", "flux.1-dev")
    assert NamedLayout.from_model(model(own, "Flux")).architecture is ARCHITECTURES["flux1"]
    assert NamedLayout.from_model(model(of_one_size(own, Random(0)), "Flux")).architecture is None


def test_a_model_with_fewer_rows_than_the_family_has(tmp_path: Path) -> None:
    """Queries, keys and values fill `linear1`, and nothing is left for the feed-forward that is there in Flux."""
    own = {"double_blocks.0.img_attn.qkv": (96, 32), "single_blocks.0.linear1": (96, 32)}
    check(own, "Module", tmp_path)
