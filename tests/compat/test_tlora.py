"""Timestep masks as trainers set them: for the whole process, before a forward pass, cleared before its backward."""

from __future__ import annotations

import copy
import gc
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cases import perturb, relative
from lycoris import (
    AttachError,
    ConfigError,
    LycorisNetwork,
    RankSchedule,
    clear_timestep_mask,
    compute_timestep_mask,
    create_lycoris,
    create_lycoris_from_weights,
    get_timestep_mask,
    set_timestep_mask,
)

RANK = 4
CHECKPOINTING = {"none": None, "reentrant": True, "non-reentrant": False}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.linear = nn.Conv2d(4, 4, 3, padding=1), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(self.conv(x).tanh().movedim(1, -1)).movedim(-1, 1)


class Denoiser(nn.Module):
    """Two blocks, checkpointed or not as diffusers does it; it is called with a timestep."""

    def __init__(self, reentrant: bool | None = None) -> None:
        super().__init__()
        self.blocks, self.reentrant = nn.ModuleList([Block(), Block()]), reentrant

    def forward(self, x: Tensor, timestep: Tensor | float) -> Tensor:
        save = self.reentrant is not None and torch.is_grad_enabled()
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=self.reentrant) if save else block(x)
        return x


class NoTimestep(Denoiser):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x, 0)


def denoiser(reentrant: bool | None = None, kind: type[Denoiser] = Denoiser) -> Denoiser:
    torch.manual_seed(0)
    return kind(reentrant).double()


def adapted(model: nn.Module, apply: bool = True, **options: Any) -> LycorisNetwork:
    """A network that follows masks only: one from tensors without a header has no schedule of its own."""
    torch.manual_seed(1)
    made = create_lycoris(model, 1.0, RANK, 3.0, algo="tlora", **options).double()
    perturb(made.adapters)
    network, _ = create_lycoris_from_weights(1.0, None, model, weights_sd=made.state_dict())
    network.double()
    if apply:
        network.apply_to()
    return network


@pytest.fixture
def x() -> Tensor:
    return torch.randn(3, 4, 3, 3, dtype=torch.float64)


def first(ranks: int, size: int = RANK) -> Tensor:
    """(1, size), the first `ranks` of them counting."""
    return (torch.arange(size) < ranks).float().unsqueeze(0)


def masked(model: nn.Module, x: Tensor, mask: Tensor) -> Tensor:
    set_timestep_mask(mask)
    try:
        return model(x, 500)
    finally:
        clear_timestep_mask()


def test_each_mask_has_an_effect_of_its_own(x: Tensor) -> None:
    model = denoiser()
    base = model(x, 500)
    adapted(model)
    found = [masked(model, x, first(ranks)) for ranks in range(RANK + 1)]
    assert torch.equal(found[0], base)
    assert torch.equal(found[RANK], model(x, 500))
    for more, fewer in zip(found[1:], found, strict=False):
        assert relative(more, fewer) > 1e-4


def test_one_mask_per_sample_is_each_sample_with_its_own(x: Tensor) -> None:
    model = denoiser()
    adapted(model)
    together = masked(model, x, torch.cat([first(1), first(4), first(2)]))
    alone = torch.cat([masked(model, x[at : at + 1], first(ranks)) for at, ranks in enumerate([1, 4, 2])])
    assert relative(together, alone) < 1e-12


def test_longer_masks_are_cut_and_shorter_ones_padded_with_ones(x: Tensor) -> None:
    model = denoiser()
    adapted(model)
    assert torch.equal(masked(model, x, first(2, size=64)), masked(model, x, first(2)))
    short = masked(model, x, torch.tensor([[0.0, 1.0]]))
    assert torch.equal(short, masked(model, x, torch.tensor([[0.0, 1.0, 1.0, 1.0]])))


def test_a_batch_that_does_not_fit_the_masks_raises(x: Tensor) -> None:
    model = denoiser()
    adapted(model)
    with pytest.raises(ValueError, match=r"2 samples.*batch of 3"):
        masked(model, x, torch.cat([first(1), first(2)]))
    assert get_timestep_mask() is None


@pytest.mark.parametrize("kind", CHECKPOINTING)
@pytest.mark.parametrize("masks", [(1,), (3,), (1, 4, 2)])
def test_clearing_before_backward_keeps_the_gradients_of_the_masked_pass(
    kind: str, masks: tuple[int, ...], x: Tensor
) -> None:
    mask = torch.cat([first(ranks) for ranks in masks])
    assert_same_gradients(kind, lambda model, _: masked(model, x.clone().requires_grad_(), mask).square().sum())


@pytest.mark.parametrize("kind", CHECKPOINTING)
def test_two_masked_passes_before_one_backward(kind: str, x: Tensor) -> None:
    y = torch.randn_like(x)

    def loss(model: nn.Module, _: LycorisNetwork) -> Tensor:
        one = masked(model, x.clone().requires_grad_(), first(1)).square().sum()
        return one + 3 * masked(model, y.clone().requires_grad_(), first(3)).square().sum()

    assert_same_gradients(kind, loss)


