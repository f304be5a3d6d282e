"""Adapters on quantised base layers, made by the libraries themselves: reading, training, saving, what is refused."""

from __future__ import annotations

import copy
import logging
import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn

from cases import ALGORITHMS, LAYERS, One, perturb, relative
from lycoris import AdapterSet, AttachError, DoRA, LoRA, Rule, plan, read, write
from lycoris.adapters.attach import top
from lycoris.algorithms.base import Algorithm
from lycoris.layers import base_weights
from lycoris.layers.sites import Site
from quantized import CPU, EVERY, Float8Linear, torchao

SOME = ["lora", "loha", "loha-high-rank", "lokr", "tlora", "dora-lora", "dora-lokr-in", "dora-loha-high-rank"]
SOME += ["glora", "ia3", "ia3-in", "oft", "boft", "full"]
EACH = pytest.mark.parametrize("name", SOME)
LIBRARIES = ("bitsandbytes", "diffusers", "gguf", "optimum", "torchao")


def made(base: str, algorithm: Algorithm, random: bool = True) -> tuple[One, AdapterSet, Tensor]:
    model, x = One(CPU[base].layer()), torch.randn(2, 5, 64)
    model(x)
    adapters = AdapterSet.build(model, plan(model, Rule(algorithm), strict=False)).attach()
    if random:
        perturb(adapters, 0.1)
    return model, adapters, x


def test_none_of_the_libraries_is_imported() -> None:
    use = "import sys, torch; from lycoris.layers import base_weights; base_weights.kind(torch.nn.Linear(2, 2))"
    code = f"{use}; print({set(LIBRARIES)} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"


@EVERY
def test_a_weight_is_read_as_the_layer_uses_it(base: str) -> None:
    layer, x = CPU[base].layer(), torch.randn(3, 64)
    assert base_weights.kind(layer) == CPU[base].label
    for _ in range(2):
        # A forward pass may move things about inside the layer.
        dense = base_weights.read(layer)
        assert dense.weight.shape == (32, 64)
        assert not dense.weight.requires_grad
        assert relative(nn.functional.linear(x, *dense), layer(x)) < 1e-5


@EVERY
@EACH
def test_a_fresh_adapter_changes_nothing(base: str, name: str) -> None:
    model, adapters, x = made(base, ALGORITHMS[name], random=False)
    attached = model(x)
    assert {parameter.dtype for parameter in adapters.parameters()} == {torch.float32}
    adapters.detach()
    assert torch.equal(model(x), attached)


@EVERY
@EACH
def test_adapters_train_unmerged(base: str, name: str) -> None:
    model, adapters, x = made(base, ALGORITHMS[name], random=False)
    weight, aim = base_weights.read(model.layer).weight.clone(), model(x).detach() + torch.randn(2, 5, 32)
    optimizer = torch.optim.Adam(list(adapters.parameters()), lr=1e-2)
    losses = []
    for _ in range(8):
        x = x.detach().requires_grad_()
        loss = (model(x) - aim).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert x.grad is not None
    assert float(x.grad.abs().sum()) > 0
    own = {id(parameter) for parameter in adapters.parameters()}
    assert {id(parameter) for parameter in model.parameters() if parameter.grad is not None} <= own
    assert torch.equal(base_weights.read(model.layer).weight, weight)


@EVERY
@EACH
def test_the_output_is_that_of_the_dense_adapted_weight(base: str, name: str) -> None:
    model, adapters, x = made(base, ALGORITHMS[name])
    adapted = model(x)
    stack = top(Site.of(model.layer))
    assert relative(adapted, stack.geometry.op(x, *stack.affine())) < 1e-4
    adapters.set_strength(0)
    assert relative(adapted, model(x)) > 0.01


@EVERY
@EACH
def test_they_are_saved_and_loaded(base: str, name: str, tmp_path) -> None:
    model, adapters, x = made(base, ALGORITHMS[name])
    trained = model(x)
    write(adapters.bundle(), tmp_path / "a.safetensors")
    adapters.detach()
    AdapterSet.load(model, read(tmp_path / "a.safetensors", model)).attach()
    assert relative(model(x), trained) < 1e-4


