"""From one dialect to another, by files: what the adapters do to a model stays what it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import tiny
from cases import perturb, relative
from lycoris import IA3, OFT, AdapterSet, DoRA, Full, GLoRA, LoHa, LoKr, LoRA, Rule, TLoRA, plan, read, write
from lycoris.algorithm import Algorithm
from lycoris.algorithms import read_tensors
from lycoris.errors import FileError
from lycoris.files import check, convert, detect, header, load_tensors, resolve
from lycoris.files.consumers import CONSUMERS
from lycoris.files.weights import BaseWeights
from lycoris.geometry import describe

pytestmark = pytest.mark.filterwarnings("ignore:::diffusers", "ignore:::transformers", "ignore:::peft")

DIALECTS = (
    "lycoris",
    "kohya",
    "kohya-diffusers",
    "musubi",
    "comfyui",
    "onetrainer-comfy",
    "onetrainer-original",
    "bare",
)
"""That hold every algorithm on linear layers, or say that they do not."""


@pytest.fixture(scope="module")
def flux() -> nn.Module:
    torch.manual_seed(0)
    return tiny.flux_transformer().eval()


def adapted(model: nn.Module, algorithm: Algorithm, path: str = "*attn.*") -> AdapterSet:
    torch.manual_seed(1)
    adapters = AdapterSet.build(model, plan(model, Rule(algorithm, path=path), strict=False))
    perturb(adapters)
    return adapters


def weights(model: nn.Module, adapters: AdapterSet) -> dict[str, Tensor]:
    """Of all layers, with the adapters merged."""
    adapters.merge()
    found = {name: p.detach().clone() for name, p in model.named_parameters() if "adapter_" not in name}
    adapters.unmerge()
    return found


def loaded(model: nn.Module, path: Path) -> dict[str, Tensor]:
    return weights(model, AdapterSet.load(model, read(path, model)))


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    for name in one:
        assert relative(one[name], other[name]) < 1e-6, name


ALGORITHMS: dict[str, Algorithm] = {
    "lora": LoRA(rank=2, alpha=1.0),
    "loha": LoHa(rank=2, alpha=1.0),
    "lokr": LoKr(rank=1, alpha=0.5),
    "full": Full(bias=False),
    "dora": DoRA(over=LoRA(rank=2)),
    "tlora": TLoRA(rank=2),
}


@pytest.mark.filterwarnings("ignore:merging adapters that were trained:UserWarning")
@pytest.mark.parametrize("name", ALGORITHMS)
def test_around_the_houses(name: str, flux: nn.Module, tmp_path: Path) -> None:
    """Through one dialect after the other, fused and split and fused again, and back."""
    adapters = adapted(flux, ALGORITHMS[name], "*transformer_blocks.0.*")
    expected = weights(flux, adapters)
    at = tmp_path / "0.safetensors"
    write(adapters.bundle(), at, "lycoris")
    for i, dialect in enumerate(("comfyui", "kohya", "onetrainer-comfy", "kohya-diffusers", "bare", "lycoris")):
        then = tmp_path / f"{i + 1}.safetensors"
        convert(at, then, dialect, base=flux)
        same(loaded(flux, then), expected)
        at = then


def test_what_stays_fused_stays_what_it_is(flux: nn.Module, tmp_path: Path) -> None:
    """Between two dialects that have the fused layer nothing is taken apart."""
    adapters = adapted(flux, LoKr(rank=1))
    write(adapters.bundle(), tmp_path / "a.safetensors", "kohya")
    convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "comfyui", base=flux)
    convert(tmp_path / "b.safetensors", tmp_path / "c.safetensors", "kohya", base=flux)
    before, after = load_file(tmp_path / "a.safetensors"), load_file(tmp_path / "c.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_into_diffusers_own_loader(tmp_path: Path) -> None:
    pipe = tiny.flux_pipeline()
    pipe.transformer.eval()
    adapters = adapted(pipe.transformer, LoRA(rank=2, alpha=1.0), "*transformer_blocks.0.attn.*")
    write(adapters.bundle(), tmp_path / "a.safetensors", "kohya")
    inputs = flux_inputs()
    adapters.attach()
    expected = pipe.transformer(**inputs)[0]
    adapters.detach()
    convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "diffusers", base=pipe.transformer)
    pipe.load_lora_weights(tmp_path, weight_name="b.safetensors")
    assert relative(pipe.transformer(**inputs)[0], expected) < 1e-5


def flux_inputs() -> dict[str, Any]:
    torch.manual_seed(3)
    return {
        "hidden_states": torch.randn(1, 4, 16),
        "encoder_hidden_states": torch.randn(1, 3, 16),
        "pooled_projections": torch.randn(1, 16),
        "timestep": torch.tensor([0.5]),
        "guidance": torch.tensor([1.0]),
        "img_ids": torch.zeros(4, 3),
        "txt_ids": torch.zeros(3, 3),
        "return_dict": False,
    }


@pytest.mark.parametrize("program", ["comfyui", "webui", "invokeai", "diffusers"])
@pytest.mark.parametrize(
    "algorithm", [DoRA(over=LoRA(rank=2)), GLoRA(rank=2), IA3(), OFT(block_size=4, rescale=True)], ids=lambda a: a.name
)
def test_portable_with_the_base_at_hand(algorithm: Algorithm, program: str, flux: nn.Module, tmp_path: Path) -> None:
    adapters = adapted(flux, algorithm, "*transformer_blocks.0.attn.*")
    expected = weights(flux, adapters)
    write(adapters.bundle(), tmp_path / "a.safetensors", "lycoris")
    save_file({k: v.contiguous() for k, v in flux.state_dict().items()}, tmp_path / "base.safetensors")
    base = BaseWeights.open(tmp_path / "base.safetensors")
    to = tmp_path / "b.safetensors"
    done = convert(tmp_path / "a.safetensors", to, portable=program, base=flux, weights=base)
    same(loaded(flux, to), expected)
    assert all(each.reads == "as trained" for each in check(to, program, base=flux).layers.values())
    stacks = adapters.bundle().entries.values()
    changed = any(CONSUMERS[program].verdict(entry).reads != "as trained" for stack in stacks for entry in stack)
    assert bool(done.written.notes) >= changed


def test_portable_without_the_weights_that_it_needs(flux: nn.Module, tmp_path: Path) -> None:
    write(adapted(flux, GLoRA(rank=2)).bundle(), tmp_path / "a.safetensors", "lycoris")
    with pytest.raises(FileError, match=r"webui would need of glora depends on the base model's weights.*--base"):
        convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", portable="webui", base=flux)
    assert not (tmp_path / "b.safetensors").exists()


@pytest.mark.parametrize(("to", "portable", "words"), [
    ("comfy", None, "unknown dialect 'comfy'; did you mean 'comfyui'"),
    (None, "comfi", "unknown program 'comfi'; did you mean 'comfyui'"),
    (None, None, "say what to convert to"),
])  # fmt: skip
def test_unknown_words(to: str | None, portable: str | None, words: str, flux: nn.Module, tmp_path: Path) -> None:
    write(adapted(flux, LoRA(rank=2)).bundle(), tmp_path / "a.safetensors", "lycoris")
    with pytest.raises(FileError, match=words):
        convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", to, portable=portable, base=flux)


def test_what_a_dialect_cannot_hold(flux: nn.Module, tmp_path: Path) -> None:
    write(adapted(flux, LoHa(rank=2)).bundle(), tmp_path / "a.safetensors", "lycoris")
    with pytest.raises(FileError, match=r"has loha; diffusers files hold only dora, dylora, lora.*--portable"):
        convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "diffusers", base=flux)
    convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", portable="diffusers", base=flux)
    assert detect(tmp_path / "b.safetensors").dialect == "diffusers"


def test_a_folder_of_pefts(flux: nn.Module, tmp_path: Path) -> None:
    adapters = adapted(flux, LoHa(rank=2, alpha=1.0))
    expected = weights(flux, adapters)
    write(adapters.bundle(), tmp_path / "a.safetensors", "lycoris")
    convert(tmp_path / "a.safetensors", tmp_path / "peft", "peft", base=flux)
    same(loaded(flux, tmp_path / "peft"), expected)
    same(loaded(flux, tmp_path / "peft" / "adapter_model.safetensors"), expected)


def test_metadata_is_kept_and_what_is_stale_is_not(flux: nn.Module, tmp_path: Path) -> None:
    said = {"ss_output_name": "x", "sshs_model_hash": "0", "modelspec.title": "y"}
    write(adapted(flux, LoRA(rank=2)).bundle(), tmp_path / "a.safetensors", "kohya", metadata=said)
    convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "diffusers", base=flux)
    kept = header(tmp_path / "b.safetensors").metadata
    assert kept["ss_output_name"] == "x"
    assert kept["modelspec.title"] == "y"
    assert "sshs_model_hash" not in kept
    assert json.loads(kept["lora_adapter_metadata"])["transformer.r"] == 6
    convert(tmp_path / "b.safetensors", tmp_path / "c.safetensors", "kohya", base=flux)
    after = header(tmp_path / "c.safetensors").metadata
    assert "lora_adapter_metadata" not in after
    assert after["lycoris_base"] == header(tmp_path / "a.safetensors").metadata["lycoris_base"]
    assert after["lycoris_scale"] == '{"*": 1.0}'
    assert read(tmp_path / "c.safetensors", flux).report.remarks == ()


class TestAsTrained:
    """What programs wrote that means something else than it says."""

    GROUP: ClassVar = {
        "lora_up.weight": torch.randn(6, 4),
        "lora_down.weight": torch.randn(4, 5),
        "alpha": torch.tensor(2.0),
    }

    def scale(self, header: dict[str, str], model: nn.Module | None = None) -> tuple[float, str]:
        model = nn.Sequential(nn.Linear(5, 6)) if model is None else model
        tensors = {f"lora_unet_0.{suffix}": tensor for suffix, tensor in self.GROUP.items()}
        bundle = resolve(tensors, model, "kohya", metadata=header)
        ((entry,),) = bundle.entries.values()
        return entry.algorithm.scale(entry.geometry), str(bundle.report)

    def test_dylora(self) -> None:
        assert self.scale({})[0] == 0.5
        said = {"ss_network_args": json.dumps({"algo": "dylora", "block_size": "2"})}
        scale, told = self.scale(said)
        assert scale == 1.0
        assert "DyLoRA was trained at 2 times the scale" in told
        assert self.scale({"lycoris_config": json.dumps({"algo": "dylora"})})[0] == 2.0
        assert self.scale(said | {"lycoris_scale": "{}"})[0] == 0.5, "this library wrote it"

    @pytest.mark.parametrize(
        ("args", "factor"), [({"split_qkv": "True"}, 3.0), ({}, 1.0), ({"split_qkv": "False"}, 1.0)]
    )
    def test_split_qkv(self, args: dict[str, str], factor: float, flux: nn.Module) -> None:
        up = torch.zeros(96, 6)
        for part in range(3):
            up[part * 32 : part * 32 + 32, part * 2 : part * 2 + 2] = torch.randn(32, 2)
        key = "lora_unet_double_blocks_0_img_attn_qkv"
        tensors = {f"{key}.lora_up.weight": up, f"{key}.lora_down.weight": torch.randn(6, 32)}
        tensors[f"{key}.alpha"] = torch.tensor(2.0)
        bundle = resolve(tensors, flux, metadata={"ss_network_args": json.dumps(args)})
        scales = {e.algorithm.scale(e.geometry) for (e,) in bundle.entries.values()}
        assert scales == {2.0 / 6 * factor}
        assert ("as 3 adapters of rank 2" in str(bundle.report)) == (factor == 3)


class TestOldForms:
    MODEL = nn.Sequential(nn.Linear(5, 6))

    def entries(self, **tensors: Tensor) -> Any:
        named = {f"lora_unet_0.{name.replace('__', '.')}": tensor for name, tensor in tensors.items()}
        return resolve(named, self.MODEL, "kohya").entries["0"]

    def test_glora(self) -> None:
        a1, a2, b1, b2 = torch.randn(2, 5), torch.randn(5, 2), torch.randn(2, 5), torch.randn(6, 2)
        (entry,) = self.entries(a1__weight=a1, a2__weight=a2, b1__weight=b1, b2__weight=b2, alpha=torch.tensor(1.0))
        assert torch.equal(entry.tensors["a1"], a2)
        assert torch.equal(entry.tensors["b1"], b2)

    def test_rotations_themselves(self) -> None:
        q = torch.randn(3, 2, 2, dtype=torch.float64)
        q = q - q.mT
        eye = torch.eye(2, dtype=torch.float64)
        (entry,) = self.entries(oft_diag=(eye + q) @ torch.linalg.inv(eye - q))
        blocks = entry.tensors["blocks"]
        assert torch.allclose(blocks - blocks.mT, q)
        with pytest.raises(FileError, match="half a circle"):
            self.entries(oft_diag=-eye.expand(3, 2, 2).contiguous())

    def test_scale_in_place_of_alpha(self) -> None:
        (entry,) = self.entries(
            lora_up__weight=torch.randn(6, 2), lora_down__weight=torch.randn(2, 5), scale=torch.tensor(0.3)
        )
        assert entry.algorithm.scale(entry.geometry) == pytest.approx(0.3)

    def test_sparse_places_and_a_bias(self) -> None:
        stack = self.entries(
            lora_up__weight=torch.randn(6, 2),
            lora_down__weight=torch.randn(2, 5),
            bias_indices=torch.tensor([[0, 5], [1, 4]]),
            bias_values=torch.tensor([2.0, 3.0]),
            bias_size=torch.tensor([6, 5]),
            diff_b=torch.ones(6),
        )
        assert [entry.algorithm.name for entry in stack] == ["lora", "full", "full"]
        assert stack[2].tensors["diff"][5, 4] == 3.0
        with pytest.raises(FileError, match="outside of"):
            self.entries(
                bias_indices=torch.tensor([[6], [1]]), bias_values=torch.ones(1), bias_size=torch.tensor([6, 5])
            )

    def test_pefts_bias(self) -> None:
        named = {
            "base_model.model.0.lora_A.weight": torch.randn(2, 5),
            "base_model.model.0.lora_B.weight": torch.randn(6, 2),
            "base_model.model.0.lora_B.bias": torch.ones(6),
        }
        assert len(resolve(named, self.MODEL, strict=False).entries["0"]) == 2
        with pytest.raises(FileError, match=r"their scale only beside its adapter_config\.json"):
            resolve(named, self.MODEL)

    @pytest.mark.parametrize("suffix", ["set_weight", "reshape_weight", "lokr_t1", "oft_R.weight"])
    def test_known_and_refused(self, suffix: str) -> None:
        with pytest.raises(FileError, match=rf"0\.{suffix} \w+"):
            self.entries(**{suffix.replace(".", "__"): torch.ones(2)})

    def test_attention_processors(self) -> None:
        model = tiny.sdxl_unet()
        at = "down_blocks.1.attentions.0.transformer_blocks.0.attn1"
        named = {
            f"unet.{at}.processor.to_q_lora.down.weight": torch.randn(2, 16),
            f"unet.{at}.processor.to_q_lora.up.weight": torch.randn(16, 2),
            f"unet.{at}.processor.to_out_lora.down.weight": torch.randn(2, 16),
            f"unet.{at}.processor.to_out_lora.up.weight": torch.randn(16, 2),
        }
        assert resolve(named, model).entries.keys() == {f"{at}.to_q", f"{at}.to_out.0"}

    def test_the_files_of_t_loras_authors(self) -> None:
        model = tiny.sdxl_unet()
        at = "down_blocks.1.attentions.0.transformer_blocks.0.attn1"
        layer = describe(model.get_submodule(f"{at}.to_k"))
        assert layer is not None
        algorithm = TLoRA(rank=2)
        own = {algorithm.keys[slot]: torch.randn(what.shape) for slot, what in algorithm.slots(layer).items()}
        named = {f"{at}.processor.to_k_lora.{suffix}": tensor for suffix, tensor in own.items()}
        (entry,) = resolve(named, model).entries[f"{at}.to_k"]
        expected = read_tensors(own, layer, at)[1]
        assert entry.algorithm.scale(layer) == 1.0
        assert all(torch.equal(entry.tensors[slot], tensor) for slot, tensor in expected.items())


def test_load_tensors_of_a_conversion_are_its_own(flux: nn.Module, tmp_path: Path) -> None:
    """The source may be removed while the result is in use."""
    write(adapted(flux, LoRA(rank=2)).bundle(), tmp_path / "a.safetensors", "lycoris")
    convert(tmp_path / "a.safetensors", tmp_path / "a.safetensors", "kohya-diffusers", base=flux)
    assert all(key.startswith("lora_unet_") for key in load_tensors(tmp_path / "a.safetensors")[0])
