"""Every algorithm with its options, and every kind of layer: what the contracts run over.

A new algorithm is here with its default settings; add those under which it takes paths of its own.
"""

from __future__ import annotations

from transformers.pytorch_utils import Conv1D

import covering
from lycoris import (
    BOFT,
    IA3,
    OFT,
    DoRA,
    DyLoRA,
    Full,
    GLoRA,
    LoHa,
    LoKr,
    LoRA,
    Norm,
    Replace,
    TLoRA,
)
from lycoris.algorithms import ALGORITHMS as REGISTRY
from lycoris.algorithms.base import Algorithm
from lycoris.algorithms.slices import AdditiveSlice, Slice
from lycoris.testing import algorithms as contracts
from lycoris.testing import layers as testing_layers
from lycoris.testing.layers import LayerCase

adapt, perturb, relative, dense = contracts.adapt, contracts.perturb, contracts.relative_error, contracts.dense_output
serves = contracts.serves
One, Fused, Experts, HalfNorm = (
    testing_layers.OneLayer,
    testing_layers.BareMatrix,
    testing_layers.Experts,
    testing_layers.HalfNorm,
)

ALGORITHMS: dict[str, Algorithm] = {
    "lora": LoRA(rank=3, alpha=2.0),
    "lora-rs": LoRA(rank=4, alpha=2.0, rs_lora=True),
    "lora-scalar": LoRA(rank=2, use_scalar=True),
    "lora-tucker": LoRA(rank=3, alpha=1.5, tucker=True),
    "loha": LoHa(rank=2, alpha=1.0),
    "loha-high-rank": LoHa(rank=5, alpha=3.0),
    "loha-scalar": LoHa(rank=2, use_scalar=True),
    "loha-tucker": LoHa(rank=3, alpha=2.0, tucker=True),
    "lokr": LoKr(rank=1, alpha=0.5),
    "lokr-factor": LoKr(rank=2, alpha=1.0, factor=2),
    "lokr-whole": LoKr(rank=10000, alpha=1.0),
    "lokr-full-matrix": LoKr(full_matrix=True, factor=4),
    "lokr-both": LoKr(rank=1, alpha=2.0, decompose_both=True),
    "lokr-unbalanced": LoKr(rank=1, alpha=2.0, unbalanced=True),
    "lokr-scalar": LoKr(rank=1, use_scalar=True),
    "lokr-tucker": LoKr(rank=1, alpha=2.0, tucker=True, factor=2),
    "tlora": TLoRA(rank=3, alpha=2.0),
    "tlora-last": TLoRA(rank=2, vectors="last"),
    "tlora-middle": TLoRA(rank=2, vectors="middle"),
    "tlora-random": TLoRA(rank=2, data_init=False),
    "tlora-wide": TLoRA(rank=40),
    "full": Full(),
    "full-weight": Full(bias=False),
    "dora-lora": DoRA(inner=LoRA(rank=3, alpha=2.0)),
    "dora-lora-in": DoRA(inner=LoRA(rank=3, alpha=2.0), axis="in"),
    "dora-loha": DoRA(inner=LoHa(rank=2, alpha=1.0)),
    "dora-lokr": DoRA(inner=LoKr(rank=1, alpha=0.5)),
    "dora-lokr-in": DoRA(inner=LoKr(full_matrix=True), axis="in"),
    "dora-loha-high-rank": DoRA(inner=LoHa(rank=5, alpha=1.0)),
    "dora-scalar-in": DoRA(inner=LoRA(rank=2, use_scalar=True), axis="in"),
    "dora-full": DoRA(inner=Full(bias=False)),
    "dylora-rs": DyLoRA(rank=4, block_size=2, rs_lora=True),
    "dora-dylora": DoRA(inner=DyLoRA(rank=4, block_size=2)),
    "dylora": DyLoRA(rank=4, alpha=2.0, block_size=2),
    "glora": GLoRA(rank=2, alpha=1.0),
    "glora-scalar": GLoRA(rank=2, use_scalar=True),
    "glora-rs": GLoRA(rank=4, alpha=2.0, rs_lora=True),
    "ia3": IA3(),
    "ia3-in": IA3(on_input=True),
    "oft": OFT(block_size=2),
    "oft-rescale": OFT(block_size=2, rescale=True),
    "oft-constraint": OFT(block_size=2, constraint=0.02),
    "boft": BOFT(block_size=2),
    "boft-rescale": BOFT(block_size=2, rescale=True, constraint=0.05),
    "full-bias": Full(weight=False),
    "norm": Norm(),
    "replace": Replace(),
    "replace-bias": Replace(weight=False),
    "lora-drops": LoRA(rank=4, dropout=0.3, rank_dropout=0.4, module_dropout=0.2),
    "loha-drops": LoHa(rank=2, rank_dropout=0.5, rank_dropout_scale=True, dropout=0.2),
    "lokr-drops": LoKr(rank=1, alpha=0.5, rank_dropout=0.5, dropout=0.2),
    "full-drops": Full(dropout=0.2, module_dropout=0.3),
    "tlora-drops": TLoRA(rank=3, rank_dropout=0.3),
    "oft-drops": OFT(block_size=2, module_dropout=0.5),
    "dora-drops": DoRA(inner=LoRA(rank=3, dropout=0.3, rank_dropout=0.3)),
    "loha-stable": LoHa(rank=3, stable_init=True),
    "lokr-stable": LoKr(rank=1, stable_init=True, decompose_both=True),
}
"""Ranks above what the smallest layers hold are meant: such adapters are wasteful, and exact."""
COVERED = {each.name for each in ALGORITHMS.values()}
ALGORITHMS |= {name: kind() for name, kind in REGISTRY.items() if name not in COVERED}