@pytest.mark.parametrize("kind", CHECKPOINTING)
@pytest.mark.parametrize("multiplier", [0.0, 0.5])
def test_another_strength_without_gradients_in_between(kind: str, multiplier: float, x: Tensor) -> None:
    """Distillers ask a teacher, with the very same input, between the student's forward and backward."""

    def loss(model: nn.Module, network: LycorisNetwork) -> Tensor:
        student = masked(model, x.clone().requires_grad_(), first(1))
        network.set_multiplier(multiplier)
        with torch.no_grad():
            teacher = masked(model, x, first(4))
        network.set_multiplier(1.0)
        return (student - teacher).square().sum()

    assert_same_gradients(kind, loss)


@pytest.mark.parametrize("kind", CHECKPOINTING)
def test_the_base_model_with_gradients_in_between(kind: str, x: Tensor) -> None:
    """Regularization images are shown at multiplier 0, within one accumulation of gradients."""
    y = torch.randn_like(x)

    def loss(model: nn.Module, network: LycorisNetwork) -> Tensor:
        one = masked(model, x.clone().requires_grad_(), first(1))
        network.set_multiplier(0.0)
        other = masked(model, y.clone().requires_grad_(), first(4))
        network.set_multiplier(1.0)
        return (one - other).square().sum()

    assert_same_gradients(kind, loss)


def assert_same_gradients(kind: str, loss: Any) -> None:
    """The loss's gradients with checkpointing are those of a network that cannot forget its mask."""
    found = []
    for reentrant in (CHECKPOINTING[kind], None):
        model = denoiser(reentrant)
        network = adapted(model)
        value = loss(model, network)
        if reentrant is None:
            found.append(torch.autograd.grad(value, list(network.parameters())))
        else:
            value.backward()
            found.append([p.grad for p in network.parameters()])
        network.restore()
    for a, b in zip(*found, strict=True):
        assert a.abs().sum() > 0
        assert (a - b).abs().max() < 1e-10 * b.abs().max().clamp_min(1)


@pytest.mark.parametrize("reentrant", [True, False])
def test_masks_change_the_gradients_at_all(reentrant: bool, x: Tensor) -> None:
    grads = []
    for mask in (first(1), first(4)):
        model = denoiser(reentrant)
        network = adapted(model)
        masked(model, x.clone().requires_grad_(), mask).square().sum().backward()
        grads.append(torch.cat([p.grad.flatten() for p in network.parameters()]))
        network.restore()
    assert relative(*grads) > 1e-2


@pytest.mark.parametrize("kind", CHECKPOINTING)
def test_a_schedule_of_its_own_reads_the_timestep_of_each_sample(kind: str, x: Tensor) -> None:
    """Without any mask being set: a trainer that knows nothing of T-LoRA still trains it rightly."""
    timesteps = torch.tensor([999.0, 0.0, 400.0])
    grads = []
    for by_hand in (False, True):
        model = denoiser(CHECKPOINTING[kind])
        torch.manual_seed(1)
        network = create_lycoris(model, 1.0, RANK, 3.0, algo="tlora").double()
        perturb(network.adapters)
        network.apply_to()
        mask = torch.cat([compute_timestep_mask(int(t), 1000, RANK) for t in timesteps])
        z = x.clone().requires_grad_()
        out = masked(model, z, mask) if by_hand else model(z, timesteps)
        out.square().sum().backward()
        grads.append(torch.cat([p.grad.flatten() for p in network.parameters()]))
        network.restore()
    assert relative(*grads) < 1e-10


def test_a_mask_set_by_hand_outranks_the_schedule(x: Tensor) -> None:
    model = denoiser()
    network = create_lycoris(model, 1.0, RANK, 3.0, algo="tlora").double()
    perturb(network.adapters)
    network.apply_to()
    assert not torch.equal(masked(model, x, first(4)), model(x, 500))
    assert torch.equal(masked(model, x, first(4)), model(x, 0))
    assert torch.equal(model(x, 250), masked(model, x, first(RankSchedule(max_rank=RANK).rank(250))))


@pytest.mark.filterwarnings("ignore:merging adapters that were trained:UserWarning")
def test_masks_count_after_merging(x: Tensor) -> None:
    model = denoiser()
    network = adapted(model)
    live = [masked(model, x, first(ranks)) for ranks in range(RANK + 1)]
    network.merge_to()
    for ranks in range(RANK + 1):
        assert relative(masked(model, x, first(ranks)), live[ranks]) < 1e-12


def test_a_model_without_timestep_follows_masks_only(x: Tensor, caplog: Any) -> None:
    model = denoiser(kind=NoTimestep)
    network = create_lycoris(model, 1.0, RANK, 3.0, algo="tlora").double()
    perturb(network.adapters)
    network.apply_to()
    assert "NoTimestep takes no `timestep`" in caplog.text
    whole = model(x)
    set_timestep_mask(first(1))
    part = model(x)
    clear_timestep_mask()
    assert relative(whole, part) > 1e-3
    assert torch.equal(model(x), whole)


