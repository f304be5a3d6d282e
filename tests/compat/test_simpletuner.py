"""SimpleTuner's side: from `lycoris_config.json` to checkpoints, strengths and quantized bases.

Its published inference scripts are in `test_scripts.py`, its timestep masks in `test_tlora.py`.
"""

from __future__ import annotations

import copy
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cases import perturb, relative
from hosts import Fp8Linear, SDNQLinear
from lycoris import ConfigError, LycorisNetwork, create_lycoris, create_lycoris_from_weights
from lycoris.config import list_builtin_presets
from lycoris.files import load_tensors
from lycoris.modules import get_module, make_module
from networks import MyModel
from quantized import quanto
from tiny import flux_transformer

DEFAULTS: dict[str, dict[str, Any]] = {
    "lora": {"linear_dim": 4, "linear_alpha": 2},
    "locon": {"linear_dim": 4, "linear_alpha": 2},
    "loha": {"linear_dim": 4, "linear_alpha": 2},
    "lokr": {"linear_dim": 10000, "linear_alpha": 1, "factor": 4},
    "full": {"linear_dim": 4, "linear_alpha": 2},
    "ia3": {"linear_dim": 4, "linear_alpha": 2},
    "dylora": {"linear_dim": 4, "linear_alpha": 2, "block_size": 1},
    "diag-oft": {"linear_dim": 4, "linear_alpha": 1, "constraint": False, "rescaled": False},
    "boft": {"linear_dim": 6, "linear_alpha": 1, "constraint": False, "rescaled": False},
    "tlora": {"linear_dim": 4, "linear_alpha": 2, "tlora_min_rank": 1},
    "glora": {"linear_dim": 4, "linear_alpha": 2},
}
"""Like the defaults that it ships, smaller."""

PRESET = {
    "target_module": ["Attention", "FeedForward"],
    "module_algo_map": {"Attention": {"factor": 4}, "FeedForward": {"factor": 2}},
}


def config(algo: str, **more: Any) -> dict[str, Any]:
    return {"algo": algo, "multiplier": 1.0, **DEFAULTS[algo], "apply_preset": copy.deepcopy(PRESET), **more}


def wrapped(model: nn.Module, given: dict[str, Any], init_lora: Path | None = None) -> LycorisNetwork:
    """trainer.init_trainable_peft_adapter."""
    given = copy.deepcopy(given)
    multiplier = int(given.pop("multiplier", 1))
    linear_dim, linear_alpha = int(given.pop("linear_dim", 4)), int(given.pop("linear_alpha", 1))
    given.pop("tlora_min_rank", None)
    given.pop("tlora_alpha", None)
    if given.get("apply_preset"):
        LycorisNetwork.apply_preset(given["apply_preset"])
    if init_lora is None:
        network = create_lycoris(model, multiplier, linear_dim, linear_alpha, **given)
    else:
        network = create_lycoris_from_weights(multiplier, str(init_lora), model, weights_sd=None, **given)[0]
    network.apply_to()
    return network


def resumed(network: LycorisNetwork, path: Path) -> None:
    """save_hooks: any key in what `load_weights` returns ends the run."""
    state = network.load_weights(str(path))
    if len(state.keys()) > 0:
        raise ValueError("Loading of LyCORIS model failed")


@pytest.fixture
def quiet() -> None:
    logging.getLogger("LyCORIS").setLevel(logging.ERROR)


