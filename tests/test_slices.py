"""An adapter of a fused layer on the layers that have its rows: one in memory, in training and in a file."""

from __future__ import annotations

import copy
import io
import zlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from cases import ALGORITHMS, perturb, relative
from jobs import fully_sharded
from lycoris import OFT, AdapterSet, DoRA, LoKr, LoRA, TLoRA, explain, verify
from lycoris.adapters.adapter import Adapter
from lycoris.adapters.bundle import Bundle
from lycoris.algorithms.base import Algorithm, Entry
from lycoris.algorithms.layer_below import BareWeight
from lycoris.algorithms.row_selection import RowBlock
from lycoris.algorithms.rows import join_rows, separate_slice, share_rows
from lycoris.algorithms.slices import Slice
from lycoris.analysis.memory import memory
from lycoris.errors import AttachError, ConfigError, FileError
from lycoris.layers.geometry import Geometry, describe
from lycoris.ops.equality import same
from ranks import SIZE, Ranks

pytestmark = pytest.mark.filterwarnings("ignore:::diffusers", "ignore:::transformers")

SIZES = {"q": 8, "k": 5, "v": 7, "mlp": 16}
"""Rows of the parts of a fused layer of 36: blocks of no size end where they do."""
EXACT = 1e-10


class Parts(nn.Module):
    """A fused layer as a layer for each part."""

    def __init__(self, fused: nn.Linear) -> None:
        super().__init__()
        start = 0
        for name, size in SIZES.items():
            layer = nn.Linear(fused.in_features, size).double()
            with torch.no_grad():
                layer.weight.copy_(fused.weight[start : start + size])
                layer.bias.copy_(fused.bias[start : start + size])
            setattr(self, name, layer)
            start += size

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([getattr(self, name)(x) for name in SIZES], dim=-1)


