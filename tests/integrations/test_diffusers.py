"""Adapters on real pipelines with small random models: on, off, merged, by component and by block."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tiny
from cases import perturb, relative
from lycoris import IA3, OFT, AdapterSet, DoRA, Full, GLoRA, LoHa, LoKr, LoRA, Rule, TLoRA, plan
from lycoris.algorithm import Algorithm
from lycoris.attach import bottom
from lycoris.bundle import Bundle
from lycoris.errors import AttachError, ConfigError, FileError
from lycoris.files import encode, save_tensors
from lycoris.files.peft import encode_peft, lora_adapter_metadata, write_peft
from lycoris.integrations.diffusers import load, models
from lycoris.schedule import RankSchedule

pytestmark = pytest.mark.filterwarnings(
    "ignore:::diffusers", "ignore:::transformers", "ignore:::peft", "ignore:::torch"
)
PIPELINES: dict[str, Callable[[], Any]] = {
    "sd": tiny.sd_pipeline,
    "flux": tiny.flux_pipeline,
    "wan": tiny.wan_pipeline,
}
SIZES: dict[str, dict[str, int]] = {"sd": {}, "flux": {}, "wan": {"num_frames": 5}}
DENOISER = {"sd": "unet", "flux": "transformer", "wan": "transformer"}
ATTENTION = "*[aA]tt*"


@pytest.fixture(scope="module")
def made() -> dict[str, Any]:
    return {}


def pipeline(name: str, made: dict[str, Any]) -> Any:
    if name not in made:
        made[name] = PIPELINES[name]()
        made[name].set_progress_bar_config(disable=True)
        # As `from_pretrained` leaves them: T5 has dropout.
        for model in models(made[name]).values():
            model.eval()
    return copy.deepcopy(made[name])


@pytest.fixture(params=PIPELINES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


def draw(pipe: Any, steps: int = 2) -> Tensor:
    frames = {"num_frames": 5} if hasattr(pipe, "transformer_2") else {}
    seed = torch.Generator().manual_seed(0)
    out = pipe("a cat", height=16, width=16, num_inference_steps=steps, generator=seed, output_type="latent", **frames)
    return out.images if hasattr(out, "images") else out.frames


def adapters(model: nn.Module, algorithm: Algorithm, seed: int = 0) -> Bundle:
    """With an effect, for the attention layers of a model."""
    torch.manual_seed(seed)
    made = AdapterSet.build(model, plan(model, Rule(algorithm, path=ATTENTION), strict=False))
    perturb(made, 0.2)
    return made.bundle()


def bundles(pipe: Any, algorithm: Algorithm | None = None) -> dict[str, Bundle]:
    algorithm = LoRA(rank=2, alpha=3.0) if algorithm is None else algorithm
    return {name: adapters(model, algorithm, at) for at, (name, model) in enumerate(models(pipe).items())}


def merged(pipe: Any, found: dict[str, Bundle], strength: Callable[[str, str], float]) -> Any:
    """The pipeline with every layer's change put into its weight by hand, at a strength by component and path."""
    for component, bundle in found.items():
        own = AdapterSet.load(models(pipe)[component], bundle)
        for path, (adapter, *_) in own.stacks.items():
            layer = own.model.get_submodule(path)
            base = bottom(layer).affine()
            with torch.no_grad():
                whole = adapter.adapted(base)
                layer.weight.copy_(base.weight + strength(component, path) * (whole.weight - base.weight))
    return pipe


def state(pipe: Any) -> list[Any]:
    """Everything that an adapter could leave behind."""
    found: list[Any] = []
    for model in models(pipe).values():
        for path, module in model.named_modules():
            hooks = [len(module._forward_hooks), len(module._forward_pre_hooks)]
            found.append((path, type(module), id(module), hooks, sorted(module.__dict__), list(module._modules)))
        found += [(key, id(tensor)) for key, tensor in [*model.named_parameters(), *model.named_buffers()]]
    return found


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


