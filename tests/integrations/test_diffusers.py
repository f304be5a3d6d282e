"""Adapters on real pipelines with small random models: on, off, merged, by component and by block."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from stock_pipelines import DENOISER, adapters, bundles, draw, kohya, merged, pipeline, state
from torch import nn

from cases import relative
from lycoris import IA3, OFT, AdapterSet, DoRA, Full, GLoRA, LoHa, LoKr, LoRA, TLoRA
from lycoris.algorithms.base import Algorithm
from lycoris.errors import AttachError, ConfigError, FileError
from lycoris.files import save_tensors
from lycoris.integrations.diffusers import load, models
from lycoris.layers import base_weights
from lycoris.targeting.rank_schedule import RankSchedule

pytestmark = pytest.mark.filterwarnings(
    "ignore:::diffusers", "ignore:::transformers", "ignore:::peft", "ignore:::torch"
)


def test_adapters_act_on_every_component_and_leave_no_trace(family: str, made: dict[str, Any]) -> None:
    pipe = pipeline(family, made)
    plain, before, found = draw(pipe), state(pipe), bundles(pipe)
    loaded = load(pipe, found)
    assert set(loaded.sets) == set(models(pipe))
    changed = draw(pipe)
    assert relative(changed, plain) > 1e-3
    assert relative(changed, draw(merged(pipeline(family, made), found, lambda *_: 1.0))) < 1e-4
    loaded.disable()
    assert torch.equal(draw(pipe), plain)
    assert loaded.loaded
    assert not loaded.enabled
    loaded.enable()
    assert torch.equal(draw(pipe), changed)
    loaded.unload()
    assert state(pipe) == before
    assert torch.equal(draw(pipe), plain)
    loaded.unload()
    assert not loaded.loaded


@pytest.mark.sample(4)
@pytest.mark.parametrize(
    "algorithm",
    [LoHa(rank=2), LoKr(rank=2), OFT(block_size=2), DoRA(inner=LoRA(rank=2)), IA3(), Full(), GLoRA(rank=2)],
    ids=lambda algorithm: algorithm.name,
)
def test_any_algorithm_loads(algorithm: Algorithm, made: dict[str, Any]) -> None:
    pipe = pipeline("sd", made)
    found = {"unet": adapters(pipe.unet, algorithm)}
    plain = draw(pipe)
    with load(pipe, found["unet"]) as loaded:
        assert list(loaded.sets) == ["unet"]
        act = draw(pipe)
        assert relative(act, plain) > 1e-5
        loaded.merge()
        assert relative(draw(pipe), act) < 1e-4
        loaded.unmerge()
        assert torch.equal(draw(pipe), act)
    assert torch.equal(draw(pipe), plain)


def test_strength_by_component(family: str, made: dict[str, Any]) -> None:
    pipe = pipeline(family, made)
    found, plain = bundles(pipe), draw(pipe)
    loaded = load(pipe, found, strength=0.5)
    wanted = {name: 0.25 * at for at, name in enumerate(found, 1)}
    loaded.set(components={name: 2 * strength for name, strength in wanted.items()})
    by_hand = merged(pipeline(family, made), found, lambda component, _: wanted[component])
    assert relative(draw(pipe), draw(by_hand)) < 1e-4
    loaded.set(1.0, components=dict.fromkeys(found, 0.0))
    assert torch.equal(draw(pipe), plain)


def test_strength_by_block(family: str, made: dict[str, Any]) -> None:
    pipe, denoiser = pipeline(family, made), DENOISER[family]
    found = bundles(pipe)
    block = {"sd": "down_blocks.1", "flux": "transformer_blocks.0", "wan": "blocks.0"}[family]
    layer = next(path for path in found[denoiser].entries if path.startswith(block))
    loaded = load(pipe, found)
    loaded.set(0.8, blocks={block: 0.5, f"{denoiser}.{layer}": 0.0})

    def strength(component: str, path: str) -> float:
        inside = path.startswith(f"{block}.") and component in (denoiser, "transformer_2")
        return 0.0 if (component, path) == (denoiser, layer) else 0.4 if inside else 0.8

    assert relative(draw(pipe), draw(merged(pipeline(family, made), found, strength))) < 1e-4
    act = draw(pipe)
    for wrong, told in (
        ({"components": {"vae": 1.0}}, "unknown component with adapters 'vae'"),
        ({"blocks": {"up_blocks.9": 1.0}}, "unknown block of layers with adapters 'up_blocks.9'"),
        ({"strength": float("nan")}, "finite"),
        ({"blocks": {block: float("inf")}}, "finite"),
    ):
        with pytest.raises(ConfigError, match=told):
            loaded.set(**wrong)
        assert torch.equal(draw(pipe), act)


def test_several_at_once_come_off_in_any_order(made: dict[str, Any]) -> None:
    pipe = pipeline("sd", made)
    plain, before = draw(pipe), state(pipe)
    one, two = adapters(pipe.unet, LoRA(rank=2), 1), adapters(pipe.unet, LoKr(rank=2), 2)
    first = load(pipe, one, name="first")
    alone = draw(pipe)
    second = load(pipe, two)
    both = draw(pipe)
    assert relative(both, alone) > 1e-4
    first.unload()
    with load(pipeline("sd", made), two) as other:
        assert other.report.applied == second.report.applied
    first = load(pipe, one, name="first")
    second.unload()
    assert torch.equal(draw(pipe), alone)
    with pytest.raises(AttachError, match="choose another set name"):
        load(pipe, one, name="first")
    first.unload()
    assert state(pipe) == before
    assert torch.equal(draw(pipe), plain)


def test_nothing_is_attached_when_anything_fails(made: dict[str, Any], tmp_path: Path) -> None:
    pipe = pipeline("sd", made)
    found = bundles(pipe)
    encoder = next(iter(found["text_encoder"].entries))
    layer = pipe.text_encoder.get_submodule(encoder)
    layer.forward = layer.forward
    before = state(pipe)
    with pytest.raises(AttachError, match="forward"):
        load(pipe, found)
    assert state(pipe) == before
    del layer.forward
    with pytest.raises(ConfigError, match="finite"):
        load(pipe, found, strength=float("nan"))
    with pytest.raises(ConfigError, match="unknown component of the pipeline 'transformer'"):
        load(pipe, {"transformer": found["unet"]})
    with pytest.raises(ConfigError, match="cannot be combined"):
        load(pipe, found, to="unet")
    save_tensors({"what.ever": torch.zeros(1)}, tmp_path / "strange.safetensors", {})
    with pytest.raises(FileError, match=r"strange\.safetensors: none of its 1 keys is of an adapter"):
        load(pipe, tmp_path / "strange.safetensors")
    flux = kohya(tmp_path / "flux.safetensors", {"transformer": bundles(pipeline("flux", made))["transformer"]})
    with pytest.raises(FileError, match="is a layer of UNet2DConditionModel"):
        load(pipe, flux)
    only = kohya(tmp_path / "only.safetensors", {"text_encoder_3": found["text_encoder"]})
    with pytest.raises(FileError, match="text_encoder_3"):
        load(pipe, only)
    assert not any(isinstance(module, nn.Module) and "lycoris" in path for path, module in pipe.unet.named_modules())


def test_all_stay_when_one_cannot_come_off(made: dict[str, Any]) -> None:
    pipe = pipeline("sd", made)
    loaded = load(pipe, bundles(pipe))
    act = draw(pipe)
    layer = next(iter(loaded.sets["text_encoder"].sites.values())).module
    own = type(layer)
    layer.__class__ = type("Other", (own,), {})
    with pytest.raises(AttachError, match="became a Other"):
        loaded.unload()
    assert torch.equal(draw(pipe), act)
    layer.__class__ = own
    loaded.unload()
    assert not loaded.loaded


def test_all_stay_merged_when_one_cannot_be_unmerged(made: dict[str, Any]) -> None:
    pipe = pipeline("sd", made)
    loaded = load(pipe, bundles(pipe, TLoRA(rank=2)), schedule=RankSchedule(max_rank=2))
    loaded.sets["unet"].rank_masks.unfollow()
    loaded.merge()
    before, act = state(pipe), draw(pipe)
    pipe.text_encoder.load_state_dict(pipe.text_encoder.state_dict())
    for undo in (loaded.unload, loaded.unmerge):
        with pytest.raises(AttachError, match="was written to after this merge"):
            undo()
        assert state(pipe) == before
        assert all(adapters.merged and adapters.attached for adapters in loaded.sets.values())
        assert torch.equal(draw(pipe), act)


@pytest.mark.parametrize("algorithm", [LoRA(rank=2), TLoRA(rank=2)], ids=lambda algorithm: algorithm.name)
def test_an_interrupted_merge_leaves_the_pipeline_as_it_was(
    algorithm: Algorithm, made: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = pipeline("sd", made)
    loaded = load(pipe, bundles(pipe, algorithm), schedule=RankSchedule(max_rank=2))
    before, act = state(pipe), draw(pipe)
    real, left = base_weights.install, [len(loaded.sets["unet"].stacks) + 1]

    def install(*args: Any) -> None:
        left[0] -= 1
        if left[0] == -1:
            raise KeyboardInterrupt
        real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(base_weights, "install", install)
        with pytest.raises(KeyboardInterrupt):
            loaded.merge()
    assert state(pipe) == before
    assert torch.equal(draw(pipe), act)
    loaded.merge()
    with pytest.raises(AttachError, match="merged already"):
        loaded.merge()
    assert all(adapters.merged for adapters in loaded.sets.values())


def test_tlora_follows_the_timesteps(made: dict[str, Any]) -> None:
    pipe = pipeline("wan", made)
    plain, before, found = draw(pipe), state(pipe), bundles(pipe, TLoRA(rank=4))
    loaded = load(pipe, {name: found[name] for name in ("transformer", "transformer_2")})
    assert len(loaded.report.remarks) == 2
    every = draw(pipe)
    for own in loaded.sets.values():
        own.schedule = RankSchedule(max_rank=4)
    masked = draw(pipe)
    assert relative(masked, every) > 1e-5
    loaded.merge()
    assert relative(draw(pipe), masked) < 1e-3
    loaded.unload()
    assert state(pipe) == before
    assert torch.equal(draw(pipe), plain)
    own = {name: found[name] for name in ("transformer", "transformer_2")}
    with load(pipe, own, schedule=RankSchedule(max_rank=4)) as given:
        assert torch.equal(draw(pipe), masked)
        assert not given.report.remarks
    pipe._tlora_config = {"min_rank": 1}
    with load(pipe, own):
        assert torch.equal(draw(pipe), masked)


def test_tlora_on_a_text_encoder_counts_whole(made: dict[str, Any]) -> None:
    pipe = pipeline("sd", made)
    found = {"text_encoder": adapters(pipe.text_encoder, TLoRA(rank=2))}
    plain = draw(pipe)
    for schedule in (None, RankSchedule(max_rank=2)):
        with load(pipe, found, schedule=schedule) as loaded:
            assert loaded.report.remarks == ("text_encoder: it takes no timestep; all ranks count at every step",)
            by_hand = draw(merged(pipeline("sd", made), found, lambda *_: 1.0))
            assert relative(by_hand, plain) > 1e-4
            assert relative(draw(pipe), by_hand) < 1e-4


def test_offloading(made: dict[str, Any]) -> None:
    """By whole models in either order; layer by layer the hooks are where the adapters would be."""
    from accelerate import cpu_offload, cpu_offload_with_hook
    from accelerate.hooks import remove_hook_from_module

    pipe = pipeline("sd", made)
    found = adapters(pipe.unet, LoRA(rank=2))
    with load(pipe, found):
        wanted = draw(pipe)
    cpu_offload_with_hook(pipe.unet, torch.device("cpu"))
    with load(pipe, found):
        assert torch.equal(draw(pipe), wanted)
    remove_hook_from_module(pipe.unet, recurse=True)
    with load(pipe, found):
        cpu_offload_with_hook(pipe.unet, torch.device("cpu"))
        assert torch.equal(draw(pipe), wanted)
        remove_hook_from_module(pipe.unet, recurse=True)
    for merged_first in (True, False):
        pipe = pipeline("sd", made)
        if merged_first:
            AdapterSet.load(pipe.unet, found).merge()
        cpu_offload(pipe.unet, torch.device("cpu"))
        if merged_first:
            assert relative(draw(pipe), wanted) < 1e-4
        else:
            with pytest.raises(AttachError, match="sequential CPU offload, merge"):
                load(pipe, found)


def test_adapters_move_with_the_pipeline_and_are_found_through_a_compiled_model(made: dict[str, Any]) -> None:
    pipe = pipeline("sd", made)
    found = adapters(pipe.unet, LoRA(rank=2))
    pipe.unet = torch.compile(pipe.unet, backend="eager")
    with load(pipe, found) as loaded:
        pipe.to(torch.float64)
        assert {parameter.dtype for parameter in loaded.sets["unet"].parameters()} == {torch.float64}
        assert "unet" in loaded.sets
