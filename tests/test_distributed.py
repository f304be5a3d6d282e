"""Several processes train the adapters that one would: DDP, FSDP2, and what refuses to go wrong quietly."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import lycoris
from cases import ALGORITHMS, LAYERS, PAIRS, One, relative
from jobs import (
    STEPS,
    TOLERANCE,
    Job,
    Kinds,
    Net,
    assert_same_files,
    batches,
    content,
    fully_sharded,
    optimizer_for,
    start,
    train,
    trained,
    wrap,
    written,
)
from lycoris import AdapterSet, AttachError, Rule, plan
from lycoris.files import encode
from lycoris.layers.sites import ModelSites
from ranks import Ranks

OFTEN = ["lora", "loha-high-rank", "lokr-full-matrix", "tlora", "dora-lora", "oft"]
SERVING = [name for name, layer in PAIRS if layer == "linear-one-vector"]
DRAWING = [name for name in SERVING if ALGORITHMS[name].has_dropout]
"""Dropout differs from process to process, as it should."""
LINEAR = [name for name in SERVING if name not in DRAWING]
SELDOM = [name for name in LINEAR if name not in OFTEN]
NAMES = [*OFTEN, *(pytest.param(name, marks=pytest.mark.slow) for name in SELDOM)]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    both = Ranks(tmp_path_factory.mktemp("meetings"))
    yield both
    both.stop()


@pytest.mark.sample(4)
@pytest.mark.parametrize("way", ["ddp", "fsdp"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("name", NAMES)
def test_two_processes_train_the_file_that_one_does(
    name: str, optimizer: str, way: str, ranks: Ranks, tmp_path: Path
) -> None:
    paths = ranks.run(trained, Job(name, way, optimizer), tmp_path)
    assert_same_files(paths, trained(Job(name, "one", optimizer), tmp_path))


@pytest.mark.sample(8)
@pytest.mark.parametrize("way", ["ddp", "fsdp"])
@pytest.mark.parametrize("name", DRAWING)
def test_processes_that_draw_each_for_itself_stay_together(name: str, way: str, ranks: Ranks, tmp_path: Path) -> None:
    one, two = ranks.run(trained, Job(name, way), tmp_path)
    assert_same_files([one], two)


@pytest.mark.sample(4)
@pytest.mark.parametrize("way", ["fsdp on layers", "fsdp, checkpointing"])
@pytest.mark.parametrize("name", ["lora", "lokr-full-matrix", "tlora", "dora-lora"])
def test_sharded_by_layer_and_recomputed(name: str, way: str, ranks: Ranks, tmp_path: Path) -> None:
    assert_same_files(ranks.run(trained, Job(name, way), tmp_path), trained(Job(name, "one"), tmp_path))


def mixed(job: Job, folder: Path) -> Path:
    """Several passes, each with a strength and timesteps of its own, before one backward."""
    model, adapters = start(job)
    wrapped = wrap(model, job.way)
    optimizer = optimizer_for(job, adapters)
    loss = torch.zeros((), dtype=torch.float64)
    for (x, y, timesteps), strength in zip(batches(job), (1.0, -0.5, 2.0, 0.7), strict=True):
        adapters.set_strength(strength)
        adapters.set_timesteps(timesteps)
        loss = loss + (wrapped(x) - y).square().mean()
    adapters.set_strength(9.0)
    adapters.set_timesteps(None)
    loss.backward()
    optimizer.step()
    return written(adapters, folder)


@pytest.mark.parametrize("way", ["ddp, checkpointing", "fsdp, checkpointing"])
@pytest.mark.parametrize("name", ["lora", "tlora", "dora-lora"])
def test_passes_that_are_recomputed_keep_what_was_in_force(name: str, way: str, ranks: Ranks, tmp_path: Path) -> None:
    assert_same_files(ranks.run(mixed, Job(name, way, "sgd"), tmp_path), mixed(Job(name, "one", "sgd"), tmp_path))


@pytest.mark.parametrize("way", ["ddp", "fsdp"])
@pytest.mark.parametrize("name", ["lora", "dora-lora"])
def test_float32_adapters_on_a_bfloat16_base(name: str, way: str, ranks: Ranks, tmp_path: Path) -> None:
    paths = ranks.run(trained, Job(name, way, "sgd", torch.bfloat16), tmp_path)
    wanted = trained(Job(name, "one", "sgd", torch.bfloat16), tmp_path)
    assert_same_files(paths, wanted, 0.02)
    assert {tensor.dtype for tensor in content(wanted)[0].values()} == {torch.float32}


def test_the_comparison_sees_shares_that_are_not_averaged(ranks: Ranks, tmp_path: Path) -> None:
    paths = ranks.run(trained, Job("lora", "one"), tmp_path)
    with pytest.raises(AssertionError):
        assert_same_files(paths, trained(Job("lora", "one"), tmp_path))


@torch.no_grad()
def steered(job: Job) -> list[Tensor]:
    """Outputs for the whole batch under strengths and timesteps that change between passes."""
    model, adapters = start(job)
    wrapped = wrap(model, job.way)
    random = torch.Generator().manual_seed(2)
    values = {key: torch.randn(t.shape, dtype=t.dtype, generator=random) for key, t in adapters.state_dict().items()}
    x = torch.randn(4, 3, 4, 4, dtype=torch.float64, generator=random)
    wrapped(x)  # leaves FSDP's outermost parameters whole
    adapters.load_state_dict(values)
    found = []
    for strength in (1.0, 0.0, -0.5):
        for timesteps in (None, torch.tensor([900, 600, 300, 10])):
            adapters.set_strength(strength)
            adapters.set_timesteps(timesteps)
            found.append(wrapped(x).clone())
    again = adapters.state_dict()
    assert all(torch.equal(again[key], value) for key, value in values.items())
    return found


@pytest.mark.parametrize("way", ["ddp", "fsdp", "fsdp on layers"])
@pytest.mark.parametrize("name", ["lora", "tlora", "dora-lora"])
def test_loaded_tensors_strength_and_timesteps_are_in_force(name: str, way: str, ranks: Ranks) -> None:
    wanted = steered(Job(name, "one"))
    for found in ranks.run(steered, Job(name, way)):
        for y, exact in zip(found, wanted, strict=True):
            assert relative(y, exact) < TOLERANCE


def filled_after_sharding(job: Job, file: Path) -> dict[str, Tensor]:
    model, adapters = start(job, seed=dist.get_rank())
    wrapped = wrap(model, job.way)
    optimizer = optimizer_for(job, adapters)
    with torch.no_grad():
        wrapped(next(batches(job))[0])  # leaves FSDP's outermost parameters whole
    adapters.fill(lycoris.read(file, model))
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert [id(p) for p in adapters.parameters()] == held
    return encode(adapters.bundle())


@pytest.mark.parametrize("way", ["ddp", "fsdp"])
@pytest.mark.parametrize("name", ["lora", "tlora", "dora-lora"])
def test_a_file_fills_adapters_that_are_sharded(name: str, way: str, ranks: Ranks, tmp_path: Path) -> None:
    file = trained(Job(name, "one"), tmp_path)
    tensors, _ = content(file)
    for found in ranks.run(filled_after_sharding, Job(name, way), file):
        assert found.keys() == tensors.keys()
        assert all(torch.equal(found[key], tensor) for key, tensor in tensors.items())


def trained_kinds(way: str, folder: Path) -> Path:
    torch.manual_seed(0)
    model = Kinds().double().requires_grad_(False)
    rules = [Rule(ALGORITHMS["norm"], kind="norm"), Rule(ALGORITHMS["dora-lora"], kind=("parameter", "linear"))]
    adapters = AdapterSet.build(model, plan(model, rules)).attach()
    if way == "fsdp":
        fully_sharded(model, model.bare)
    job = Job("", way)
    train(job, DistributedDataParallel(model) if way == "ddp" else model, adapters, optimizer_for(job, adapters))
    return written(adapters, folder)


@pytest.mark.parametrize("way", ["ddp", "fsdp"])
def test_norms_and_bare_parameters(way: str, ranks: Ranks, tmp_path: Path) -> None:
    wanted = trained_kinds("one", tmp_path)
    assert any(".bare." in key or "_bare_" in key for key in content(wanted)[0])
    assert_same_files(ranks.run(trained_kinds, way, tmp_path), wanted)


def broadcast_start(job: Job) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    model, adapters = start(job, seed=dist.get_rank())
    for tensor in adapters.state_dict().values():
        dist.broadcast(tensor, src=0)
    wrap(model, job.way)
    return encode(start(job)[1].bundle()), encode(adapters.bundle())


def test_starts_that_differ_are_made_one_by_a_broadcast(ranks: Ranks) -> None:
    for wanted, found in ranks.run(broadcast_start, Job("tlora-random", "fsdp")):
        assert all(torch.equal(found[key], tensor) for key, tensor in wanted.items())


def resumed(job: Job, folder: Path) -> Path:
    """Stop half way, and go on with another model from gathered states of adapters and optimizer."""
    from torch.distributed.checkpoint import state_dict as states

    options = states.StateDictOptions(full_state_dict=True)
    model, adapters = start(job)
    wrapped, optimizer = wrap(model, job.way), optimizer_for(job, adapters)
    train(job, wrapped, adapters, optimizer, slice(0, STEPS // 2))
    saved = adapters.state_dict(), states.get_optimizer_state_dict(wrapped, optimizer, options=options)
    model, adapters = start(job)
    wrapped, optimizer = wrap(model, job.way), optimizer_for(job, adapters)
    adapters.load_state_dict(saved[0])
    states.set_optimizer_state_dict(wrapped, optimizer, saved[1], options=options)
    train(job, wrapped, adapters, optimizer, slice(STEPS // 2, None))
    return written(adapters, folder)


def test_sharded_training_resumes(ranks: Ranks, tmp_path: Path) -> None:
    paths = ranks.run(resumed, Job("dora-lora", "fsdp"), tmp_path)
    assert_same_files(paths, trained(Job("dora-lora", "one"), tmp_path))


def refusals(job: Job) -> dict[str, str]:
    """What the library says to things that a sharded or wrapped model cannot take."""
    model, adapters = start(job)
    before = model(next(batches(job))[0])
    wrapped = wrap(model, job.way)
    said = {}

    def say(what: str, act: Callable[[], object]) -> None:
        try:
            act()
        except AttachError as error:
            said[what] = str(error)

    def another(name: str) -> AdapterSet:
        return AdapterSet.build(wrapped, plan(wrapped, Rule(ALGORITHMS[name]), strict=False), name="another")

    for state in ("sharded", "whole for now"):
        say(f"attach, {state}", lambda: another("lora").attach())
        say(f"build, {state}", lambda: another("dora-lora"))
        say(f"merge, {state}", adapters.merge)
        with torch.no_grad():
            wrapped(next(batches(job))[0])
    say("detach", adapters.detach)
    if not adapters.attached:
        adapters.attach()
        assert relative(wrapped(next(batches(job))[0]), before) < TOLERANCE
    return said


def test_what_sharded_models_refuse(ranks: Ranks) -> None:
    for said in ranks.run(refusals, Job("lora", "fsdp")):
        assert "attach the adapters first" in said["attach, sharded"]
        assert said["attach, whole for now"] == said["attach, sharded"]
        assert "before the model is sharded" in said["build, sharded"]
        assert "write the adapters and merge them into an unsharded model" in said["merge, sharded"]
        assert said["merge, whole for now"] == said["merge, sharded"]
        assert "detach" not in said
    for said in ranks.run(refusals, Job("lora", "fsdp on layers")):
        assert "undo that first" in said["detach"]
    for said in ranks.run(refusals, Job("lora", "ddp")):
        assert "build on its .module" in said["attach, sharded"]


def with_the_first_fsdp(job: Job, folder: Path) -> Path:
    from torch.distributed.fsdp import FullyShardedDataParallel

    model, adapters = start(job)
    wrapped = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    train(job, wrapped, adapters, optimizer_for(job, adapters))
    with pytest.raises(AttachError, match="another library holds the rest of it"):
        adapters.bundle()
    with FullyShardedDataParallel.summon_full_params(wrapped):
        return written(adapters, folder)


def test_pieces_that_others_hold_are_never_written(ranks: Ranks, tmp_path: Path) -> None:
    job = Job("lokr-full-matrix", "one", "sgd")
    for path in ranks.run(with_the_first_fsdp, job, tmp_path):
        found, wanted = content(path)[0], content(trained(job, tmp_path))[0]
        assert {key: t.shape for key, t in found.items()} == {key: t.shape for key, t in wanted.items()}


def with_accelerate(job: Job, folder: Path) -> Path:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    accelerator = Accelerator(cpu=True)
    model, adapters = start(job)
    wrapped, optimizer = accelerator.prepare(model, optimizer_for(job, adapters))
    assert isinstance(wrapped, DistributedDataParallel)
    for x, y, timesteps in batches(job):
        optimizer.zero_grad()
        adapters.set_timesteps(timesteps)
        accelerator.backward((wrapped(x) - y).square().mean())
        accelerator.clip_grad_norm_(adapters.parameters(), 0.5)
        optimizer.step()
    AcceleratorState._reset_state(True)
    return written(adapters, folder)


def test_accelerate_trains_the_same_file(ranks: Ranks, tmp_path: Path) -> None:
    assert_same_files(ranks.run(with_accelerate, Job("tlora", "ddp"), tmp_path), trained(Job("tlora", "one"), tmp_path))


def with_network(way: str, folder: Path) -> Path:
    torch.manual_seed(0)
    model = Net().double().requires_grad_(False)
    network = lycoris.create_lycoris(model, 1.0, linear_dim=4, linear_alpha=2.0, algo="lokr")
    network.apply_to()
    wrapped = wrap(model, way)
    optimizer = torch.optim.AdamW(network.prepare_optimizer_params(0.05))
    for x, y, _ in batches(Job("lokr", way)):
        optimizer.zero_grad()
        (wrapped(x) - y).square().mean().backward()
        optimizer.step()
    path = folder / f"{way}{dist.get_rank() if dist.is_initialized() else 0}.safetensors"
    network.save_weights(path, None)
    return path


@pytest.mark.parametrize("way", ["ddp", "fsdp"])
def test_the_documented_interface(way: str, ranks: Ranks, tmp_path: Path) -> None:
    assert_same_files(ranks.run(with_network, way, tmp_path), with_network("one", tmp_path))


@pytest.mark.each_value
@pytest.mark.parametrize(("name", "layer"), PAIRS, ids=["-on-".join(pair) for pair in PAIRS])
def test_no_trained_tensor_is_a_scalar(name: str, layer: str) -> None:
    """FSDP2 shards the first dimension, and refuses tensors that have none."""
    ((_, _, _, g),) = ModelSites(One(LAYERS[layer].layer())).values()
    assert all(slot.shape for slot in ALGORITHMS[name].slots(g).values() if slot.trainable)
