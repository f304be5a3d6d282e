"""Files as other programs, other years and other formats left them: each read for what it is, or named for it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lycoris import AdapterSet, DoRA, LoRA, Replace, Rule, plan, read, write
from lycoris.algorithms import OFT
from lycoris.errors import FileError
from lycoris.files import check, convert, detect, encode
from lycoris.files.layout import NamedLayout
from lycoris.files.opening import Opened, parse_opened
from lycoris.files.reading import resolve
from lycoris.models import outline
from lycoris.models.families import ARCHITECTURES

Tensors = dict[str, Tensor]
RANK = 2


def lora(path: str, o: int, i: int, up: str = "lora_up.weight", down: str = "lora_down.weight") -> Tensors:
    return {f"{path}.{up}": torch.randn(o, RANK), f"{path}.{down}": torch.randn(RANK, i)}


def same(found: Opened, other: Opened) -> bool:
    """Whether two files do the same to the same layers."""
    for component, bundle in found.bundles.items():
        theirs = other.bundles[component].entries
        if bundle.entries.keys() != theirs.keys():
            return False
        for layer, stack in bundle.entries.items():
            for mine, its in zip(stack, theirs[layer], strict=True):
                equal = all(torch.equal(tensor, its.tensors[name]) for name, tensor in mine.tensors.items())
                if not equal or mine.algorithm.constants(mine.geometry) != its.algorithm.constants(its.geometry):
                    return False
    return found.bundles.keys() == other.bundles.keys()


# -- diffusers in 2023 -----------------------------------------------------------------------------------------------

BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0.attn2"
ENCODER = "text_model.encoder.layers.0"
ENCODERS = {
    "linear layer": "self_attn.k_proj.lora_linear_layer",
    "lora layer": "self_attn.k_proj.lora_layer",
    "processor's name": "self_attn.to_k_lora",
    "both": "self_attn.k_proj.to_k_lora",
    "out": "self_attn.out_proj.to_out_lora",
    "feed-forward": "mlp.fc1.lora_linear_layer",
}


@pytest.mark.parametrize("prefix", ["unet.", ""])
@pytest.mark.parametrize("spelling", ENCODERS)
def test_processors_and_a_text_encoder_in_one_file(prefix: str, spelling: str) -> None:
    sizes = {"to_q": (320, 320), "to_k": (320, 768), "to_v": (320, 768), "to_out": (320, 320)}
    tensors: Tensors = {}
    for name, size in sizes.items():
        tensors |= lora(f"{prefix}{BLOCK}.processor.{name}_lora", *size, "up.weight", "down.weight")
    rows = 3072 if "fc1" in ENCODERS[spelling] else 768
    tensors |= lora(f"text_encoder.{ENCODER}.{ENCODERS[spelling]}", rows, 768, "up.weight", "down.weight")
    found = parse_opened(tensors, {})
    assert found.detection.family == "sd1.5"
    assert not found.detection.strange
    assert found.detection.algorithms == {"lora": 5}
    assert set(found.bundles[""].entries) == {f"{BLOCK}.{name}{'.0' * (name == 'to_out')}" for name in sizes}
    (layer,) = found.bundles["text_encoder"].entries
    assert ENCODERS[spelling].split(".")[0] in layer


def test_such_a_file_goes_into_two_formats_and_back(tmp_path: Path) -> None:
    tensors = lora(f"unet.{BLOCK}.processor.to_k_lora", 320, 768, "up.weight", "down.weight")
    tensors |= lora(f"text_encoder.{ENCODER}.self_attn.to_q_lora", 768, 768, "up.weight", "down.weight")
    save_file(tensors, tmp_path / "a.safetensors")
    for to in ("kohya", "comfyui"):
        convert(tmp_path / "a.safetensors", tmp_path / f"{to}.safetensors", to)
        convert(tmp_path / f"{to}.safetensors", tmp_path / f"{to}-back.safetensors", "diffusers")
        assert same(parse_opened(tensors, {}), parse_opened(load_file(tmp_path / f"{to}-back.safetensors"), {}))


# -- what was put before, into and behind names ----------------------------------------------------------------------

FLUX = "single_transformer_blocks.3.attn.to_k"
DOTTED = (
    *("module.", "_orig_mod.", "model.", "base_model.model.", "transformer.base_model.model.", "module.transformer."),
    *("transformer.transformer.", "base_model.model.transformer.", "transformer._orig_mod.", "module._orig_mod."),
    *("model.transformer.", "_fsdp_wrapped_module._orig_mod.", "network.module.transformer."),
)
FLAT = {
    "trailing underscore": "lora_unet_single_transformer_blocks_3_attn_to_k_.{}",
    "wrapped": "lora_unet_module_single_transformer_blocks_3_attn_to_k.{}",
    "wrapped by PEFT": "lora_unet_base_model_model_single_transformer_blocks_3_attn_to_k.{}",
    "compiled": "lora_unet__orig_mod_single_transformer_blocks_3_attn_to_k.{}",
    "compiled by block": "lycoris_single_transformer_blocks_3__orig_mod_attn_to_k.{}",
    "compiled layer": "lycoris_single_transformer_blocks_3_attn_to_k__orig_mod.{}",
    "checkpointed": "lycoris_single_transformer_blocks_3__checkpoint_wrapped_module_attn_to_k.{}",
    "no prefix": "single_transformer_blocks_3_attn_to_k.{}",
    "flattened": "single_transformer_blocks_3_attn_to_k_{}",
    "flattened, with a prefix": "lora_unet_single_transformer_blocks_3_attn_to_k_{}",
}


def flux(name: str = "{}", prefix: str = f"transformer.{FLUX}") -> Tensors:
    torch.manual_seed(0)
    return {name.format(f"{prefix}{key}"): tensor for key, tensor in lora("", 3072, 3072).items()}


@pytest.mark.parametrize("prefix", DOTTED)
def test_what_wrappers_put_before_a_name_is_left_out(prefix: str) -> None:
    found = parse_opened(flux(prefix=prefix + FLUX), {})
    assert same(found, parse_opened(flux(), {}))
    told = "\n".join(found.detection.remarks) + "\n".join(found.bundles[""].report.remarks)
    assert "left out" in told or "assumed to be 1" in told


@pytest.mark.parametrize("how", FLAT)
def test_flat_names_with_more_than_the_path(how: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    tensors = {FLAT[how].format(key.removeprefix(".")): tensor for key, tensor in lora("", 3072, 3072).items()}
    found = parse_opened(tensors, {})
    assert same(found, parse_opened(flux(), {}))
    assert found.tensors.keys() == tensors.keys()
    save_file(tensors, tmp_path / "a.safetensors")
    assert "not known to read names such as" in check(tmp_path / "a.safetensors", "simpletuner").keys
    # ComfyUI's own function was asked for each name.
    assert {each.reads for each in check(tmp_path / "a.safetensors", "comfyui").layers.values()} == {"not at all"}


@pytest.mark.parametrize(
    "name",
    [
        "module.transformer.transformer_blocks.0.attn.to_q.",
        "base_model.model.transformer.transformer_blocks.0.attn.to_q.",
        "transformer_blocks.0.attn.to_q_",
        "transformer_blocks_0_attn_to_q_",
    ],
)
def test_names_that_need_another_format_than_they_look_like(name: str) -> None:
    """Read for a model that is at hand: without what stands before them, they are of a format that had none of them."""
    tensors = {f"{name}lora_down.weight": torch.randn(RANK, 3072), f"{name}lora_up.weight": torch.randn(3072, RANK)}
    found = resolve(tensors, outline.load_model("flux.1-dev"))
    assert set(found.entries) == {"transformer_blocks.0.attn.to_q"}
    assert "left out" in "".join(found.remarks)


class Odd(nn.Module):
    """Attributes that are called like what wrappers add."""

    def __init__(self) -> None:
        super().__init__()
        self.module = nn.Sequential(nn.Linear(4, 4))
        self.model = nn.ModuleDict({"layers": nn.Linear(4, 4)})
        self.proj_ = nn.Linear(4, 4)


@pytest.mark.parametrize("dialect", ["lycoris", "bare", "kohya", "comfyui"])
def test_a_models_own_names_stay(dialect: str, tmp_path: Path) -> None:
    model = Odd()
    adapters = AdapterSet.build(model, plan(model, Rule(LoRA(rank=1))))
    write(adapters.bundle(), tmp_path / "a.safetensors", dialect)
    assert set(read(tmp_path / "a.safetensors", model).entries) == {"module.0", "model.layers", "proj_"}


def test_files_of_wrapped_models_fit_plain_ones() -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 4)))
    for name in ("lycoris_0__orig_mod_0", "module.0.0", "_orig_mod.0._checkpoint_wrapped_module.0"):
        found = resolve(lora(name, 4, 4), model)
        assert set(found.entries) == {"0.0"}
        assert "left out" in str(found.report)


# -- PEFT's ----------------------------------------------------------------------------------------------------------


def folder(tmp_path: Path, **settings: object) -> Path:
    tensors = {f"base_model.model.{key}": tensor for key, tensor in flux(prefix=FLUX).items()}
    torch.save(
        {key.replace("lora_up", "lora_B").replace("lora_down", "lora_A"): t for key, t in tensors.items()},
        tmp_path / "adapter_model.bin",
    )
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": ["to_k"], **settings}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    return tmp_path


def test_a_folder_with_pickled_weights_is_like_any_other(tmp_path: Path) -> None:
    source = folder(tmp_path)
    found = detect(source)
    assert (found.dialect, found.algorithms, found.models[""][:4]) == ("peft", {"lora": 1}, "flux")
    assert check(source, "peft").as_trained
    target = tmp_path / "b.safetensors"
    convert(source, target, "kohya-diffusers")
    assert same(parse_opened(flux(), {}), parse_opened(load_file(target), {}))


@pytest.mark.parametrize(("value", "passes"), [(None, True), (False, True), ([], True), (True, False), (3, False)])
def test_settings_that_are_not_known_pass_while_they_are_off(value: object, passes: bool, tmp_path: Path) -> None:
    source = folder(tmp_path, use_something_of_next_year=value)
    if passes:
        detect(source)
        convert(source, tmp_path / "b.safetensors", "kohya-diffusers")
        return
    with pytest.raises(FileError, match="use_something_of_next_year"):
        convert(source, tmp_path / "b.safetensors", "kohya-diffusers")


# -- tensors under other names ---------------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 12)
        self.norm = nn.LayerNorm(12)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(self.fc(x))
        return out


def test_ai_toolkits_magnitude_is_that_of_dora() -> None:
    magnitude = torch.rand(12) + 0.5
    found = resolve(lora("fc", 12, 6, "lora_B.weight", "lora_A.weight") | {"fc.magnitude": magnitude}, Net())
    (entry,) = found.entries["fc"]
    assert isinstance(entry.algorithm, DoRA)
    assert entry.algorithm.axis == "out"
    assert torch.equal(entry.tensors["magnitude"].flatten(), magnitude)


def rotate_weight(weight: Tensor, parts: list[Tensor], alpha: float) -> Tensor:
    """As networks/oft_flux.py of sd-scripts merges it, part by part."""
    found, start = [], 0
    for blocks in parts:
        n, size, _ = blocks.shape
        rows = weight[start : start + n * size].reshape(n, size, -1)
        q = blocks - blocks.mT
        norm = q.norm()
        q = q * ((norm.clamp(max=alpha * n * size) + 1e-8) / (norm + 1e-8))
        eye = torch.eye(size, dtype=q.dtype)
        found.append((((eye + q) @ torch.linalg.inv(eye - q)).mT @ rows).reshape(n * size, -1))
        start += n * size
    return torch.cat(found)


@pytest.mark.parametrize("alpha", [1e-3, 10.0])
@pytest.mark.parametrize("sizes", [[(2, 2), (2, 2), (2, 2)], [(2, 2), (2, 4)], [(3, 4)]])
def test_rotations_in_parts(sizes: list[tuple[int, int]], alpha: float) -> None:
    model = Net().double()
    parts = [torch.randn(n, size, size, dtype=torch.float64) for n, size in sizes]
    tensors = {f"oft_unet_fc.oft_blocks.{at}": part for at, part in enumerate(parts)}
    found = resolve(tensors | {"oft_unet_fc.alpha": torch.tensor(alpha)}, model)
    (entry,) = found.entries["fc"]
    assert isinstance(entry.algorithm, OFT)
    before = model.fc.weight.detach().clone()
    AdapterSet.load(model, found).attach().merge()
    assert (model.fc.weight - rotate_weight(before, parts, alpha)).abs().max() < 1e-6


def test_rotations_that_do_not_fit_name_their_program() -> None:
    tensors = {f"oft_unet_fc.oft_blocks.{at}": torch.zeros(3, 4, 4) for at in range(2)}
    with pytest.raises(FileError, match=r"sd-scripts' networks\.oft_flux has them, rotate 12 \+ 12 rows"):
        resolve(tensors, Net())


# -- full weights ---------------------------------------------------------------------------------------------------

WHOLE: dict[str, Callable[[Tensor, Tensor], Tensors]] = {
    "as the model": lambda w, b: {"norm.weight": w, "norm.bias": b},
    "as Flux.1's code": lambda w, b: {"norm.scale": w, "norm.bias": b},
    "ComfyUI": lambda w, b: {"norm.set_weight": w, "norm.bias.set_weight": b},
    "ComfyUI, by parameter": lambda w, b: {"norm.weight.set_weight": w, "norm.bias.set_weight": b},
    "ComfyUI, Flux.1": lambda w, b: {"norm.scale.set_weight": w, "norm.bias.set_weight": b},
    "FastVideo": lambda w, b: {"norm.set_weight": w, "norm.bias.set_param": b},
}


@pytest.mark.parametrize("how", WHOLE)
def test_whole_weights_replace_a_layers_own(how: str, tmp_path: Path) -> None:
    model, x = Net(), torch.randn(3, 6)
    weight, bias = torch.rand(12), torch.rand(12)
    before, parameters = model(x), [*model.parameters()]
    found = resolve(WHOLE[how](weight, bias) | lora("fc", 12, 6), model)
    assert isinstance(found.entries["norm"][0].algorithm, Replace)
    adapters = AdapterSet.load(model, found).attach()
    plain = Net()
    plain.load_state_dict({**model.state_dict(), "norm.weight": weight, "norm.bias": bias})
    change = found.entries["fc"][0]
    with torch.no_grad():
        plain.fc.weight += change.algorithm.scale(change.geometry) * change.tensors["up"] @ change.tensors["down"]
    whole = model(x)
    assert torch.allclose(whole, plain(x), atol=1e-5)
    write(adapters.bundle(), tmp_path / "a.safetensors")
    again = read(tmp_path / "a.safetensors", model)
    assert torch.equal(again.entries["norm"][0].tensors["w"], weight)
    assert torch.equal(again.entries["norm"][0].tensors["b"], bias)
    adapters.merge()
    assert torch.equal(model.norm.weight, weight)
    adapters.unmerge()
    adapters.detach()
    assert torch.equal(model(x), before)
    assert all(one is other for one, other in zip(parameters, model.parameters(), strict=True))


def test_a_whole_bias_beside_a_lora() -> None:
    model = Net()
    found = resolve(lora("fc", 12, 6) | {"fc.bias": torch.ones(12)}, model)
    assert [type(entry.algorithm) for entry in found.entries["fc"]] == [LoRA, Replace]
    adapters = AdapterSet.load(model, found).attach()
    adapters.merge()
    assert torch.equal(model.fc.bias, torch.ones(12))
    model = Net()
    adapters = AdapterSet.load(model, found).attach()
    written = resolve(encode(adapters.bundle()), model)
    assert torch.equal(written.entries["fc"][1].tensors["b"], torch.ones(12))


def test_changes_of_parameters_by_name() -> None:
    tensors = {"fc.diff_param": torch.ones(12, 6), "norm.diff": torch.ones(12), "norm.bias.diff": torch.ones(12)}
    found = resolve(tensors, Net())
    assert {layer: stack[0].algorithm.name for layer, stack in found.entries.items()} == {"fc": "full", "norm": "norm"}


# -- variants --------------------------------------------------------------------------------------------------------


def test_a_wider_first_layer_is_that_of_a_variant(tmp_path: Path) -> None:
    tensors = flux() | lora("transformer.x_embedder", 3072, 384)
    found = parse_opened(tensors, {})
    assert found.bundles[""].entries["x_embedder"][0].geometry.in_features == 384
    assert any("384 inputs" in remark and "Fill" in remark for remark in found.detection.remarks)
    save_file(tensors, tmp_path / "a.safetensors")
    convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "kohya-diffusers")
    convert(tmp_path / "b.safetensors", tmp_path / "c.safetensors", "diffusers")
    # Chroma has layers of these names too; none of its first ones takes as many inputs either.
    assert detect(tmp_path / "c.safetensors").variants() == "flux.1-schnell or flux.1-dev"


def test_a_shape_that_the_layer_has_is_no_reason_to_refuse() -> None:
    tensors = flux() | lora("transformer.x_embedder", 3072, 128)
    found = parse_opened(tensors | {"transformer.x_embedder.reshape_weight": torch.tensor([3072, 128])}, {})
    assert found.bundles[""].entries["x_embedder"][0].geometry.shape == (3072, 128)
    with pytest.raises(FileError, match="changes the shape of a layer"):
        parse_opened(tensors | {"transformer.x_embedder.reshape_weight": torch.tensor([3072, 64])}, {})


def test_a_text_encoder_alone() -> None:
    found = parse_opened(lora(f"text_encoder.{ENCODER}.self_attn.to_q_lora", 768, 768, "up.weight", "down.weight"), {})
    assert found.detection.dialect == "diffusers"
    assert list(found.bundles["text_encoder"].entries) == [f"{ENCODER}.self_attn.q_proj"]


def test_for_a_model_of_another_variant_it_is_told() -> None:
    layout = NamedLayout.from_outline(ARCHITECTURES["flux1"], "flux.1-dev")
    with pytest.raises(FileError, match=r"x_embedder takes 128 inputs in this file, as in Control \(Canny, Depth\)"):
        resolve(flux() | lora("transformer.x_embedder", 3072, 128), layout)
