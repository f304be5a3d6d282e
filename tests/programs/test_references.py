"""The readers against the figures that were measured on the programs themselves: relative errors of ΔW."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from programs import Read, Refused, comfyui, forge, invokeai, musubi, simpletuner, webui

O, I, R = 24, 16, 4  # noqa: E741
READERS = {"comfyui": comfyui, "webui": webui, "forge": forge, "invokeai": invokeai}
ALL = READERS | {"simpletuner": simpletuner, "musubi": musubi}
KERNELS = [(), (3,), (3, 3), (1, 3, 3)]


def normal(*shape: int, size: float = 1.0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64) * size


def alpha(value: float) -> dict[str, Tensor]:
    return {"alpha": torch.tensor(value, dtype=torch.float64)}


def lora(o: int = O, i: int = I, kernel: tuple[int, ...] = (), size: float = 0.3) -> dict[str, Tensor]:
    ones = (1,) * len(kernel)
    return {"lora_up.weight": normal(o, R, *ones, size=size), "lora_down.weight": normal(R, i, *kernel, size=size)}


def loha(size: float = 0.3) -> dict[str, Tensor]:
    return {f"hada_w{n}_{s}": normal(*shape, size=size) for n in (1, 2) for s, shape in (("a", (O, R)), ("b", (R, I)))}


def base(*kernel: int) -> Tensor:
    return normal(O, I, *kernel, size=(I * torch.Size(kernel).numel()) ** -0.5)


def read(reader: object, tensors: dict[str, Tensor], weight: Tensor, strength: float = 1.0) -> Tensor:
    found: Read | None = reader.read(tensors, weight, None, "conv" if weight.dim() > 2 else "linear", strength)
    assert found is not None
    return found[0] - weight


def error(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


def lengths_of(weight: Tensor, axis: int) -> Tensor:
    others = [n for n in range(weight.dim()) if n != axis]
    norm = torch.linalg.vector_norm(weight, dim=others, keepdim=True)
    return norm * (1 + normal(*norm.shape, size=0.05))


def with_lengths(weight: Tensor, change: Tensor, lengths: Tensor, axis: int) -> Tensor:
    whole = weight + change
    others = [n for n in range(weight.dim()) if n != axis]
    return whole * lengths / torch.linalg.vector_norm(whole, dim=others, keepdim=True) - weight


@pytest.mark.parametrize("reader", READERS.values(), ids=READERS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_lora(reader: object, kernel: tuple[int, ...]) -> None:
    weight, tensors = base(*kernel), lora(kernel=kernel) | alpha(2.0)
    expected = 0.5 * (tensors["lora_up.weight"].flatten(1) @ tensors["lora_down.weight"].flatten(1))
    if reader is webui and len(kernel) in (1, 3):
        with pytest.raises(Refused, match="AssertionError"):
            read(reader, tensors, weight)
        return
    assert error(read(reader, tensors, weight), expected.reshape(weight.shape)) < 1e-12
    del tensors["alpha"]
    assert error(read(reader, tensors, weight), 2 * expected.reshape(weight.shape)) < 1e-12


@pytest.mark.parametrize("reader", READERS.values(), ids=READERS)
def test_m1_alpha_of_two_whole_factors_is_nothing(reader: object) -> None:
    weight, tensors = base(), {"lokr_w1": normal(4, 4), "lokr_w2": normal(6, 4)} | alpha(0.5)
    assert error(read(reader, tensors, weight), torch.kron(tensors["lokr_w1"], tensors["lokr_w2"])) < 1e-12


@pytest.mark.parametrize("reader", ALL.values(), ids=ALL)
def test_m2_the_scale_is_applied_once(reader: object) -> None:
    weight, tensors = base(), loha() | alpha(2.0)
    one, two = (tensors[f"hada_w{n}_a"] @ tensors[f"hada_w{n}_b"] for n in (1, 2))
    assert error(read(reader, tensors, weight), 0.5 * one * two) < 1e-12


def mean_error_of_output_lengths(reader: object, size: float, spread: float) -> float:
    errors = []
    for _ in range(20):
        weight, tensors = normal(O, I, size=spread), lora(size=size) | alpha(float(R))
        change, lengths = tensors["lora_up.weight"] @ tensors["lora_down.weight"], lengths_of(weight, 0)
        found = read(reader, tensors | {"dora_scale": lengths}, weight)
        errors.append(error(found, with_lengths(weight, change, lengths, 0)))
    return sum(errors) / len(errors)


@pytest.mark.parametrize("reader", [comfyui, forge])
def test_m3_lengths_of_outputs_are_taken_from_the_weight_below(reader: object) -> None:
    # It grows with the change, here from a fifth to a third of the weight.
    assert 0.22 <= mean_error_of_output_lengths(reader, 0.15, I**-0.5) <= 0.39
    assert 0.22 <= mean_error_of_output_lengths(reader, 0.19, I**-0.5) <= 0.39


@pytest.mark.parametrize("reader", [webui, invokeai])
def test_m3_lengths_of_outputs_meet_norms_of_inputs(reader: object) -> None:
    # It falls with the change, to which the wrong lengths are compared.
    assert 0.44 <= mean_error_of_output_lengths(reader, 0.26, O**-0.5) <= 0.88
    assert mean_error_of_output_lengths(reader, 0.08, O**-0.5) > 1.5


@pytest.mark.parametrize("reader", READERS.values(), ids=READERS)
@pytest.mark.parametrize("kernel", [(), (3, 3)])
def test_m4_lengths_of_inputs(reader: object, kernel: tuple[int, ...]) -> None:
    weight, tensors = base(*kernel), lora(kernel=kernel) | alpha(float(R))
    change = (tensors["lora_up.weight"].flatten(1) @ tensors["lora_down.weight"].flatten(1)).reshape(weight.shape)
    lengths = lengths_of(weight, 1)
    tensors = tensors | {"dora_scale": lengths}
    expected = with_lengths(weight, change, lengths, 1)
    assert error(read(reader, tensors, weight), expected) < 1e-7
    # M5: at other strengths on the line between the weights.
    assert error(read(reader, tensors, weight, 0.5), 0.5 * expected) < 1e-7


def test_m5_strength_zero_leaves_the_change_in() -> None:
    weight, tensors = base(), lora() | alpha(float(R))
    change = tensors["lora_up.weight"] @ tensors["lora_down.weight"]
    assert error(read(simpletuner, tensors | {"dora_scale": lengths_of(weight, 0)}, weight, 0.0), change) < 1e-12


@pytest.mark.parametrize("reader", [invokeai])
def test_lengths_over_other_algorithms_are_refused(reader: object) -> None:
    with pytest.raises(Refused, match="KeyError"):
        read(reader, loha() | alpha(2.0) | {"dora_scale": normal(O, 1)}, base())


def glora(o: int, i: int) -> dict[str, Tensor]:
    new = {"a1": (i, R), "a2": (R, i), "b1": (o, R), "b2": (R, i)}
    return {f"{name}.weight": normal(*shape, size=0.3) for name, shape in new.items()}


def glora_change(tensors: dict[str, Tensor], weight: Tensor) -> Tensor:
    a1, a2, b1, b2 = (tensors[f"{name}.weight"] for name in ("a1", "a2", "b1", "b2"))
    return weight @ a1 @ a2 + b1 @ b2


def old_layout(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    swap = {"a1": "a2", "a2": "a1", "b1": "b2", "b2": "b1"}
    return {f"{swap[name[:2]]}.weight": tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize("o", [O, I])
@pytest.mark.parametrize("reader", [comfyui, forge, simpletuner])
def test_m7_m8_glora_of_the_new_layout(reader: object, o: int) -> None:
    weight, tensors = normal(o, I), glora(o, I)
    assert error(read(reader, tensors | alpha(2.0), weight), 0.5 * glora_change(tensors, weight)) < 1e-12


def test_m7_glora_in_the_webui() -> None:
    weight, tensors = base(), glora(O, I)
    expected = 0.5 * glora_change(tensors, weight)
    assert error(read(webui, old_layout(tensors) | alpha(2.0), weight), 2 * expected) < 1e-12
    assert error(read(comfyui, old_layout(tensors) | alpha(2.0), weight), expected) < 1e-12
    with pytest.raises(Refused):
        read(webui, tensors | alpha(2.0), weight)
    with pytest.raises(Refused):
        read(invokeai, tensors | alpha(2.0), weight)


def oft(stages: int = 0, size: float = 0.3, b: int = 6) -> dict[str, Tensor]:
    return {"oft_blocks": normal(*(stages,) * bool(stages), O // b, b, b, size=size)}


def turn(q: Tensor) -> Tensor:
    eye = torch.eye(q.shape[-1], dtype=q.dtype)
    return (eye + q) @ (eye - q).inverse()


def rotate_weight(tensors: dict[str, Tensor], weight: Tensor, limit: float = 0.0) -> Tensor:
    q = tensors["oft_blocks"] - tensors["oft_blocks"].mT
    if limit:
        q = q * min(1.0, limit / float(q.norm()))
    rows = weight.reshape(*q.shape[:2], -1)
    return (turn(q).mT @ rows).reshape(weight.shape) - weight


def test_m9_the_limit_of_rotations_without_the_number_of_outputs() -> None:
    weight, tensors = base(), oft(size=0.1)
    for said in (alpha(0.04), alpha(0.0)):
        expected = rotate_weight(tensors, weight, O * float(said["alpha"]))
        assert error(read(webui, tensors | said, weight), expected) < 1e-7
        assert error(read(simpletuner, tensors | said, weight), expected) < 1e-7
    limited = rotate_weight(tensors, weight, O * 0.04)
    assert error(read(comfyui, tensors | alpha(0.04), weight), limited) == pytest.approx(0.96, abs=0.02)
    # M10
    assert error(read(comfyui, tensors | alpha(0.0), weight), rotate_weight(tensors, weight)) < 1e-7


def test_m11_lengths_of_rotations() -> None:
    weight, tensors = base(), oft() | alpha(0.0)
    lengths = 1 + normal(O, 1, size=0.5)
    change = rotate_weight(tensors, weight)
    expected = lengths * (weight + change) - weight
    assert error(read(webui, tensors | {"rescale": lengths}, weight), expected) < 1e-12
    assert error(read(comfyui, tensors | {"rescale": lengths}, weight), change) < 1e-12
    many = oft(3) | alpha(0.0)
    plain = weight + read(comfyui, many, weight)
    assert error(weight + read(comfyui, many | {"rescale": lengths}, weight), lengths * plain) < 1e-12


def test_m12_m13_strength_of_rotations() -> None:
    weight, tensors = base(), oft() | alpha(0.0)
    half = 0.5 * rotate_weight(tensors, weight)
    assert error(read(webui, tensors, weight, 0.5), half) < 1e-12
    assert error(read(simpletuner, tensors, weight, 0.5), half) < 1e-12
    assert error(read(comfyui, tensors, weight, 0.5), half) == pytest.approx(0.5)
    many = oft(3, size=0.1) | alpha(0.0)
    own = read(simpletuner, many, weight, 0.5)
    assert error(read(comfyui, many, weight, 0.5), own) == pytest.approx(0.5)
    assert error(read(webui, many, weight, 0.5), own) > 0.01
    assert error(read(webui, many, weight), read(simpletuner, many, weight)) < 1e-12
    assert error(read(comfyui, many, weight), read(simpletuner, many, weight)) < 1e-12


def test_m14_a_butterfly_without_alpha() -> None:
    weight, tensors = base(), oft(3)
    assert comfyui.read(tensors, weight, None, "linear") is None
    assert read(webui, tensors, weight).isfinite().all()


@pytest.mark.parametrize("reader", [webui, invokeai])
def test_m15_one_factor_for_each_channel(reader: object) -> None:
    weight, bias = base(), normal(O)
    for on_input, w, spread in ((1, normal(I), (1, I)), (0, normal(O), (O, 1))):
        tensors = {"weight": w, "on_input": torch.tensor(on_input)}
        whole, same = reader.read(tensors, weight, bias, "linear")
        assert error(whole, weight * (1 + w.reshape(spread))) < 1e-12
        assert torch.equal(same, bias)
    kernel = base(3, 3)
    on_input = {"weight": normal(1, I, 1, 1), "on_input": torch.tensor(1)}
    assert error(read(reader, on_input, kernel), kernel * on_input["weight"]) < 1e-12
    with pytest.raises(Refused):
        read(reader, {"weight": normal(1, O, 1, 1), "on_input": torch.tensor(0)}, kernel)
    assert comfyui.read(on_input, kernel, None, "conv") is None
    with pytest.raises(Refused):
        read(simpletuner, on_input, kernel)


@pytest.mark.parametrize("reader", READERS.values(), ids=READERS)
def test_m19_three_blocks_under_the_alpha_of_one(reader: object) -> None:
    parts = [lora(O // 3, I) for _ in range(3)]
    expected = torch.cat([p["lora_up.weight"] @ p["lora_down.weight"] for p in parts])
    tensors = {
        "lora_up.weight": torch.block_diag(*(p["lora_up.weight"] for p in parts)),
        "lora_down.weight": torch.cat([p["lora_down.weight"] for p in parts]),
    }
    found = read(reader, tensors | alpha(float(R)), base())
    assert float(found.norm() / expected.norm()) == pytest.approx(1 / 3)
    assert error(read(reader, tensors | alpha(3.0 * R), base()), expected) < 1e-12


@pytest.mark.parametrize("reader", READERS.values(), ids=READERS)
def test_m21_the_rank_of_a_split_factor(reader: object) -> None:
    w1 = {"lokr_w1_a": normal(4, 2), "lokr_w1_b": normal(2, 4)}
    w2 = {"lokr_w2_a": normal(6, 3), "lokr_w2_b": normal(3, 4)}
    one, two = w1["lokr_w1_a"] @ w1["lokr_w1_b"], w2["lokr_w2_a"] @ w2["lokr_w2_b"]
    expected = torch.kron(one, two)
    assert error(read(reader, w1 | w2 | alpha(1.0), base()), expected / 3) < 1e-12
    assert error(read(reader, w1 | {"lokr_w2": two} | alpha(1.0), base()), expected / 2) < 1e-12


def lokr_change(w1: Tensor, w2: Tensor) -> Tensor:
    blocks = torch.einsum("ab,cdk->acbdk", w1, w2.reshape(*w2.shape[:2], -1))
    return blocks.reshape(w1.shape[0] * w2.shape[0], -1, *w2.shape[2:])


@pytest.mark.parametrize("kernel", [(3,), (1, 3, 3), (3, 3, 3)])
@pytest.mark.parametrize("reader", [comfyui, forge, invokeai])
def test_m23_a_whole_factor_on_one_or_three_dimensions(reader: object, kernel: tuple[int, ...]) -> None:
    weight, tensors = base(*kernel), {"lokr_w1": normal(4, 4), "lokr_w2": normal(6, 4, *kernel)}
    expected = lokr_change(tensors["lokr_w1"], tensors["lokr_w2"])
    assert error(read(reader, tensors, weight), expected) == pytest.approx(1.4, abs=0.1)
    assert error(read(simpletuner, tensors | alpha(1.0), weight), expected) < 1e-12
    with pytest.raises(Refused):
        read(webui, tensors, weight)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("reader", READERS.values(), ids=READERS)
def test_a_second_factor_written_as_a_product_is_read_everywhere(reader: object, kernel: tuple[int, ...]) -> None:
    w1, w2 = normal(4, 4), normal(6, 4, *kernel)
    tensors = {"lokr_w1": w1, "lokr_w2_a": torch.eye(6, dtype=w1.dtype), "lokr_w2_b": w2.flatten(1)} | alpha(6.0)
    weight = base(*kernel)
    assert error(read(reader, tensors, weight), lokr_change(w1, w2).reshape(weight.shape)) < 1e-12


def with_core(name: str, kernel: tuple[int, ...]) -> dict[str, Tensor]:
    ones, core = (1,) * len(kernel), normal(R, R, *kernel)
    if name == "lora":
        return {"lora_up.weight": normal(O, R, *ones), "lora_down.weight": normal(R, I, *ones), "lora_mid.weight": core}
    if name == "loha":
        factors = {f"hada_w{n}_{s}": normal(R, size) for n in (1, 2) for s, size in (("a", O), ("b", I))}
        return factors | {"hada_t1": core, "hada_t2": normal(*core.shape)}
    return {"lokr_w1": normal(4, 4), "lokr_w2_a": normal(R, 6), "lokr_w2_b": normal(R, 4), "lokr_t2": core}


@pytest.mark.parametrize("name", ["lora", "loha", "lokr"])
@pytest.mark.parametrize("reader", READERS.values(), ids=READERS)
def test_cores(reader: object, name: str) -> None:
    weight, tensors = base(3, 3), with_core(name, (3, 3)) | alpha(2.0)
    if name == "lokr" and reader is comfyui:
        assert comfyui.read(tensors, weight, None, "conv") is None
    elif name == "lokr" and reader is forge:
        with pytest.raises(Refused, match="view size"):
            read(reader, tensors, weight)
    elif name == "lokr":
        with pytest.raises(Refused, match="do not fit"):
            read(simpletuner, tensors, weight)
        w2 = torch.einsum("pq...,qi,po->oi...", *(tensors[f"lokr_{each}"] for each in ("t2", "w2_b", "w2_a")))
        wanted = 2.0 / R * lokr_change(tensors["lokr_w1"], w2).reshape(weight.shape)
        assert error(read(reader, tensors, weight), wanted) < 1e-12
    else:
        assert error(read(reader, tensors, weight), read(simpletuner, tensors, weight)) < 1e-12
    for kernel in ((3,), (1, 3, 3)):
        with pytest.raises(Refused):
            read(reader, with_core(name, kernel) | alpha(2.0), base(*kernel))