@EVERY
def test_the_base_saves_and_copies_as_before(base: str) -> None:
    layer = CPU[base].layer()
    before = list(layer.state_dict())
    model, adapters, x = made(base, LoRA(rank=2))
    assert [key.removeprefix("layer.") for key in model.state_dict()] == before
    if not base.startswith(("gguf", "quanto")):  # whose tensors cannot be copied, adapters or not
        assert torch.equal(copy.deepcopy(model)(x), model(x))
    adapters.detach()
    assert type(model.layer) is type(layer)


@pytest.mark.parametrize("base", ["bitsandbytes-nf4", "bitsandbytes-int8", "torchao-int8", "gguf-q8", "float8-e4m3"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_activations_in_half_precision(base: str, dtype: torch.dtype) -> None:
    model, x = One(CPU[base].layer()), torch.randn(2, 5, 64, dtype=dtype)
    with torch.autocast("cpu", dtype):
        plain = model(x)
        adapters = AdapterSet.build(model, plan(model, Rule(DoRA(inner=LoRA(rank=2))))).attach()
        assert torch.equal(model(x), plain)
        perturb(adapters, 0.1)
        model(x).float().sum().backward()
    assert all(parameter.grad is not None for parameter in adapters.parameters())


def test_float8_in_a_plain_layer_under_autocast() -> None:
    model = One(nn.Linear(64, 32).to(torch.float8_e4m3fn).requires_grad_(False))
    x = torch.randn(3, 64)
    with torch.autocast("cpu", torch.bfloat16):
        plain = model(x)
        adapters = AdapterSet.build(model, plan(model, Rule(ALGORITHMS["dora-lora"]), strict=False)).attach()
        assert torch.equal(model(x), plain)
        model(x).float().sum().backward()
    assert base_weights.read(model.layer).bias.dtype == torch.float32
    assert all(parameter.grad is not None for parameter in adapters.parameters())


def test_layerwise_casting_of_diffusers_leaves_adapters_alone() -> None:
    from diffusers.hooks import apply_layerwise_casting

    model, x = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 8)), torch.randn(2, 64)
    model.requires_grad_(False)
    adapters = AdapterSet.build(model, plan(model, Rule(LoRA(rank=2)))).attach()
    perturb(adapters)
    before, exact = copy.deepcopy(adapters.state_dict()), model(x)
    apply_layerwise_casting(model, torch.float8_e4m3fn, torch.bfloat16, skip_modules_pattern=("norm",))
    assert base_weights.kind(model[0]) == "float8_e4m3fn storage"
    y = model(x.bfloat16().requires_grad_())
    assert relative(y.float(), exact) < 0.1
    y.float().sum().backward()
    assert all(torch.equal(tensor, before[key]) for key, tensor in adapters.state_dict().items())
    assert all(parameter.grad.dtype == torch.float32 for parameter in adapters.parameters())
    adapters.merge(into_low_bit=True)
    assert relative(model(x.bfloat16()).float(), exact) < 0.2
    adapters.detach()
    again = AdapterSet.build(model, plan(model, Rule(LoRA(rank=2))))
    with pytest.raises(AttachError, match="attach before it is enabled"):
        again.attach()


def test_adapters_of_other_layers_are_cast_with_them() -> None:
    model = One(nn.Linear(4, 4))
    adapters = AdapterSet.build(model, plan(model, Rule(LoRA(rank=2, use_scalar=True)))).attach()
    model.bfloat16()
    assert {parameter.dtype for parameter in adapters.parameters()} == {torch.bfloat16}
    model.to(torch.float8_e4m3fn)
    assert {parameter.dtype for parameter in adapters.parameters()} == {torch.bfloat16}


