"""The module classes by lycoris-lora's names, and the functions that find one for the tensors of a file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lycoris.algorithms import BOFT, IA3, OFT, DyLoRA, Full, GLoRA, LoHa, LoKr, LoRA, Norm, TLoRA
from lycoris.algorithms.base import Algorithm
from lycoris.algorithms.dora import unwrap_dora
from lycoris.algorithms.tensors import ALPHA
from lycoris.compat.assignable import AdapterProperty
from lycoris.compat.base_module import LycorisBaseModule, build_module_config
from lycoris.compat.functional.diag_oft import get_r
from lycoris.compat.functional.general import weight_decompose
from lycoris.compat.legacy_options import log_remarks
from lycoris.errors import FileError
from lycoris.layers.geometry import Geometry
from lycoris.targeting.options import TOP, parse_optional, parse_options
from lycoris.targeting.remarks import Remark

__all__ = [
    "MODULE_LIST",
    "ButterflyOFTModule",
    "DiagOFTModule",
    "DyLoraModule",
    "FullModule",
    "GLoRAModule",
    "IA3Module",
    "LoConModule",
    "LohaModule",
    "LokrModule",
    "NormModule",
    "TLoraModule",
    "get_module",
    "make_module",
    "network_module_dict",
]
"""Names that `lycoris.modules`, `lycoris.kohya` and `lycoris.wrapper` all export."""

_SCALES = ("alpha", "dora_scale")
_COMMON_OPTIONS = ("use_tucker", "use_scalar", "rank_dropout_scale", "weight_decompose", "bypass_mode", "rs_lora")


class _FactorModule(LycorisBaseModule):
    """A module whose ΔW is a product of factors."""

    def get_weight(self, shape: Sequence[int] | None = None) -> Tensor:
        """Return scale·ΔW, with the scalar and without dropout; of DoRA, that of the algorithm inside it.

        `shape` reshapes it; None keeps that of the layer's weight.
        """
        weight = self._compute_unscaled_delta() * self.scale
        return weight if shape is None else weight.reshape(*shape)

    def apply_weight_decompose(self, weight: Tensor, multiplier: float = 1) -> Tensor:
        """Return a weight with the norms that DoRA trains; see `lycoris.functional.weight_decompose`."""
        return weight_decompose(weight, self.dora_scale, multiplier, self.wd_on_out)


class LoConModule(_FactorModule):
    """LoRA: ΔW = (alpha/r)·up·down (arXiv:2106.09685), and LoCon on convolutions.

    See `lycoris.algorithms.LoRA`. `lora_down.weight` is (r, I, *K), `lora_up.weight` (O, r, 1, ...).
    """

    name = "locon"
    weight_list = ("lora_up.weight", "lora_down.weight", "lora_mid.weight", *_SCALES)
    weight_list_det = ("lora_up.weight",)

    def make_weight(self, device: Any = None) -> Tensor:
        """Return up·down, with the scalar, without the scale and without dropout."""
        return self._compute_unscaled_delta().to(device)


class LohaModule(_FactorModule):
    """LoHa: ΔW = (alpha/r)·(w1_a·w1_b ⊙ w2_a·w2_b) (FedPara, arXiv:2108.06098).

    See `lycoris.algorithms.LoHa`. Shapes without Tucker cores: `hada_w1_a` (O, r), `hada_w1_b` (r, I·K), likewise w2.
    """

    name = "loha"
    algo = "loha"
    weight_list = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2", *_SCALES)
    weight_list_det = ("hada_w1_a",)


class LokrModule(_FactorModule):
    """LoKr: ΔW = (alpha/r)·(w1 ⊗ w2), a Kronecker product (arXiv:2212.10650).

    See `lycoris.algorithms.LoKr`. Each factor is a full matrix or a product of two; with both full the scale is 1.
    """

    name = "kron"
    algo = "lokr"
    weight_list = (
        *("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t1", "lokr_t2"),
        *_SCALES,
    )
    weight_list_det = ("lokr_w1", "lokr_w1_a")
    positional = (
        *("use_tucker", "use_scalar", "decompose_both", "factor", "rank_dropout_scale", "weight_decompose"),
        *("wd_on_out", "full_matrix", "bypass_mode", "rs_lora", "unbalanced_factorization"),
    )

    @AdapterProperty
    def use_w1(self) -> bool:
        """Whether the first factor is a full matrix."""
        return "w1" in self.adapter.tensors()

    @AdapterProperty
    def use_w2(self) -> bool:
        """Whether the second factor is a full matrix."""
        return "w2" in self.adapter.tensors()

    @AdapterProperty
    def full_matrix(self) -> bool:
        """Whether both factors are full matrices."""
        return self.use_w1 and self.use_w2


class FullModule(LycorisBaseModule):
    """Full fine-tuning: the complete change of weight and bias.

    See `lycoris.algorithms.Full`. Quantized weights are refused with `ConfigError`.
    """

    name = "full"
    algo = "full"
    weight_list = ("diff", "diff_b")
    weight_list_det = ("diff",)
    positional = ("use_tucker", "use_scalar", "rank_dropout_scale", "bypass_mode")


class DiagOFTModule(LycorisBaseModule):
    """Diag-OFT: the weight multiplied by a block-diagonal rotation (arXiv:2306.07280).

    See `lycoris.algorithms.OFT`. `oft_blocks` is (n, b, b) with n·b output features.
    """

    name = "diag-oft"
    algo = "diag-oft"
    weight_list = ("oft_blocks", "rescale", "alpha")
    weight_list_det = ("oft_blocks",)
    positional = ("use_tucker", "use_scalar", "rank_dropout_scale", "constraint", "rescaled", "bypass_mode")
    blocks_dim: ClassVar[int] = 3

    @classmethod
    def algo_check(cls, state_dict: Mapping[str, Tensor], lora_name: str) -> bool:
        blocks = state_dict.get(f"{lora_name}.oft_blocks")
        return blocks is not None and blocks.dim() == cls.blocks_dim

    @AdapterProperty
    def block_num(self) -> int:
        """Number of blocks in each stage."""
        return self.adapter.tensors()["blocks"].shape[-3]

    @AdapterProperty
    def I(self) -> Tensor:  # noqa: E743, N802  # its name in lycoris-lora
        """The identity matrix of a block."""
        blocks = self.adapter.tensors()["blocks"]
        return torch.eye(blocks.shape[-1], dtype=blocks.dtype, device=blocks.device)

    def get_r(self) -> Tensor:
        """Return the rotation of each block.

        Shape (n, b, b); of BOFT (m, n, b, b).
        """
        bound = self.inner.export_alpha(self.geometry) or 0.0
        return get_r(self.adapter.tensors()["blocks"], self.I, bound * self.geometry.out_features)


class ButterflyOFTModule(DiagOFTModule):
    """BOFT: block-diagonal rotations in butterfly stages (arXiv:2311.06243).

    See `lycoris.algorithms.BOFT`. `oft_blocks` is (m, n, b, b) with m stages and n·b output features.
    """

    name = "boft"
    algo = "boft"
    blocks_dim = 4

    @AdapterProperty
    def boft_m(self) -> int:
        """Number of stages."""
        return self.adapter.tensors()["blocks"].shape[0]

    @AdapterProperty
    def boft_b(self) -> int:
        """Size of a block."""
        return self.adapter.tensors()["blocks"].shape[-1]


class GLoRAModule(LycorisBaseModule):
    """GLoRA: a low-rank change, and one that depends on the weight (arXiv:2306.07967).

    See `lycoris.algorithms.GLoRA`.
    """

    name = "glora"
    algo = "glora"
    weight_list = ("a1.weight", "a2.weight", "b1.weight", "b2.weight", "bm.weight", "alpha")
    weight_list_det = ("a1.weight",)
    positional = _COMMON_OPTIONS


class DyLoraModule(LycorisBaseModule):
    """DyLoRA: a LoRA trained at all ranks up to its own (arXiv:2210.07558).

    See `lycoris.algorithms.DyLoRA`. Its files are LoRA files, and `get_module` finds `LoConModule` for them.
    """

    algo = "dylora"
    positional = (_COMMON_OPTIONS[0], "block_size", *_COMMON_OPTIONS[1:], "train_on_input")


class IA3Module(LycorisBaseModule):
    """(IA)³: learned factors on inputs or outputs (arXiv:2205.05638).

    See `lycoris.algorithms.IA3`. It has no rank.
    """

    name = "ia3"
    algo = "ia3"
    weight_list = ("weight", "on_input")
    weight_list_det = ("on_input",)
    positional = (*_COMMON_OPTIONS, "train_on_input")


class TLoraModule(LycorisBaseModule):
    """T-LoRA: a LoRA whose number of active ranks depends on the timestep (arXiv:2507.05964).

    See `lycoris.algorithms.TLoRA`; `set_timestep_mask` sets the active ranks.
    """

    name = "tlora"
    algo = "tlora"
    weight_list = (
        *("q_layer.weight", "p_layer.weight", "lambda_layer", "alpha"),
        *("base_q.weight", "base_p.weight", "base_lambda"),
    )
    weight_list_det = ("lambda_layer",)
    positional = ("rank_dropout_scale", "bypass_mode", "sig_type", "use_data_init", "mask_group_id")

    def orthogonality_regularization(self) -> tuple[Tensor, Tensor]:
        """Return (‖PᵀP - I‖², ‖QQᵀ - I‖²) in Frobenius norm, as a loss that keeps the factors orthogonal.

        P is (O, r) and Q (r, I). Both terms are 0 where P's columns and Q's rows are orthonormal.
        """
        p, q = (self.adapter.tensors()[name].flatten(1) for name in ("p", "q"))
        eye = torch.eye(self.lora_dim, dtype=p.dtype, device=p.device)
        return (p.mT @ p - eye).square().sum(), (q @ q.mT - eye).square().sum()


class NormModule(LycorisBaseModule):
    """Changes of the weight and bias of a norm layer.

    See `lycoris.algorithms.Norm`. It has no rank.
    """

    name = "norm"
    algo = "norm"
    weight_list = ("w_norm", "b_norm")
    weight_list_det = ("w_norm",)

    def __init__(
        self,
        lora_name: str,
        org_module: nn.Module,
        multiplier: float = 1.0,
        rank_dropout: float = 0.0,
        module_dropout: float = 0.0,
        rank_dropout_scale: bool = False,
        **options: Any,
    ) -> None:
        """Take the arguments of the other classes without rank, alpha and dropout, which norms do not have."""
        options |= {"rank_dropout": rank_dropout, "rank_dropout_scale": rank_dropout_scale}
        super().__init__(lora_name, org_module, multiplier, module_dropout=module_dropout, **options)

    @classmethod
    def _algorithm(cls, g: Geometry, dim: int, alpha: float | None, options: Mapping[str, Any]) -> Algorithm:
        given = build_module_config(cls.algo, None, None, options)
        drop = parse_optional(given.pop("module_dropout", None), "module_dropout", float)
        remarks: list[Remark] = []
        parse_options(cls.algo, {name: value for name, value in given.items() if name not in TOP}, "", True, remarks)
        log_remarks(remarks)
        return Norm(module_dropout=drop or 0.0)


MODULE_LIST: tuple[type[LycorisBaseModule], ...] = (
    *(LoConModule, LohaModule, IA3Module, LokrModule, FullModule, NormModule),
    *(DiagOFTModule, ButterflyOFTModule, GLoRAModule, DyLoraModule, TLoraModule),
)
"""All module classes, in the order in which `get_module` tries them."""

network_module_dict: Mapping[str, type[LycorisBaseModule]] = MappingProxyType(
    {
        "lora": LoConModule,
        "locon": LoConModule,
        "loha": LohaModule,
        "lokr": LokrModule,
        "dylora": DyLoraModule,
        "glora": GLoRAModule,
        "full": FullModule,
        "diag-oft": DiagOFTModule,
        "boft": ButterflyOFTModule,
        "ia3": IA3Module,
        "tlora": TLoraModule,
    }
)
"""Module classes by the algorithm names of configs."""

CLASS_BY_ALGORITHM: Mapping[type[Algorithm], type[LycorisBaseModule]] = {
    LoRA: LoConModule,
    LoHa: LohaModule,
    LoKr: LokrModule,
    Full: FullModule,
    OFT: DiagOFTModule,
    BOFT: ButterflyOFTModule,
    GLoRA: GLoRAModule,
    DyLoRA: DyLoraModule,
    IA3: IA3Module,
    TLoRA: TLoraModule,
    Norm: NormModule,
}


def module_class(algorithm: Algorithm) -> type[LycorisBaseModule]:
    """Return the module class of an algorithm, with or without DoRA.

    For an algorithm that lycoris-lora 4.1.3 does not have, a class is created.
    """
    inner = type(unwrap_dora(algorithm))
    return CLASS_BY_ALGORITHM.get(inner) or _build_module_class(inner)


@cache
def _build_module_class(algorithm: type[Algorithm]) -> type[LycorisBaseModule]:
    """Return a class for an algorithm that lycoris-lora 4.1.3 did not have."""
    names = tuple(algorithm.tensor_names.values())
    listed: dict[str, Any] = {"name": algorithm.name, "algo": algorithm.name, "weight_list": (*names, *_SCALES)}
    listed |= {"weight_list_det": names[:1], "__doc__": algorithm.__doc__, "__module__": __name__}
    return type(f"{algorithm.__name__}Module", (LycorisBaseModule,), listed)


def get_module(
    lyco_state_dict: Mapping[str, Tensor], lora_name: str
) -> tuple[type[LycorisBaseModule] | None, tuple[Tensor | None, ...] | None]:
    """Return the module class for a layer's tensors in a file, and these tensors in the order of its `weight_list`.

    (None, None) when the file has none for the layer. Raises `FileError` when no class takes all of them; the whole
    file can be read with `create_lycoris_from_weights`.
    """
    given = {key.removeprefix(f"{lora_name}.") for key in lyco_state_dict if key.startswith(f"{lora_name}.")}
    if not given:
        return None, None
    found = next((each for each in MODULE_LIST if each.algo_check(lyco_state_dict, lora_name)), None)
    left = sorted(given - {ALPHA, *(found.weight_list if found else ())})
    if found is None or left:
        problem = f"{found.__name__} has no tensors named" if found else "no module class has tensors named"
        raise FileError(
            f"{lora_name}: {problem} {', '.join(left) or ALPHA}; read the file with create_lycoris_from_weights instead"
        )
    return found, tuple(found.extract_state_dict(lyco_state_dict, lora_name))


def make_module(
    lyco_type: type[LycorisBaseModule], params: tuple[Tensor | None, ...], lora_name: str, orig_module: nn.Module
) -> LycorisBaseModule:
    """Build a module for a layer from the result of `get_module`.

    Raises `FileError` when the tensors do not match the layer.
    """
    return lyco_type.make_module_from_state_dict(lora_name, orig_module, *params)