@pytest.mark.parametrize(
    "algorithm",
    [LoHa(rank=2), LoKr(rank=2), OFT(block_size=2), DoRA(over=LoRA(rank=2)), IA3(), Full(), GLoRA(rank=2)],
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


def kohya(path: Path, found: dict[str, Bundle]) -> Path:
    tensors: dict[str, Tensor] = {}
    for component, bundle in found.items():
        name = "" if component in ("unet", "transformer") else component
        tensors |= encode(bundle, "kohya-diffusers", component=name)
    save_tensors(tensors, path, {})
    return path


def test_a_file_says_what_was_applied_unused_and_missing(made: dict[str, Any], tmp_path: Path) -> None:
    pipe = pipeline("flux", made)
    found = bundles(pipe)
    path = kohya(tmp_path / "whole.safetensors", found)
    loaded = load(pipe, path)
    assert list(loaded.report.applied) == ["transformer", "text_encoder", "text_encoder_2"]
    act = draw(pipe)
    loaded.unload()
    with load(pipe, found):
        assert torch.equal(draw(pipe), act)

    small = pipeline("sd", made)
    own = {"unet": adapters(small.unet, LoRA(rank=2)), "text_encoder_2": found["text_encoder_2"]}
    report = load(small, kohya(tmp_path / "other.safetensors", own)).report
    assert list(report.applied) == ["unet"]
    assert report.unused == ("text_encoder_2",)
    assert report.missing == ("text_encoder",)
    assert "unet: 48 layers of lora\ntext_encoder_2: not in this pipeline, left out\n" in str(report)


def test_experts(made: dict[str, Any], tmp_path: Path) -> None:
    pipe = pipeline("wan", made)
    found = adapters(pipe.transformer, LoRA(rank=2))
    path = kohya(tmp_path / "one.safetensors", {"transformer": found})
    assert list(load(pipe, path).sets) == ["transformer"]
    assert list(load(pipe, path, to="transformer_2").sets) == ["transformer_2"]
    both = load(pipe, path, to=("transformer", "transformer_2"))
    assert list(both.sets) == ["transformer", "transformer_2"]
    with pytest.raises(ConfigError, match=r"unknown component of the pipeline 'transformer_3'; did you mean"):
        load(pipe, path, to="transformer_3")


def test_a_folder_of_pefts_loads(made: dict[str, Any], tmp_path: Path) -> None:
    pipe = pipeline("sd", made)
    found = adapters(pipe.unet, LoRA(rank=2))
    write_peft(found, tmp_path / "a")
    with load(pipe, tmp_path / "a"):
        act = draw(pipe)
    with load(pipe, found):
        assert torch.equal(draw(pipe), act)


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
    with pytest.raises(ConfigError, match="one too many"):
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
    layer = next(iter(loaded.sets["text_encoder"]._layers.values()))
    own = type(layer)
    layer.__class__ = type("Other", (own,), {})
    with pytest.raises(AttachError, match="became a Other"):
        loaded.unload()
    assert torch.equal(draw(pipe), act)
    layer.__class__ = own
    loaded.unload()
    assert not loaded.loaded


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


def diffusers_file(folder: Path, found: dict[str, Bundle]) -> None:
    tensors = {
        f"{component}.{key}": tensor
        for component, bundle in found.items()
        for key, tensor in encode_peft(bundle)[0].items()
    }
    header = {"lora_adapter_metadata": lora_adapter_metadata(found)}
    save_tensors(tensors, folder / "pytorch_lora_weights.safetensors", header)


@pytest.mark.parametrize("kind", ["mixed", "dora"])
def test_diffusers_own_loader_agrees(family: str, kind: str, made: dict[str, Any], tmp_path: Path) -> None:
    """What `pipe.load_lora_weights` makes of the tensors and the metadata of a bundle gives our outputs."""
    pipe, denoiser = pipeline(family, made), DENOISER[family]
    found = {
        denoiser: mixed(pipe, denoiser) if kind == "mixed" else adapters(models(pipe)[denoiser], DoRA(over=LoRA()))
    }
    if family != "wan":
        found["text_encoder"] = adapters(pipe.text_encoder, LoRA(rank=3, alpha=2.0))
    diffusers_file(tmp_path, found)
    plain = draw(pipe)
    with load(pipe, found):
        wanted = draw(pipe)
    assert relative(wanted, plain) > 1e-3
    pipe.load_lora_weights(tmp_path, weight_name="pytorch_lora_weights.safetensors")
    assert relative(draw(pipe), wanted) < 1e-4


def test_diffusers_own_adapters_go_over_these(made: dict[str, Any], tmp_path: Path) -> None:
    pipe = pipeline("sd", made)
    plain = draw(pipe)
    own, theirs = adapters(pipe.unet, LoKr(rank=2), 1), adapters(pipe.unet, LoRA(rank=2), 2)
    diffusers_file(tmp_path, {"unet": theirs})
    with load(pipe, own):
        alone = draw(pipe)
        with load(pipe, theirs):
            both = draw(pipe)
    loaded = load(pipe, own)
    pipe.load_lora_weights(tmp_path, weight_name="pytorch_lora_weights.safetensors")
    assert relative(draw(pipe), both) < 1e-4
    pipe.unload_lora_weights()
    assert torch.equal(draw(pipe), alone)
    pipe.load_lora_weights(tmp_path, weight_name="pytorch_lora_weights.safetensors")
    loaded.unload()
    with pytest.raises(FileError, match=r"^unet: 48 of 48 layers are no layers of this UNet.*unload_lora_weights"):
        load(pipe, own)
    pipe.unload_lora_weights()
    assert torch.equal(draw(pipe), plain)


def mixed(pipe: Any, denoiser: str) -> Bundle:
    """Ranks and alphas that differ from layer to layer."""
    model = models(pipe)[denoiser]
    torch.manual_seed(3)
    rules = [Rule(LoRA(rank=3, alpha=1.0), path="*to_q"), Rule(LoRA(rank=2, alpha=5.0), path="*to_v")]
    made = AdapterSet.build(model, plan(model, [*rules, Rule(LoRA(rank=4), path="*attn*")], strict=False))
    perturb(made, 0.2)
    return made.bundle()


def test_the_second_expert_takes_its_own(made: dict[str, Any], tmp_path: Path) -> None:
    pipe = pipeline("wan", made)
    found = {
        name: adapters(models(pipe)[name], LoRA(rank=2), at) for at, name in enumerate(("transformer", "transformer_2"))
    }
    with load(pipe, found):
        wanted = draw(pipe)
    for component, bundle in found.items():
        folder = tmp_path / component
        diffusers_file(folder, {"transformer": bundle})
        pipe.load_lora_weights(
            folder,
            weight_name="pytorch_lora_weights.safetensors",
            adapter_name=component,
            load_into_transformer_2=component == "transformer_2",
        )
    assert relative(draw(pipe), wanted) < 1e-4
    assert json.loads(lora_adapter_metadata(found))["transformer_2.r"] == 2
