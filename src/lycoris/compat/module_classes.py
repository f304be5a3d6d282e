"""The module classes by the names that scripts know, and what finds one for the tensors of a file."""

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
from lycoris.compat.assignable import Fact
from lycoris.compat.base_module import LycorisBaseModule, settings
from lycoris.compat.functional.diag_oft import get_r
from lycoris.compat.functional.general import weight_decompose
from lycoris.compat.legacy_options import tell
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
"""What three interfaces export."""

_LENGTHS = ("alpha", "dora_scale")
_PLAIN = ("use_tucker", "use_scalar", "rank_dropout_scale", "weight_decompose", "bypass_mode", "rs_lora")


class _Built(LycorisBaseModule):
    """One whose ΔW is built from factors."""

    def get_weight(self, shape: Sequence[int] | None = None) -> Tensor:
        """scale·ΔW, with the scalar and without dropout; of DoRA, that of the algorithm that it is over."""
        weight = self._change() * self.scale
        return weight if shape is None else weight.reshape(*shape)

    def apply_weight_decompose(self, weight: Tensor, multiplier: float = 1) -> Tensor:
        """A weight with the norms that DoRA trains; see `lycoris.functional.weight_decompose`."""
        return weight_decompose(weight, self.dora_scale, multiplier, self.wd_on_out)


class LoConModule(_Built):
    """LoRA, and LoCon on convolutions."""

    name = "locon"
    weight_list = ("lora_up.weight", "lora_down.weight", "lora_mid.weight", *_LENGTHS)
    weight_list_det = ("lora_up.weight",)

    def make_weight(self, device: Any = None) -> Tensor:
        """up·down, with the scalar, without the scale and without dropout."""
        return self._change().to(device)


class LohaModule(_Built):
    """LoHa."""

    name = "loha"
    algo = "loha"
    weight_list = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2", *_LENGTHS)
    weight_list_det = ("hada_w1_a",)


class LokrModule(_Built):
    """LoKr."""

    name = "kron"
    algo = "lokr"
    weight_list = (
        *("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t1", "lokr_t2"),
        *_LENGTHS,
    )
    weight_list_det = ("lokr_w1", "lokr_w1_a")
    positional = (
        *("use_tucker", "use_scalar", "decompose_both", "factor", "rank_dropout_scale", "weight_decompose"),
        *("wd_on_out", "full_matrix", "bypass_mode", "rs_lora", "unbalanced_factorization"),
    )

    @Fact
    def use_w1(self) -> bool:
        """Whether the first factor is stored whole."""
        return "w1" in self.adapter.tensors()

    @Fact
    def use_w2(self) -> bool:
        """Whether the second factor is stored whole."""
        return "w2" in self.adapter.tensors()

    @Fact
    def full_matrix(self) -> bool:
        """Whether both factors are stored whole."""
        return self.use_w1 and self.use_w2


class FullModule(LycorisBaseModule):
    """The whole change of weight and bias."""

    name = "full"
    algo = "full"
    weight_list = ("diff", "diff_b")
    weight_list_det = ("diff",)
    positional = ("use_tucker", "use_scalar", "rank_dropout_scale", "bypass_mode")


class DiagOFTModule(LycorisBaseModule):
    """Diag-OFT."""

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

    @Fact
    def block_num(self) -> int:
        """How many blocks there are, in each stage."""
        return self.adapter.tensors()["blocks"].shape[-3]

    @Fact
    def I(self) -> Tensor:  # noqa: E743, N802  # its name in lycoris-lora
        """The identity of a block."""
        blocks = self.adapter.tensors()["blocks"]
        return torch.eye(blocks.shape[-1], dtype=blocks.dtype, device=blocks.device)

    def get_r(self) -> Tensor:
        """The rotation of each block."""
        bound = self.inner.export_alpha(self.geometry) or 0.0
        return get_r(self.adapter.tensors()["blocks"], self.I, bound * self.geometry.out_features)


class ButterflyOFTModule(DiagOFTModule):
    """BOFT."""

    name = "boft"
    algo = "boft"
    blocks_dim = 4

    @Fact
    def boft_m(self) -> int:
        """How many stages there are."""
        return self.adapter.tensors()["blocks"].shape[0]

    @Fact
    def boft_b(self) -> int:
        """Size of a block."""
        return self.adapter.tensors()["blocks"].shape[-1]


class GLoRAModule(LycorisBaseModule):
    """GLoRA."""

    name = "glora"
    algo = "glora"
    weight_list = ("a1.weight", "a2.weight", "b1.weight", "b2.weight", "bm.weight", "alpha")
    weight_list_det = ("a1.weight",)
    positional = _PLAIN


class DyLoraModule(LycorisBaseModule):
    """DyLoRA. Its files are LoRA files, and are found as such."""

    algo = "dylora"
    positional = (_PLAIN[0], "block_size", *_PLAIN[1:], "train_on_input")


