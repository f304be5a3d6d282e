"""Every name of lycoris-lora 4.1.3 is here, or has a reason why not."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lycoris
from lycoris import LycorisNetwork, create_lycoris
from lycoris.modules import MODULE_LIST

EXPORTS = json.loads((Path(__file__).parent / "lycoris_413.json").read_text())
"""What lycoris-lora 4.1.3 exports, without names of torch and other packages that its modules happen to hold: by module
the names that scripts can import, and by class the attributes of what it makes, beside those of every module class."""
MODULES, EVERY_MODULE, MEMBERS = EXPORTS["modules"], EXPORTS["every module class"], EXPORTS["attributes"]

KERNEL = "a step in the choice between kernels; there is one way here"
LOG = "says once what this library does not do"
OWN = "how its modules store tensors; state_dict and load_state_dict are the way here"
LAYOUT = "how its module computes; bypass_forward_diff and get_diff_weight are the way here"

REASONS = {
    "lycoris.logging": {"handler": "no handler is put on the logger; the program says where messages go"},
    "lycoris.utils": dict.fromkeys(
        ("re_compiled", "re_digits", "suffix_conversion"), "working state of convert_diffusers_name_to_compvis"
    ),
    "lycoris.utils.quant": {
        **dict.fromkeys(("QConv2d", "QLayerNorm", "QLinear"), "stand-ins for classes of packages that are missing"),
        **dict.fromkeys(("log_bypass", "log_fp8_bypass", "log_suspect"), LOG),
    },
    "lycoris.utils.xformers_utils": dict.fromkeys(
        ("XFORMERS_AVAIL", "memory_efficient_attention"), "a probe for a package that nothing uses"
    ),
    "lycoris.functional.loha": dict.fromkeys(("HadaWeight", "HadaWeightTucker"), "classes behind make_weight"),
    "lycoris.functional.lokr": {"rank_scale": KERNEL},
    "lycoris.functional.diag_oft": {"MAX_BLOCK": "the size of block that its kernels can take"},
    "lycoris.kernels": dict.fromkeys(
        ("autograd", "dispatch", "library", "library_apply", "ops", "plans", "precision", "select"), KERNEL
    ),
    "lycoris.modules.base": {
        "ModuleCustomSD": OWN,
        "QuantLinears": "imports every package of quantized layers; lycoris.utils.quant has it",
        **dict.fromkeys(("log_bypass", "log_fp8_bypass", "log_suspect"), LOG),
    },
    "lycoris.modules.locon": {"bypass_diff": KERNEL, "log_wd": LOG},
    "lycoris.modules.lokr": {"logging_force_full_matrix": LOG},
    "lycoris.modules.full": {"log_bypass_override": LOG},
    "lycoris.modules.diag_oft": {"log_oft_factorize": LOG},
    "lycoris.modules.boft": {"log_butterfly_factorize": LOG},
    "lycoris.modules.tlora": {"log_tlora_init": LOG},
}
"""Module → name that is not here → why."""

KERNELS = ("FUSED", "apply_dora", "call_compiled", "choose", "fused_backends", "static_scale", "ia3_bypass")
"""Parts of its kernels that many modules hold, beside `..._bypass_diff` and the like."""

MEMBER_REASONS = {
    **dict.fromkeys(("custom_state_dict", "load_weight_hook", "load_weight_prehook"), OWN),
    "dtype_tensor": "dtype and device are read off the adapter",
    "parametrize_forward": "forward is that of a parametrization too",
    "support_module": "kinds of layers are known by Algorithm.kinds; making a module for another is an error",
    **dict.fromkeys(("down_op", "up_op", "isconv"), LAYOUT),
    **dict.fromkeys(("is_diff", "org_bias", "org_norm"), "the layer keeps its own tensors; org_module[0] has them"),
    **dict.fromkeys(("get_weight", "down_list", "up_list", "block_count", "get_random_rank_weight"), LAYOUT),
    "mask_group_id": "there is one group of masks",
    "on_input": "train_input says it; in a file it is a tensor",
}
"""Attribute that modules do not have → why."""

OTHER_WEIGHTS = ("FullModule", "NormModule", "DiagOFTModule", "ButterflyOFTModule", "GLoRAModule", "IA3Module")
"""Whose `make_weight` is a weight in one class and a change in another; get_merged_weight and get_diff_weight say
which they are."""


def reason(module: str, name: str) -> str | None:
    kernel = name in KERNELS or name.endswith(("_diff_weight", "_bypass_diff", "_kron_weight", "_kron_bypass"))
    return REASONS.get(module, {}).get(name) or (KERNEL if kernel else None)


def missing(module: str) -> Iterator[str]:
    try:
        found: Any = importlib.import_module(module)
    except ModuleNotFoundError:
        found = None
    yield from (name for name in MODULES[module] if not hasattr(found, name))


@pytest.mark.parametrize("module", MODULES)
def test_names_of_modules(module: str) -> None:
    pytest.importorskip("bitsandbytes") if module.endswith("quant") else None
    gone = set(missing(module))
    assert not [name for name in gone if reason(module, name) is None]
    assert not REASONS.get(module, {}).keys() - gone, "these are here, and need no reason"


def test_a_name_that_is_in_neither_is_found() -> None:
    assert reason("lycoris.utils", "merge") is None
    with pytest.raises(AttributeError, match="no attribute 'LoconModule'"):
        lycoris.LoconModule  # noqa: B018


@pytest.mark.parametrize("cls", MODULE_LIST, ids=lambda cls: cls.__name__)
def test_attributes_of_modules(cls: Any) -> None:
    made = cls("name", nn.LayerNorm(8) if cls.__name__ == "NormModule" else nn.Linear(8, 8))
    wanted = [*EVERY_MODULE, *MEMBERS[cls.__name__]]
    gone = [name for name in wanted if not hasattr(made, name) and name not in MEMBER_REASONS]
    assert set(gone) <= ({"make_weight"} if cls.__name__ in OTHER_WEIGHTS else set())


def test_attributes_of_networks(host: Any) -> None:
    network = create_lycoris(nn.Sequential(nn.Linear(8, 8)), 1.0, 4, 1)
    assert not [name for name in MEMBERS["LycorisNetwork"] if not hasattr(network, name)]
    kohya = lycoris.kohya.create_network(1.0, 4, 1, None, host.encoders, host.unet)
    assert not [name for name in MEMBERS["LycorisNetworkKohya"] if not hasattr(kohya, name)]


def test_the_package_lists_what_it_has() -> None:
    assert {"LoConModule", "logger", "wrapper", "kernels", "LoRA"} <= set(dir(lycoris))
    assert lycoris.wrapper.network_module_dict["locon"] is lycoris.LoConModule
    assert lycoris.wrapper.LycorisNetwork is lycoris.kohya.LycorisNetwork is LycorisNetwork


def test_importing_leaves_logging_and_old_modules_alone() -> None:
    code = (
        "import logging, sys, lycoris; logger = logging.getLogger('LyCORIS'); "
        "print([n for n in ('lycoris.kohya', 'lycoris.utils', 'lycoris.wrapper', 'lycoris.compat.config_sdk') "
        "if n in sys.modules]); lycoris.logger.info(''); import lycoris.utils.logger, lycoris.logging; "
        "print(logger.handlers, logger.propagate, logger.level)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.split("\n") == ["[]", "[] True 0", ""]


def test_functions_beside() -> None:
    from lycoris import functional, kernels, utils
    from lycoris.modules.boft import butterfly_factor

    given = (None, 0, "", "no", True, "False", "false", False)
    assert [utils.str_bool(value) for value in given] == [True] * 5 + [False] * 3
    assert (utils.default(None, 3), utils.default(0, 3), utils.product([2, 3, 0.5]), utils.product([])) == (3, 0, 3, 1)
    assert functional.power2factorization(96, 8) == (6, 16)
    assert functional.power2factorization(7) == (None, 0)
    with pytest.raises(ValueError, match="needs a power of two"):
        butterfly_factor(7)
    assert (kernels.available_backends(), kernels.resolve_backend(), kernels.tuning_enabled()) == (
        ("torch",),
        "torch",
        False,
    )
    with pytest.raises(RuntimeError, match="triton"):
        kernels.resolve_backend("triton")
    name = "lora_unet_down_blocks_1_resnets_0_conv_shortcut"
    assert utils.convert_diffusers_name_to_compvis(name) == "lora_unet_input_blocks_4_0_skip_connection"
    assert utils.convert_diffusers_name_to_compvis("lora_te_x") == "lora_te_x"


@pytest.mark.parametrize("shape", [(12, 8), (12, 8, 3, 3)])
def test_extracting_a_layer(shape: tuple[int, ...]) -> None:
    from lycoris.utils import extract_conv, extract_linear, make_sparse

    weight = torch.randn(shape, dtype=torch.float64)
    extract = extract_linear if len(shape) == 2 else extract_conv
    (down, up, rest), how = extract(weight, "fixed", 3)
    assert how == "low rank"
    torch.testing.assert_close((up.flatten(1) @ down.flatten(1)).reshape(shape) + rest, weight)
    assert torch.linalg.matrix_rank(rest.flatten(1)) == 12 - 3 if len(shape) == 4 else 8 - 3
    assert extract(weight, "fixed", 6)[1] == extract(weight, "full")[1] == "full"
    sparse = make_sparse(weight, 0.75)
    assert int(sparse.count_nonzero()) == weight.numel() // 4
    assert weight.abs()[sparse == 0].max() < sparse[sparse != 0].abs().min()


def test_norms_and_products_are_those_of_the_modules() -> None:
    from lycoris.functional import diag_oft, lokr, weight_decompose

    layer = nn.Linear(12, 8)
    module = lycoris.LokrModule("name", layer, 1.0, 2, 1.0, weight_decompose=True)
    nn.init.normal_(module.lokr_w2_b) if hasattr(module, "lokr_w2_b") else nn.init.normal_(module.lokr_w2)
    built = weight_decompose(layer.weight + module.get_weight(), module.dora_scale)
    torch.testing.assert_close(built, module.get_merged_weight()[0])
    torch.testing.assert_close(built, module.apply_weight_decompose(layer.weight + module.get_weight()))
    w1, w2 = torch.randn(2, 3), torch.randn(4, 5)
    torch.testing.assert_close(lokr.kron_weight(w1, None, None, w2, None, None, scale=0.5), 0.5 * torch.kron(w1, w2))
    x = torch.randn(7, 15)
    through = lokr.kron_bypass(x, w1, None, None, w2, None, None, scale=0.5)
    torch.testing.assert_close(through, x @ (0.5 * torch.kron(w1, w2)).T)
    turns = diag_oft.get_r(torch.randn(3, 4, 4, dtype=torch.float64), torch.eye(4, dtype=torch.float64))
    torch.testing.assert_close(turns @ turns.mT, torch.eye(4, dtype=torch.float64).expand(3, 4, 4))


def test_how_far_factors_of_tlora_are_from_orthogonal() -> None:
    module = lycoris.TLoraModule("name", nn.Linear(12, 8), 1.0, 3, 1.0)
    assert all(part.item() < 1e-8 for part in module.orthogonality_regularization())
    module.p_layer.weight = 2 * module.p_layer.weight
    p, q = module.orthogonality_regularization()
    assert p.item() == pytest.approx(3 * 9, rel=1e-4)
    assert q.item() < 1e-8