SLICES: dict[str, Algorithm] = {
    "slice-lora": AdditiveSlice(inner=LoRA(rank=3, alpha=2.0), start=2, others=5),
    "slice-lokr": AdditiveSlice(inner=LoKr(rank=1, alpha=0.5, dropout=0.2), start=3, others=6),
    "slice-lokr-rolled": AdditiveSlice(inner=LoKr(full_matrix=True, factor=4), start=3),
    "slice-tlora": AdditiveSlice(inner=TLoRA(rank=2), start=4, others=4),
    "slice-full": AdditiveSlice(inner=Full(), start=1, others=3),
    "slice-dora-lokr": Slice(inner=DoRA(inner=LoKr(full_matrix=True, factor=4)), start=3, others=6),
    "slice-oft": Slice(inner=OFT(block_size=2, constraint=0.02, rescale=True), start=2, others=4),
    "slice-boft-rolled": Slice(inner=BOFT(block_size=2), start=3),
}
"""Rows of an algorithm on a fused layer: in no file by themselves, and on a layer like any algorithm."""
WITH_SLICES = ALGORITHMS | SLICES

NOT_ALONE = (SLICES["slice-boft-rolled"],)
"""Slices that no file can hold by themselves: their rows are an adapter only together with the others."""


LAYERS: dict[str, LayerCase] = {
    **testing_layers.LAYERS,
    "conv1d-transformers": LayerCase(Conv1D, (18, 12), {}, (2, 5, 12)),
}


def algorithm_class(algorithm: Algorithm) -> str:
    """What is alike but for its settings: DoRA over LoRA is not DoRA over LoHa."""
    inner = getattr(algorithm, "inner", None)
    return type(algorithm).__name__ + (f" over {algorithm_class(inner)}" if inner else "")


covering.register({name: algorithm_class(each) for name, each in WITH_SLICES.items()})
covering.register({name: case.make.__name__ for name, case in LAYERS.items()})


PAIRS_WITH_SLICES = [
    (name, layer)
    for layer, case in LAYERS.items()
    for name, algorithm in WITH_SLICES.items()
    if serves(One(case.layer()), algorithm)
]
PAIRS = [(name, layer) for name, layer in PAIRS_WITH_SLICES if name in ALGORITHMS]
"""Every algorithm on every layer that it serves."""