def test_masks_reach_networks_while_they_are_applied_and_no_longer(x: Tensor) -> None:
    model = denoiser()
    base = model(x, 500)
    network = adapted(model, apply=False)
    set_timestep_mask(first(0))
    network.apply_to()
    assert torch.equal(model(x, 500), base)
    network.restore()
    clear_timestep_mask()
    network.apply_to()
    assert not torch.equal(model(x, 500), base)
    set_timestep_mask(first(0))
    network.restore()
    assert torch.equal(model(x, 500), base)
    assert not model._forward_pre_hooks
    assert not model._forward_hooks


def test_a_forgotten_network_is_not_kept_alive() -> None:
    from lycoris.compat import timestep_masks

    model = denoiser()
    adapted(model)
    before = len(timestep_masks._tracked)
    del model
    gc.collect()
    assert len(timestep_masks._tracked) < before


def test_the_functions() -> None:
    assert compute_timestep_mask(0, 1000, 64).sum() == 64
    assert compute_timestep_mask(1000, 1000, 64).sum() == 1
    assert compute_timestep_mask(500, 1000, 64).shape == (1, 64)
    assert compute_timestep_mask(500, 1000, 64, 8, 2.0).sum() == int(0.25 * 56) + 8
    assert get_timestep_mask() is None
    set_timestep_mask(first(2))
    assert torch.equal(get_timestep_mask(), first(2))
    clear_timestep_mask()
    assert get_timestep_mask() is None
    with pytest.raises(ConfigError, match="min rank"):
        compute_timestep_mask(0, 1000, 4, min_rank=8)


def test_mask_groups_are_not_implemented() -> None:
    for call in (lambda: set_timestep_mask(first(1), 1), lambda: get_timestep_mask(1), lambda: clear_timestep_mask(1)):
        with pytest.raises(ConfigError, match="mask groups are not implemented"):
            call()


def test_applying_without_a_schedule_is_warned_about(x: Tensor, caplog: Any) -> None:
    network = adapted(denoiser(), apply=False)
    network.apply_to()
    network.apply_to()
    assert sum("every rank will count at every step" in text for text in caplog.messages) == 1
    caplog.clear()
    create_lycoris(denoiser(), 1.0, RANK, algo="tlora").apply_to()
    create_lycoris(denoiser(), 1.0, RANK, algo="lora").apply_to()
    assert not caplog.records


def test_tlora_for_some_layers_has_its_schedule(x: Tensor) -> None:
    preset = {"module_algo_map": {"Linear": {"algo": "tlora", "tlora_min_rank": 2}}}
    network = create_lycoris(denoiser(), 1.0, RANK, apply_preset=preset)
    assert network.adapters.schedule == RankSchedule(max_rank=RANK, min_rank=2)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_of_the_model_follows_masks_of_its_own(copied: Any, x: Tensor) -> None:
    model = denoiser()
    network = create_lycoris(model, 1.0, RANK, 3.0, algo="tlora").double()
    perturb(network.adapters)
    network.apply_to()
    again = copied(model)
    assert torch.equal(again(x, 500), model(x, 500))
    assert torch.equal(masked(again, x, first(1)), masked(model, x, first(1)))
    assert not torch.equal(again(x, 500), again(x, 0))
    network.restore()
    assert not model._forward_pre_hooks
    assert again._forward_pre_hooks


def test_a_refused_restore_leaves_the_network_as_it_was() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    lower, upper = (create_lycoris(model, algorithm="tlora", rank=4) for _ in range(2))
    lower.merge_to()
    hooks = len(model._forward_pre_hooks)
    upper.merge_to()
    with pytest.raises(AttachError, match="newest to oldest"):
        lower.restore()
    set_timestep_mask(torch.tensor([[1.0, 0.0, 0.0, 0.0]]))
    assert lower.adapters.rank_masks.mask is not None, "masks still reach it"
    clear_timestep_mask()
    upper.restore()
    assert len(model._forward_pre_hooks) == hooks


@pytest.mark.filterwarnings("ignore:merging adapters that were trained:UserWarning")
@pytest.mark.parametrize("applied", [True, False])
def test_a_merge_for_a_while_leaves_no_trace(applied: bool) -> None:
    """Masks and pipelines reach what is applied or merged, and nothing else."""
    model = Denoiser()
    network = create_lycoris(model, 1.0, 4, 1, algo="tlora")
    schedule = network.adapters.schedule
    if applied:
        network.apply_to()
    before = len(model._forward_pre_hooks), len(model._forward_hooks)
    network.onfly_merge()
    assert model._forward_pre_hooks
    network.onfly_restore()
    assert (len(model._forward_pre_hooks), len(model._forward_hooks)) == before
    set_timestep_mask(torch.tensor([[1.0, 0.0, 0.0, 0.0]]))
    kept = network.loras[0].adapter.call.rank_mask
    assert kept is not None if applied else kept is None
    network.restore()
    assert network.adapters.schedule == schedule
    assert not model._forward_pre_hooks
