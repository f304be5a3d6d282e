"""`lycoris.functional`: on weights and on outputs the same, and the same as the adapters'."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cases import relative
from lycoris import ConfigError
from lycoris.functional import boft, diag_oft, factorization, locon, loha, lokr
from lycoris.modules import ButterflyOFTModule, DiagOFTModule, LoConModule, LohaModule, LokrModule

SHAPES = {"linear": (), "conv1d": (3,), "conv2d": (3, 3), "conv3d": (3, 3, 3)}
GENERATED: dict[str, tuple[Any, dict[str, Any]]] = {
    "locon": (locon, {}),
    "locon-plain": (locon, {"tucker": False}),
    "loha": (loha, {}),
    "loha-plain": (loha, {"tucker": False}),
    "lokr": (lokr, {}),
    "lokr-split": (lokr, {"tucker": False, "decompose_both": True}),
    "lokr-whole": (lokr, {"full_matrix": True}),
    "diag_oft": (diag_oft, {"rescale": True}),
    "boft": (boft, {}),
    "boft-rescale": (boft, {"rescale": True}),
}


def generated(name: str, weight: Tensor, rank: int = 2) -> list[Tensor | None]:
    module, options = GENERATED[name]
    rank = 4 if module in (boft, diag_oft) else 1 if name == "lokr-split" else rank
    return [
        p if p is None else (p + torch.randn_like(p) * 0.1).double() for p in module.weight_gen(weight, rank, **options)
    ]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", GENERATED)
def test_weights_and_outputs_agree(name: str, shape: str) -> None:
    module, run = GENERATED[name][0], getattr(F, shape)
    w = torch.randn(16, 16, *SHAPES[shape], dtype=torch.float64)
    x = torch.randn(1, 16, *(6,) * len(SHAPES[shape]), dtype=torch.float64)
    extra = {"padding": 1, "stride": 2} if SHAPES[shape] else {}
    y, params = run(x, w, **extra), generated(name, w.float())
    if module is boft:
        change = boft.diff_weight(w, *params, constraint=0.5, scale=0.7)
        out = boft.bypass_forward_diff(y, *params, constraint=0.5, scale=0.7, need_transpose=bool(extra))
    elif module is diag_oft:
        change = diag_oft.diff_weight(w, *params, constraint=0.5)
        out = diag_oft.bypass_forward_diff(x, y, *params, constraint=0.5, need_transpose=bool(extra))
    else:
        change = module.diff_weight(*params, gamma=0.3)
        out = module.bypass_forward_diff(x, y, *params, gamma=0.3, extra_args=extra)
        assert relative(module.bypass_forward_diff(x, None, *params, gamma=0.3, extra_args=extra), out) < 1e-8
    assert change.shape == w.shape
    assert relative(out, run(x, change, **extra)) < 1e-8


@pytest.mark.parametrize("name", GENERATED)
def test_new_tensors_change_nothing(name: str) -> None:
    module, options = GENERATED[name]
    w = torch.randn(16, 16, 3, 3)
    params = module.weight_gen(w, 4, **options)
    change = module.diff_weight(w, *params) if module in (boft, diag_oft) else module.diff_weight(*params)
    assert not change.any()


def test_the_same_as_the_modules() -> None:
    layer = nn.Linear(16, 16)
    w = layer.weight.detach()
    lora = LoConModule("a", layer, 1.0, 4, 2.0)
    loha_, lokr_ = LohaModule("a", layer, 1.0, 4, 2.0), LokrModule("a", layer, 1.0, 1, 0.5)
    for module in (lora, loha_, lokr_):
        for parameter in module.parameters():
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    p = lora.state_dict()
    assert relative(locon.diff_weight(p["lora_down.weight"], p["lora_up.weight"], None, gamma=0.5), delta(lora)) < 1e-5
    p = loha_.state_dict()
    order = [p.get(f"hada_{name}") for name in ("w1_b", "w1_a", "w2_b", "w2_a", "t1", "t2")]
    assert relative(loha.diff_weight(*order, gamma=0.5), delta(loha_)) < 1e-5
    p = lokr_.state_dict()
    order = [p.get(f"lokr_{name}") for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")]
    assert relative(lokr.diff_weight(*order, gamma=0.5), delta(lokr_)) < 1e-5
    for cls, functions in ((DiagOFTModule, diag_oft), (ButterflyOFTModule, boft)):
        turning = cls("a", layer, 1.0, 4, constraint=0.01)
        for parameter in turning.parameters():
            parameter.data.add_(torch.randn_like(parameter))
        blocks = turning.state_dict()["oft_blocks"]
        assert relative(functions.diff_weight(w, blocks, None, constraint=0.01 * 16), delta(turning)) < 1e-4


@pytest.mark.parametrize("options", [{}, {"decompose_both": True}, {"full_matrix": True}])
@pytest.mark.parametrize("rank", [2, 3])
def test_gamma_of_lokr_is_alpha(rank: int, options: dict[str, Any]) -> None:
    """Divided by the rank where a factor is split, and without effect where both are whole."""
    layer = nn.Linear(64, 64)
    module = LokrModule("a", layer, 1.0, rank, 5.0, **options)
    for parameter in module.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    p = module.state_dict()
    order = [p.get(f"lokr_{name}") for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")]
    assert relative(lokr.diff_weight(*order, gamma=5.0), delta(module)) < 1e-5
    w1 = p["lokr_w1"] if "lokr_w1" in p else p["lokr_w1_a"] @ p["lokr_w1_b"]
    w2 = p["lokr_w2"] if "lokr_w2" in p else p["lokr_w2_a"] @ p["lokr_w2_b"]
    scale = 1.0 if options.get("full_matrix") else 5.0 / rank
    assert relative(torch.kron(w1, w2) * scale, delta(module)) < 1e-5


def delta(module: Any) -> Tensor:
    return module.get_diff_weight()[0].detach()


def test_wrong_arguments_are_told() -> None:
    with pytest.raises(ConfigError, match="down and up"):
        locon.diff_weight(None, None, None)
    with pytest.raises(ConfigError, match="w2_b and w2_a must be given; given were w1_b, w1_a"):
        loha.diff_weight(torch.randn(2, 4), torch.randn(4, 2), None, None)
    with pytest.raises(ConfigError, match="w2_a and w2_b must be given; given were w1"):
        lokr.diff_weight(torch.randn(2, 2))
    with pytest.raises(ConfigError, match="lokr needs the tensors w1, w2 here; given were w1, w2, t2"):
        lokr.diff_weight(torch.randn(2, 2), None, None, torch.randn(2, 2), None, None, torch.randn(1, 1))
    with pytest.raises(ConfigError, match=r"3 tensors \(down, up, mid\); 4 were given"):
        locon.diff_weight(*(torch.randn(2, 2) for _ in range(4)))
    for module in (boft, diag_oft):
        with pytest.raises(ConfigError, match="blocks must be given"):
            module.diff_weight(torch.randn(4, 4), None, None)
    with pytest.raises(ConfigError, match="boft_m must be -1 or 3"):
        boft.weight_gen(torch.randn(16, 4), 4, boft_m=2)
    assert factorization(128, 4) == (4, 32)
    assert factorization(512) == (16, 32)