class Whole(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fused = nn.Linear(10, 36).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.fused(x)


def entry_of(algorithm: Algorithm, layer: nn.Linear) -> Entry:
    geometry = describe(layer)
    assert geometry is not None
    adapter = Adapter(algorithm, geometry, dtype=torch.float64)
    adapter.initialize(BareWeight(geometry, layer.weight.detach()))
    tensors = {name: t + 0.3 * torch.randn_like(t) for name, t in adapter.whole().items()}
    return Entry(algorithm, geometry, tensors)


def parted(entry: Entry, parts: Parts) -> Bundle:
    """Slices of an adapter for each part."""
    entries, start = {}, 0
    for name, size in SIZES.items():
        geometry = describe(getattr(parts, name))
        assert geometry is not None
        entries[name] = (share_rows(entry, slice(start, start + size), geometry, name).entry,)
        start += size
    return Bundle(entries)


def both(algorithm: Algorithm) -> tuple[Whole, AdapterSet, Parts, AdapterSet]:
    torch.manual_seed(zlib.crc32(str(algorithm).encode()))
    whole = Whole().eval()
    parts, entry = Parts(whole.fused).eval(), entry_of(algorithm, whole.fused)
    one = AdapterSet.load(whole, Bundle({"fused": (entry,)})).attach()
    return whole, one, parts, AdapterSet.load(parts, parted(entry, parts)).attach()


def can_be_sliced(algorithm: Algorithm) -> bool:
    """Whether each part is something by itself: blocks that are mixed must end where parts do."""
    g = Geometry(kind="linear", shape=(36, 10))
    mixed = isinstance(algorithm, OFT) or (isinstance(algorithm, DoRA) and algorithm.axis == "in")
    try:
        algorithm.check(g)
    except ConfigError:
        return False
    return not mixed


SLICED = [name for name, algorithm in ALGORITHMS.items() if can_be_sliced(algorithm)]


@pytest.mark.parametrize("name", SLICED)
def test_slices_train_as_the_fused_layer_does(name: str) -> None:
    whole, one, parts, several = both(ALGORITHMS[name])
    x = torch.randn(3, 6, 10, dtype=torch.float64)
    y = whole(x)
    assert relative(parts(x), y) < EXACT
    weights = torch.randn_like(y)
    (whole(x) * weights).sum().backward()
    (parts(x) * weights).sum().backward()
    pairs = list(zip(one.parameters(), several.parameters(), strict=True))
    assert pairs
    for a, b in pairs:
        assert a.grad is not None
        assert b.grad is not None
        assert (a.grad - b.grad).abs().max() < EXACT * max(1.0, float(a.grad.abs().max()))


@pytest.mark.parametrize("name", SLICED)
def test_slices_are_one_adapter(name: str) -> None:
    _, one, _, several = both(ALGORITHMS[name])
    assert sum(p.numel() for p in several.parameters()) == sum(p.numel() for p in one.parameters())
    assert len(several.state_dict()) == len(one.state_dict())
    entries = several.bundle().entries
    starts = dict(zip(SIZES, (0, 8, 13, 20), strict=True))
    joined = join_rows(
        [RowBlock(starts[part], stack[0]) for part, stack in entries.items()], one.stacks["fused"][0].geometry, ""
    )
    assert not joined.note
    assert joined.entry.algorithm == ALGORITHMS[name]
    ((own,),) = one.bundle().entries.values()
    assert same(joined.entry.tensors, own.tensors)


@pytest.mark.parametrize("name", SLICED)
@pytest.mark.filterwarnings("ignore:merging adapters that were trained:UserWarning")
def test_a_slice_merges_and_has_a_form_of_its_own(name: str) -> None:
    _, _, parts, several = both(ALGORITHMS[name])
    x = torch.randn(4, 10, dtype=torch.float64)
    y = parts(x)
    several.merge()
    assert relative(parts(x), y) < EXACT
    several.detach()
    own = {part: (separate_slice(entry, part).entry,) for part, (entry,) in several.bundle().entries.items()}
    assert not any(isinstance(entry.algorithm, Slice) for (entry,) in own.values())
    alone = AdapterSet.load(parts, Bundle(own)).attach()
    assert relative(parts(x), y) < EXACT
    assert all(adapter.group is None for stack in alone.stacks.values() for adapter in stack)


def test_blocks_that_are_mixed_are_sliced_where_parts_end() -> None:
    whole = Whole()
    geometry = Geometry(kind="linear", shape=(8, 10))
    entry = entry_of(OFT(block_size=4), whole.fused)
    assert isinstance(share_rows(entry, slice(8, 16), geometry, "part").entry.algorithm, Slice)
    with pytest.raises(FileError, match="part: its diag-oft cannot be cut to 8 of its 36 rows"):
        share_rows(entry, slice(6, 14), geometry, "part")


def test_what_a_start_follows_from_is_the_fused_weight() -> None:
    whole = Whole()
    entry = entry_of(TLoRA(rank=2), whole.fused)
    bare = entry._replace(tensors={name: t for name, t in entry.tensors.items() if not name.endswith("0")})
    with pytest.raises(FileError, match="part: what its tlora started from is left out"):
        share_rows(bare, slice(0, 8), Geometry(kind="linear", shape=(8, 10)), "part")


def test_copies_and_pickles_share_as_the_model_does() -> None:
    _, _, parts, several = both(LoKr(full_matrix=True, factor=4))
    x = torch.randn(2, 10, dtype=torch.float64)
    y, count = parts(x), len(list(several.parameters()))
    stream = io.BytesIO()
    torch.save(parts, stream)
    stream.seek(0)
    for other in (copy.deepcopy(parts), torch.load(stream, weights_only=False)):
        assert torch.equal(other(x), y)
        adapters = [module for module in other.modules() if isinstance(module, Adapter)]
        assert len({id(parameter) for adapter in adapters for parameter in adapter.parameters()}) == count
        assert len({id(adapter.group) for adapter in adapters}) == 1
        assert adapters[0].group is not several.stacks["q"][0].group


def test_moving_and_casting_keep_the_tensors_shared() -> None:
    _, _, parts, several = both(LoKr(full_matrix=True, factor=4))
    count = sum(p.numel() for p in several.parameters())
    parts.to(torch.float32).to(torch.float64)
    assert sum(p.numel() for p in several.parameters()) == count
    several.bundle()
    adapter = several.stacks["k"][0]
    adapter.register_parameter("w1", nn.Parameter(adapter.tensors()["w1"].detach().clone()))
    with pytest.raises(AttachError, match="q and k are slices of one adapter and no longer share its w1"):
        several.bundle()


def test_a_state_is_saved_and_loaded_once() -> None:
    _, _, parts, several = both(LoKr(full_matrix=True, factor=4))
    x = torch.randn(2, 10, dtype=torch.float64)
    before, y = {name: t.clone() for name, t in several.state_dict().items()}, parts(x)
    assert list(before) == ["q/0/w1", "q/0/w2"]
    perturb(several)
    assert not torch.equal(parts(x), y)
    several.load_state_dict(before)
    assert torch.equal(parts(x), y)
    bundle = copy.deepcopy(several.bundle())
    perturb(several)
    several.fill(bundle)
    assert torch.equal(parts(x), y)


def test_other_tensors_for_one_of_the_slices_are_refused() -> None:
    _, _, _, several = both(LoKr(full_matrix=True, factor=4))
    bundle = several.bundle()
    (k,) = bundle.entries["k"]
    other = k._replace(tensors={name: t + 1 for name, t in k.tensors.items()})
    with pytest.raises(FileError, match="q and k share their tensors here, and those for them are not the same"):
        several.fill(replace(bundle, entries=bundle.entries | {"k": (other,)}))


def test_detaching_leaves_no_trace_and_strengths_are_the_layers_own() -> None:
    _, _, parts, several = both(LoRA(rank=3))
    x = torch.randn(2, 10, dtype=torch.float64)
    y = parts(x)
    several.set_strength(0.0, at="k")
    changed = parts(x)
    assert torch.equal(changed[:, :8], y[:, :8])
    assert not torch.equal(changed[:, 8:13], y[:, 8:13])
    several.detach()
    assert not any(isinstance(module, Adapter) for module in parts.modules())


def test_what_they_cost_is_counted_once() -> None:
    _, one, _, several = both(LoKr(full_matrix=True, factor=4))
    told, fused = explain(several), explain(one)
    assert (told.parameters, told.file_bytes) == (fused.parameters, fused.file_bytes)
    assert "its tensors are those of q" in told.layers[1].why
    assert memory(told, 0).optimizer == memory(fused, 0).optimizer
    # Blocks of the first factor that parts share are computed by both.
    assert told.flops < 2 * fused.flops


def test_verify_finds_nothing_wrong() -> None:
    _, _, parts, several = both(LoKr(full_matrix=True, factor=4))
    several.detach()
    parts = parts.float()
    checked = verify(AdapterSet.load(parts, several.bundle()), torch.randn(2, 3, 10))
    assert checked.ok, str(checked)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    processes = Ranks(tmp_path_factory.mktemp("meetings"))
    yield processes
    processes.stop()


def trained(way: str) -> dict[str, Tensor]:
    """After two steps on this process's share of the batch."""
    _, _, parts, several = both(LoKr(full_matrix=True, factor=4))
    model: Any = parts
    x = torch.randn(4, 10, dtype=torch.float64)
    if way != "one":
        x = x.chunk(SIZE)[dist.get_rank()]
        model = DistributedDataParallel(parts) if way == "ddp" else fully_sharded(parts)
    optimizer = torch.optim.SGD(several.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    return several.state_dict()


@pytest.mark.slow
@pytest.mark.parametrize("way", ["ddp", "fsdp"])
def test_processes_train_slices_as_one_does(way: str, ranks: Ranks) -> None:
    alone = trained("one")
    for state in ranks.run(trained, way):
        assert state.keys() == alone.keys()
        assert all(relative(state[name], alone[name]) < EXACT for name in alone)
