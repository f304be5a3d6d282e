"""Any shape of layer and input: forward equals merge, and a file brings it back."""

from __future__ import annotations

import warnings

import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from cases import NOT_ALONE, WITH_SLICES, One, adapt, dense, relative, serves
from lycoris import AdapterSet
from lycoris.files import encode, resolve

SIZES = st.integers(1, 24)
NAMES = st.sampled_from(sorted(WITH_SLICES))


@settings(max_examples=150, deadline=None)
@given(name=NAMES, o=SIZES, i=SIZES, lead=st.lists(st.integers(0, 3), max_size=3), bias=st.booleans(), seed=SIZES)
def test_linear(name: str, o: int, i: int, lead: list[int], bias: bool, seed: int) -> None:
    torch.manual_seed(seed)
    check(name, nn.Linear(i, o, bias=bias), torch.randn(*lead, i))


@settings(max_examples=150, deadline=None)
@given(
    name=NAMES,
    channels=st.tuples(st.integers(1, 6), st.integers(1, 6), st.sampled_from([1, 1, 2, 3])),
    kernel=st.lists(st.integers(1, 3), min_size=1, max_size=3),
    stride=st.integers(1, 2),
    dilation=st.integers(1, 2),
    mode=st.sampled_from(["zeros", "circular", "replicate"]),
    batch=st.integers(1, 2),
)
def test_convolution(
    name: str, channels: tuple[int, int, int], kernel: list[int], stride: int, dilation: int, mode: str, batch: int
) -> None:
    o, i, groups = channels
    make = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[len(kernel)]
    layer = make(
        i * groups,
        o * groups,
        tuple(kernel),
        stride=stride,
        dilation=dilation,
        padding=1,
        groups=groups,
        padding_mode=mode,
    )
    check(name, layer, torch.randn(batch, i * groups, *(5 for _ in kernel)))


def check(name: str, layer: nn.Module, x: torch.Tensor) -> None:
    model, x = One(layer.double()).eval(), x.double()
    assume(serves(model, WITH_SLICES[name]))
    before = model(x)
    adapters = adapt(model, WITH_SLICES[name], random=False)
    assert torch.equal(model(x), before)
    adapters.detach()
    adapters = adapt(model, WITH_SLICES[name], name="other")
    y = model(x)
    alone = WITH_SLICES[name] not in NOT_ALONE
    tensors = encode(adapters.bundle()) if alone else {}
    if x.numel():
        assert relative(y, dense(model, x)) < 1e-9
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        adapters.merge()
    if x.numel():
        assert relative(model(x), y) < 1e-9
    adapters.detach()
    if not alone:
        return
    loaded = AdapterSet.load(model, resolve(tensors, model))
    loaded.attach()
    if x.numel():
        assert relative(model(x), y) < 1e-5