class Packed(nn.Linear):
    """A layer of nobody's: two weights to a byte."""

    def __init__(self) -> None:
        super().__init__(8, 4)
        self.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.uint8), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return x[..., :4] * 2


def test_what_cannot_be_read_is_refused_by_name() -> None:
    model = One(Packed())
    with pytest.raises(AttachError, match=r"Packed stores its weight as Packed of uint8.*cannot be read densely"):
        AdapterSet.build(model, plan(model, Rule(DoRA(inner=LoRA(rank=2)))))
    adapters = AdapterSet.build(model, plan(model, Rule(LoRA(rank=2)))).attach()
    assert torch.equal(model(torch.ones(1, 8)), torch.full((1, 4), 2.0))
    with pytest.raises(AttachError, match="stored as Packed of uint8"):
        adapters.merge(into_low_bit=True)


def test_a_scale_of_unknown_shape_is_refused() -> None:
    layer = CPU["float8-scaled"].layer()
    layer.weight_scale = torch.ones(5)
    with pytest.raises(AttachError, match=r"its scale has shape \(5,\)"):
        base_weights.read(layer)


def test_scales_over_blocks_of_columns() -> None:
    layer = Float8Linear(64, 32)
    layer.weight = nn.Parameter(layer.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    layer.scale_weight = torch.rand(32, 4, 1) + 0.5
    expected = (layer.weight.float().view(32, 4, 16) * layer.scale_weight).view(32, 64)
    assert torch.equal(base_weights.read(layer).weight, expected)


def test_quanto_layers_are_frozen_first() -> None:
    import optimum.quanto

    model = One(nn.Linear(64, 32))
    optimum.quanto.quantize(model, weights="qint8")
    assert base_weights.kind(model.layer) == "optimum-quanto qint8, not frozen yet"
    with pytest.raises(AttachError, match=r"optimum.quanto.freeze\(model\)"):
        base_weights.read(model.layer)


@pytest.mark.parametrize("kind", ["Linear4bit", "Linear8bitLt"])
def test_bitsandbytes_layers_are_moved_first(kind: str) -> None:
    import bitsandbytes as bnb

    options = {} if kind == "Linear4bit" else {"has_fp16_weights": False}
    layer = getattr(bnb.nn, kind)(64, 32, **options)
    assert torch.equal(base_weights.read(layer).weight, layer.weight.data)
    (row,) = base_weights.capabilities({"layer": layer}).rows
    assert not row.merges
    assert "moved to its device" in row.remark


def test_four_bit_weights_that_were_packed_for_a_cpu_are_read() -> None:
    from bitsandbytes import functional

    layer = CPU["bitsandbytes-nf4"].layer()
    weight, state = base_weights.read(layer).weight, layer.weight.quant_state
    layer.weight.data, layer.weight.quant_state = functional._convert_weight_packed_for_cpu(layer.weight.data, state)
    for _ in range(2):
        assert relative(base_weights.read(layer).weight.float(), weight) < 0.01


def test_the_table_names_what_works() -> None:
    model = nn.ModuleDict({name: CPU[name].layer() for name in ("bitsandbytes-nf4", "torchao-int8", "gguf-q8")})
    model["dense"], model["packed"] = nn.Linear(64, 32), Packed()
    model["dynamic"] = torchao(nn.Linear(64, 32), "Int8DynamicActivationInt8WeightConfig").requires_grad_(False)
    adapters = AdapterSet.build(model, plan(model, Rule(LoRA(rank=2))))
    rows = {row.example: row for row in adapters.capabilities().rows}
    assert all(row.trains for row in rows.values())
    assert {name for name, row in rows.items() if not row.reads} == {"packed"}
    assert {name for name, row in rows.items() if not row.merges} == {"packed"}
    assert {name for name, row in rows.items() if not row.low_bit} == {"dense"}
    text = str(adapters.capabilities())
    assert "bitsandbytes nf4  " in text
    assert "when asked for" in text
    assert "no derivative of its own: backward decodes the weight" in text


def test_torchao_has_no_derivative_for_quantised_activations() -> None:
    """What the table says of them; when torchao has one, the table must follow."""
    layer = torchao(nn.Linear(64, 32), "Int8DynamicActivationInt8WeightConfig").requires_grad_(False)
    assert not layer(torch.randn(3, 64, requires_grad=True)).requires_grad


def test_packed_int4_of_torchao_is_not_read() -> None:
    from torchao.prototype.quantization.int4 import Int4OpaqueTensor

    layer = nn.Linear(64, 32).requires_grad_(False)
    layer.weight = nn.Parameter(Int4OpaqueTensor.from_hp(layer.weight, [1, 32]), requires_grad=False)
    (row,) = base_weights.capabilities({"layer": layer}).rows
    assert (row.trains, row.reads, row.merges) == (False, False, False)
    with pytest.raises(AttachError, match=r"no dequantize\(\) for Int4OpaqueTensor"):
        base_weights.read(layer)


def test_the_table_is_logged_at_attach(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "LyCORIS")
    model = One(nn.Linear(4, 4))
    AdapterSet.build(model, plan(model, Rule(LoRA(rank=2)))).attach()
    assert not caplog.records
    made("torchao-int8", LoRA(rank=2))[1].attach()
    (record,) = caplog.records
    assert record.name == "LyCORIS"
    assert "torchao Int8Tensor" in record.getMessage()


def test_conv_layers_of_quanto() -> None:
    import optimum.quanto

    model, x = One(LAYERS["conv2d"].layer(torch.float32)), LAYERS["conv2d"].input(torch.float32)
    optimum.quanto.quantize(model, weights="qint8")
    optimum.quanto.freeze(model)
    model.requires_grad_(False)
    plain = model(x)
    adapters = AdapterSet.build(model, plan(model, Rule(ALGORITHMS["dora-lora"]), strict=False)).attach()
    assert torch.equal(model(x), plain)
    perturb(adapters)
    attached = model(x)
    adapters.merge(into_low_bit=True)
    assert relative(model(x), attached) < 0.05


GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@GPU
@pytest.mark.filterwarnings("ignore:merging adapters that were trained:UserWarning")
@pytest.mark.filterwarnings("ignore:.*below the quantization step:UserWarning")
@EVERY
@EACH
def test_on_a_gpu(base: str, name: str) -> None:
    model, x = One(CPU[base].layer(128, 128, device="cuda")), torch.randn(2, 5, 128, device="cuda", requires_grad=True)
    plain = model(x)
    adapters = AdapterSet.build(model, plan(model, Rule(ALGORITHMS[name]), strict=False)).attach()
    assert torch.equal(model(x), plain)
    model(x).sum().backward()
    assert all(parameter.grad is not None for parameter in adapters.parameters())
    perturb(adapters, 0.1)
    attached = model(x)
    adapters.merge(into_low_bit=True)
    assert relative(model(x), attached) < 3 * CPU[base].step
    adapters.detach()
    assert torch.equal(model(x), plain)


@GPU
@pytest.mark.parametrize("packing", ["plain", "tile_packed_to_4d"])
def test_int4_of_torchao_on_a_gpu(packing: str) -> None:
    if packing == "plain":
        pytest.importorskip("mslk", reason="torchao runs plain int4 with mslk")
    layer = nn.Linear(256, 128, device="cuda", dtype=torch.bfloat16)
    layer = torchao(layer, "Int4WeightOnlyConfig", group_size=32, int4_packing_format=packing)
    model, x = One(layer.requires_grad_(False)), torch.randn(3, 256, device="cuda", dtype=torch.bfloat16)
    plain = model(x)
    adapters = AdapterSet.build(model, plan(model, Rule(LoRA(rank=2)))).attach()
    assert torch.equal(model(x), plain)
    perturb(adapters)
    model(x).sum().backward()
    assert all(parameter.grad is not None for parameter in adapters.parameters())
    with pytest.raises(AttachError, match="cannot be merged into"):
        adapters.merge(into_low_bit=True)