@pytest.mark.usefixtures("quiet")
@pytest.mark.filterwarnings("ignore:merging adapters that were trained:UserWarning")
@pytest.mark.parametrize("algo", DEFAULTS)
def test_train_save_resume_merge(algo: str, tmp_path: Path) -> None:
    given, x = config(algo), torch.randn(2, 3, 4, 4, dtype=torch.float64)
    torch.manual_seed(1)
    state = MyModel().state_dict()

    def fresh() -> MyModel:
        model = MyModel().double().eval().requires_grad_(False)
        model.load_state_dict(state)
        return model

    model = fresh()
    base = model(x)
    network = wrapped(model, given)
    assert torch.equal(model(x), base)
    network.to("cpu", dtype=torch.float64)
    optimizer = torch.optim.SGD([p for _, p in network.named_parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    perturb(network.adapters, 0.1)
    before, stored = list(network.parameters()), [p.clone() for p in network.parameters()]
    live = model(x)
    network.set_multiplier(0.0)
    assert torch.equal(model(x), base)
    network.set_multiplier(1.0)
    path = tmp_path / "pytorch_lora_weights.safetensors"
    metadata = {"lycoris_config": json.dumps(given), "modelspec.implementation": "diffusers", "global_step": "2"}
    network.save_weights(str(path), next(iter(network.parameters())).dtype, metadata)
    assert load_tensors(path)[1].items() >= metadata.items()
    assert all(key.startswith("lycoris_blocks_") for key in network.state_dict())

    model = fresh()
    second = wrapped(model, given)
    second.to("cpu", dtype=torch.float64)
    resumed(second, path)
    assert relative(model(x), live) < 1e-6
    model = fresh()
    wrapped(model, given, path).to("cpu", dtype=torch.float64)
    assert relative(model(x), live) < 1e-6
    model = fresh()
    create_lycoris_from_weights(1.0, path, model)[0].merge_to()
    assert relative(model(x), live) < 2e-4

    after = list(network.parameters())
    assert all(a is b and torch.equal(a, c) for a, b, c in zip(before, after, stored, strict=True))


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("algo", ["lora", "loha", "lokr"])
def test_names_on_a_diffusers_model(algo: str) -> None:
    given = config(algo, apply_preset={"target_module": ["FluxAttention"]})
    names = {key.split(".")[0] for key in wrapped(flux_transformer(), given).state_dict()}
    double = {f"lycoris_transformer_blocks_0_attn_{n}" for n in ("to_q", "to_k", "to_v", "to_out_0", "to_add_out")}
    double |= {f"lycoris_transformer_blocks_0_attn_add_{n}_proj" for n in ("q", "k", "v")}
    single = {f"lycoris_single_transformer_blocks_0_attn_to_{n}" for n in ("q", "k", "v")}
    assert names == double | single


def test_init_lokr_norm() -> None:
    """peft_init.py writes into both factors, so both have to be whole."""
    model = MyModel().eval()
    network = wrapped(model, config("lokr", full_matrix=True))
    scale = 1e-3
    with torch.no_grad():
        for lora in network.loras:
            lora.lokr_w1.fill_(1.0)
            weight, target = lora.org_weight, lora.lokr_w2
            drawn = torch.randn_like(target)
            drawn = drawn * (weight.norm() / drawn.norm())
            drawn = drawn * (weight.std() / drawn.std())
            target.copy_((drawn - drawn.mean() + weight.mean()) * scale)
    for lora in network.loras:
        assert lora.full_matrix
        assert lora.org_weight is lora.org_module[0].weight
        change = lora.get_diff_weight()[0].detach()
        assert float(change.std()) == pytest.approx(scale * float(lora.org_weight.detach().std()), rel=0.05)
    split = wrapped(MyModel(), config("lokr", linear_dim=1, factor=2)).loras[0]
    with pytest.raises(AttributeError, match="lokr_w2"):
        _ = split.lokr_w2


class Quantized(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.attn, self.head = layer, nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.attn(x).to(self.head.weight.dtype))


WHOLE = {"target_module": ["Quantized", "Sequential"]}
"""The default targets are torch's own classes by name, which these layers do not have."""

QUANTIZED = {
    "fp8": lambda: Fp8Linear(64, 64),
    "sdnq": lambda: SDNQLinear(64, 64),
    "quanto": lambda: quanto(nn.Linear(64, 64), "qint8"),
}
TRAINED = {
    "fp8": ["lora", "locon", "loha", "lokr", "glora", "dora", "dylora", "diag-oft", "boft", "ia3"],
    "sdnq": ["lora", "locon", "loha", "lokr", "glora", "dylora", "diag-oft", "boft", "ia3"],
    "quanto": ["lora", "locon", "loha", "lokr", "glora", "dora", "dylora", "diag-oft", "boft", "ia3"],
}


@pytest.mark.parametrize(("base", "algo"), [(base, algo) for base, algos in TRAINED.items() for algo in algos])
@pytest.mark.parametrize("given", [{}, {"bypass_mode": True}])
def test_quantised_bases_train_and_are_not_merged_into(base: str, algo: str, given: dict[str, Any]) -> None:
    torch.manual_seed(2)
    model, x = Quantized(QUANTIZED[base]()).eval().requires_grad_(False), torch.randn(2, 3, 64)
    before, options = model(x), {"algo": algo} if algo != "dora" else {"algo": "lokr", "dora_wd": True}
    network = create_lycoris(model, 1.0, 4, 2, **options, **given, apply_preset=WHOLE)
    lora = next(lora for lora in network.loras if lora.org_module[0] is model.attn)
    assert (lora.bypass_mode, lora.is_quant) == (True, True)
    assert network.loras[-1].bypass_mode is bool(given)
    network.apply_to()
    assert relative(model(x), before) < 1e-5
    perturb(network.adapters, 0.1)
    model(x).square().mean().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in lora.parameters())
    assert not network.is_mergeable()
    live, weight = model(x), model.head.weight
    words = "weight-only FP8" if base == "fp8" else "would lose the update or is not possible"
    for merge in (network.merge_to, network.onfly_merge):
        with pytest.raises(RuntimeError, match=words):
            merge()
    assert model.head.weight is weight
    assert torch.equal(model(x), live)
    network.restore()
    with pytest.raises(RuntimeError, match=words):
        lora.merge_to()
    assert torch.equal(model(x), before)


@pytest.mark.parametrize("base", QUANTIZED)
def test_full_is_refused_on_quantised_bases(base: str) -> None:
    with pytest.raises(ConfigError, match=r"full trains the weight itself, and attn stores its weight as.*lokr"):
        create_lycoris(Quantized(QUANTIZED[base]()), 1.0, 4, 2, algo="full", apply_preset=WHOLE)
    preset = WHOLE | {"exclude_name": ["attn"]}
    assert len(create_lycoris(Quantized(QUANTIZED[base]()), 1.0, algo="full", apply_preset=preset).loras) == 1


@pytest.mark.parametrize("algo", ["lora", "loha", "lokr", "glora"])
def test_float8_in_half_precision_equals_the_dense_layer(algo: str) -> None:
    layer = Fp8Linear(64, 64)
    dense = nn.Linear(64, 64, bias=False)
    dense.weight = nn.Parameter(layer.dense(), requires_grad=False)
    one, two = nn.Sequential(layer), nn.Sequential(dense)
    network = create_lycoris(one, 0.7, 2, 1.0, algo=algo, use_scalar=True, apply_preset=WHOLE)
    perturb(network.adapters, 0.2)
    other = create_lycoris_from_weights(0.7, None, two, weights_sd=network.state_dict())[0]
    network.apply_to()
    other.apply_to()
    x = torch.linspace(-1, 1, 2 * 3 * 64).reshape(2, 3, 64)
    assert relative(one(x), two(x)) < 1e-5
    y = one(x.bfloat16())
    assert y.dtype == torch.bfloat16
    assert relative(y.float(), two(x)) < 0.05


def test_bypass_mode_says_what_was_asked_for() -> None:
    class Special(nn.Linear): ...

    model = nn.Sequential(Special(4, 4), nn.Linear(4, 4))

    def modes(**given: bool) -> list[bool]:
        return [lora.bypass_mode for lora in create_lycoris(model, 1.0, apply_preset=WHOLE, **given).loras]

    assert modes() == [True, False]
    assert modes(bypass_mode=False) == [False, False]
    assert modes(bypass_mode=True) == [True, True]


def test_extracted_files_are_recognized(tmp_path: Path) -> None:
    """scripts/extract_lycoris_adapter.py."""
    change, layer = torch.randn(6, 2) @ torch.randn(2, 8), nn.Linear(8, 6)
    u, s, v = torch.linalg.svd(change, full_matrices=False)
    name = "lycoris_transformer_blocks_0_attn_to_q"
    state = {f"{name}.lora_up.weight": u[:, :2] * s[:2], f"{name}.lora_down.weight": v[:2]}
    state[f"{name}.alpha"] = torch.tensor(2.0)
    found, params = get_module(state, name)
    assert found is not None
    module = make_module(found, params, name, layer)
    assert relative(module.get_diff_weight()[0], change) < 1e-5
    assert get_module(state, "lycoris_other") == (None, None)


def test_the_imports_of_its_modules() -> None:
    from lycoris.modules.tlora import clear_timestep_mask, compute_timestep_mask, set_timestep_mask

    mask = compute_timestep_mask(500, 1000, 64, 1, 1.0)
    assert mask.shape == (1, 64)
    assert 1 < float(mask.sum()) < 64
    set_timestep_mask(mask)
    clear_timestep_mask()
    assert list_builtin_presets()["attn-only"].to_dict()["enable_conv"] is False
    assert logging.getLogger("LyCORIS") is __import__("lycoris.logging", fromlist=["logger"]).logger
