"""Old and foreign forms of tensors, and what programs wrote that means something else than it says."""

from __future__ import annotations

import json
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import tiny
from lycoris import TLoRA
from lycoris.algorithms.tensors import read_tensors
from lycoris.errors import FileError
from lycoris.files import resolve
from lycoris.layers.geometry import describe

pytestmark = pytest.mark.filterwarnings("ignore:::diffusers", "ignore:::transformers")


@pytest.fixture(scope="module")
def flux() -> nn.Module:
    return tiny.flux_transformer().eval()


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
        assert "DyLoRA was trained at 2 times the stored scale" in told
        assert self.scale({"lycoris_config": json.dumps({"algo": "dylora"})})[0] == 2.0
        assert self.scale(said | {"lycoris_scale": "{}"})[0] == 0.5, "this library wrote it"

    @pytest.mark.parametrize("block", ["0", "-1", "a", "9" * 400, "5", [2], 1.5])
    def test_dylora_of_no_number_of_ranks(self, block: Any) -> None:
        said = {"ss_network_args": json.dumps({"algo": "dylora", "block_size": block})}
        with pytest.raises(FileError, match=r"0 is a DyLoRA of rank 4 and block_size .*, as its header says; 1 to 4"):
            self.scale(said)

    @pytest.mark.parametrize("text", ["[" * 100_000, "[]", "{", "null"])
    @pytest.mark.parametrize("key", ["ss_network_args", "lycoris_config", "lycoris_base"])
    def test_headers_that_say_nothing(self, key: str, text: str) -> None:
        assert self.scale({key: text})[0] == 0.5

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

    def test_a_scale_is_of_the_ranks(self) -> None:
        a1, a2, b1, b2 = torch.randn(2, 5), torch.randn(5, 2), torch.randn(2, 5), torch.randn(6, 2)
        glora = {"a1__weight": a1, "a2__weight": a2, "b1__weight": b1, "b2__weight": b2}
        lokr = {"lokr_w1_a": torch.randn(3, 2), "lokr_w1_b": torch.randn(2, 5), "lokr_w2": torch.randn(2, 1)}
        for tensors in (glora, lokr):
            (entry,) = self.entries(**tensors, scale=torch.tensor(0.3))
            assert entry.algorithm.scale(entry.geometry) == pytest.approx(0.3)

    def test_rotations_themselves(self) -> None:
        q = torch.randn(3, 2, 2, dtype=torch.float64)
        q = q - q.mT
        eye = torch.eye(2, dtype=torch.float64)
        (entry,) = self.entries(oft_diag=(eye + q) @ torch.linalg.inv(eye - q))
        blocks = entry.tensors["blocks"]
        assert torch.allclose(blocks - blocks.mT, q)
        with pytest.raises(FileError, match="rotation by 180 degrees"):
            self.entries(oft_diag=-eye.expand(3, 2, 2).contiguous())

    def test_scale_in_place_of_alpha(self) -> None:
        (entry,) = self.entries(
            lora_up__weight=torch.randn(6, 2), lora_down__weight=torch.randn(2, 5), scale=torch.tensor(0.3)
        )
        assert entry.algorithm.scale(entry.geometry) == pytest.approx(0.3)

    @pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float16, torch.bfloat16, torch.float32], ids=str)
    @pytest.mark.parametrize("alpha", [1.3, 1e5, 2.0])
    def test_the_scale_of_a_bias_is_not_rounded(self, alpha: float, dtype: torch.dtype) -> None:
        factors = {"lora_up__weight": torch.ones(6, 2, dtype=dtype), "lora_down__weight": torch.ones(2, 5, dtype=dtype)}
        bias = torch.full((6,), 0.5).to(dtype)
        _, moved = self.entries(**factors, lora_up__bias=bias, alpha=torch.tensor(alpha))
        assert torch.allclose(moved.tensors["diff_b"].double(), bias.double() * alpha / 2, rtol=1e-6)

    @pytest.mark.parametrize(
        ("changed", "words"),
        [
            ({"bias_size": torch.tensor([-6, -5])}, r"sparse entries of shape \(-6, -5\) do not fit"),
            ({"bias_size": torch.tensor([6.0, 5.0])}, "integers are expected"),
            ({"bias_indices": torch.tensor([[0.5], [1.0]])}, "integers are expected"),
            ({"bias_indices": torch.zeros(2, 2, 1, dtype=torch.int64)}, "do not fit"),
        ],
    )
    def test_sparse_places_that_are_none(self, changed: dict[str, Tensor], words: str) -> None:
        good = {
            "bias_indices": torch.tensor([[0], [1]]),
            "bias_values": torch.ones(1),
            "bias_size": torch.tensor([6, 5]),
        }
        small = {"bias_indices": torch.tensor([[0], [1]], dtype=torch.uint16)}
        assert self.entries(**(good | small))[-1].tensors["diff"][0, 1] == 1
        with pytest.raises(FileError, match=words):
            self.entries(**(good | changed))

    @pytest.mark.parametrize(
        "alpha", [torch.ones(2), torch.tensor(1j), torch.tensor([])], ids=["two", "complex", "none"]
    )
    def test_alphas_that_are_none(self, alpha: Tensor) -> None:
        factors = {"lora_up__weight": torch.ones(6, 2), "lora_down__weight": torch.ones(2, 5)}
        for beside in ({}, {"lora_up__bias": torch.ones(6)}):
            with pytest.raises(FileError, match=r"0\.alpha must be one finite number"):
                self.entries(**factors, **beside, alpha=alpha)

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
        found = resolve(named, self.MODEL)
        assert len(found.entries["0"]) == 2
        assert "its scale is assumed to be 1" in str(found.report)

    def test_scale_of_what_has_no_ranks(self) -> None:
        w1, w2 = torch.randn(2, 1, dtype=torch.float16), torch.randn(3, 5)
        (entry,) = self.entries(lokr_w1=w1, lokr_w2=w2, scale=torch.tensor(0.3))
        delta = entry.algorithm.delta(entry.tensors, entry.geometry).weight * entry.algorithm.scale(entry.geometry)
        assert torch.allclose(delta, torch.kron(w1.float(), w2) * 0.3)
        (entry,) = self.entries(diff=torch.ones(6, 5), scale=torch.tensor(0.25))
        assert torch.equal(entry.tensors["diff"], torch.full((6, 5), 0.25))

    @pytest.mark.parametrize("scale", [torch.ones(6), torch.tensor(1j)], ids=["many", "complex"])
    def test_scales_that_are_none(self, scale: Tensor) -> None:
        """A control LoRA of Black Forest Labs has the scales of norms under that name."""
        with pytest.raises(FileError, match=r"0\.scale must be one finite number"):
            self.entries(lora_up__weight=torch.randn(6, 2), lora_down__weight=torch.randn(2, 5), scale=scale)
        with pytest.raises(FileError, match=r"0\.scale is next to oft_blocks, which has no scale"):
            self.entries(oft_blocks=torch.zeros(3, 2, 2), scale=torch.tensor(1.0))

    @pytest.mark.parametrize("names", [("diff", "diff_b"), ("diff",), ("diff_b",), ("w_norm",), ("b_norm",)])
    def test_norms_by_other_names_or_half(self, names: tuple[str, ...]) -> None:
        model = nn.Sequential(nn.LayerNorm(4))
        bundle = resolve({f"lora_unet_0.{name}": torch.ones(4) for name in names}, model, "kohya")
        (entry,) = bundle.entries["0"]
        assert entry.algorithm.name == "norm"
        sums = {slot: float(tensor.sum()) for slot, tensor in entry.tensors.items()}
        scale, shift = {"diff", "w_norm"} & {*names}, {"diff_b", "b_norm"} & {*names}
        assert sums == {"w": 4.0 if scale else 0.0, "b": 4.0 if shift else 0.0}

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
        own = {algorithm.tensor_names[slot]: torch.randn(what.shape) for slot, what in algorithm.slots(layer).items()}
        named = {f"{at}.processor.to_k_lora.{suffix}": tensor for suffix, tensor in own.items()}
        (entry,) = resolve(named, model).entries[f"{at}.to_k"]
        expected = read_tensors(own, layer, at)[1]
        assert entry.algorithm.scale(layer) == 1.0
        assert all(torch.equal(entry.tensors[slot], tensor) for slot, tensor in expected.items())