class IA3Module(LycorisBaseModule):
    """(IA)³."""

    name = "ia3"
    algo = "ia3"
    weight_list = ("weight", "on_input")
    weight_list_det = ("on_input",)
    positional = (*_PLAIN, "train_on_input")


class TLoraModule(LycorisBaseModule):
    """T-LoRA."""

    name = "tlora"
    algo = "tlora"
    weight_list = (
        *("q_layer.weight", "p_layer.weight", "lambda_layer", "alpha"),
        *("base_q.weight", "base_p.weight", "base_lambda"),
    )
    weight_list_det = ("lambda_layer",)
    positional = ("rank_dropout_scale", "bypass_mode", "sig_type", "use_data_init", "mask_group_id")

    def orthogonality_regularization(self) -> tuple[Tensor, Tensor]:
        """‖PᵀP - I‖² and ‖QQᵀ - I‖², in Frobenius norm: how far p's columns and q's rows are from orthogonal."""
        p, q = (self.adapter.tensors()[name].flatten(1) for name in ("p", "q"))
        eye = torch.eye(self.lora_dim, dtype=p.dtype, device=p.device)
        return (p.mT @ p - eye).square().sum(), (q @ q.mT - eye).square().sum()


class NormModule(LycorisBaseModule):
    """Changes of the scale and shift of a norm."""

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
        """As the others, without sizes: norms have no rank."""
        options |= {"rank_dropout": rank_dropout, "rank_dropout_scale": rank_dropout_scale}
        super().__init__(lora_name, org_module, multiplier, module_dropout=module_dropout, **options)

    @classmethod
    def _algorithm(cls, g: Geometry, dim: int, alpha: float | None, options: Mapping[str, Any]) -> Algorithm:
        given = settings(cls.algo, None, None, options)
        drop = parse_optional(given.pop("module_dropout", None), "module_dropout", float)
        remarks: list[Remark] = []
        parse_options(cls.algo, {name: value for name, value in given.items() if name not in TOP}, "", True, remarks)
        tell(remarks)
        return Norm(module_dropout=drop or 0.0)


MODULE_LIST: tuple[type[LycorisBaseModule], ...] = (
    *(LoConModule, LohaModule, IA3Module, LokrModule, FullModule, NormModule),
    *(DiagOFTModule, ButterflyOFTModule, GLoRAModule, DyLoraModule, TLoraModule),
)
"""In the order in which a file's tensors are compared with them."""

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
"""By the names of configs."""

CLASSES: Mapping[type[Algorithm], type[LycorisBaseModule]] = {
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
    """The class of modules that have an algorithm."""
    inner = type(unwrap_dora(algorithm))
    return CLASSES.get(inner) or _build_class(inner)


@cache
def _build_class(algorithm: type[Algorithm]) -> type[LycorisBaseModule]:
    """A class for an algorithm that lycoris-lora 4.1.3 did not have."""
    names = tuple(algorithm.tensor_names.values())
    listed: dict[str, Any] = {"name": algorithm.name, "algo": algorithm.name, "weight_list": (*names, *_LENGTHS)}
    listed |= {"weight_list_det": names[:1], "__doc__": algorithm.__doc__, "__module__": __name__}
    return type(f"{algorithm.__name__}Module", (LycorisBaseModule,), listed)


def get_module(
    lyco_state_dict: Mapping[str, Tensor], lora_name: str
) -> tuple[type[LycorisBaseModule] | None, tuple[Tensor | None, ...] | None]:
    """The class for the tensors that a file has for a layer, and these in its order; (None, None) when it has none.

    Raises `FileError` when no class takes all of them: what one module cannot hold, `create_lycoris_from_weights` reads
    or refuses.
    """
    given = {key.removeprefix(f"{lora_name}.") for key in lyco_state_dict if key.startswith(f"{lora_name}.")}
    if not given:
        return None, None
    found = next((each for each in MODULE_LIST if each.algo_check(lyco_state_dict, lora_name)), None)
    left = sorted(given - {ALPHA, *(found.weight_list if found else ())})
    if found is None or left:
        told = f"{found.__name__} has no place for" if found else "no module class is made of"
        raise FileError(
            f"{lora_name}: {told} {', '.join(left) or ALPHA}; create_lycoris_from_weights reads the whole file"
        )
    return found, tuple(found.extract_state_dict(lyco_state_dict, lora_name))


def make_module(
    lyco_type: type[LycorisBaseModule], params: tuple[Tensor | None, ...], lora_name: str, orig_module: nn.Module
) -> LycorisBaseModule:
    """A module for a layer from what `get_module` gave. Raises `FileError` when they do not fit."""
    return lyco_type.make_module_from_state_dict(lora_name, orig_module, *params)
