"""Parameters that several modules own: left out of a plan unless named, and merged only when asked to part them."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import Tensor, nn

from cases import perturb, relative
from lycoris import AdapterSet, AttachError, LoRA, PlanError, Rule, create_lycoris, plan


class Head(nn.Linear):
    """An output layer with a class of its own."""


class Language(nn.Module):
    """An output layer tied to the embeddings."""

    def __init__(self, head: type[nn.Linear] = nn.Linear) -> None:
        super().__init__()
        self.embed, self.middle = nn.Embedding(9, 8), nn.Linear(8, 8)
        self.lm_head = head(8, 9, bias=False)
        self.lm_head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.lm_head(self.middle(self.embed(x)))

    @property
    def tied(self) -> bool:
        return self.lm_head.weight is self.embed.weight


class Shared(nn.Module):
    """Two layers with one weight, a bare parameter that is a layer's too, and a layer that appears twice."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.b.weight = self.a.weight
        self.bare = self.c.weight
        self.d = nn.Linear(4, 4)
        self.again = self.d


IDS = torch.arange(5)[None]


def paths(model: nn.Module, *rules: Rule) -> list[str]:
    return [placement.path for placement in plan(model, rules).placements]


def test_tied_layers_are_left_out_and_reported() -> None:
    model = Language()
    made = plan(model, Rule(LoRA(rank=2)))
    assert [placement.path for placement in made.placements] == ["middle"]
    assert "lm_head" in made.skipped
    (remark,) = made.remarks
    assert remark.kind == "tied"
    assert "lm_head, linear (9, 8): tied to embed.weight; left out" in remark
    assert remark in str(made)


def test_every_kind_of_tie_is_found() -> None:
    rule = Rule(LoRA(rank=2), kind="*")
    assert paths(Shared(), rule) == ["d"]
    assert paths(Shared(), Rule(LoRA(rank=2), path="[abcd]*")) == ["d"], "a letter of a pattern is no name"
    remarks = " ".join(plan(Shared(), rule).remarks)
    for tie in ("a, linear (4, 4): tied to b.weight", "bare, parameter (4, 4): tied to c.weight"):
        assert tie in remarks


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (Rule(LoRA(rank=2), path="lm_head"), ["lm_head"]),
        (Rule(LoRA(rank=2), path="*lm_head"), ["lm_head"]),
        (Rule(LoRA(rank=2), kind="embedding"), ["embed"]),
        (Rule(LoRA(rank=2), kind=("linear", "embedding")), ["embed", "middle"]),
        (Rule(LoRA(rank=2), kind="*"), ["middle"]),
    ],
)
def test_what_is_named_is_adapted(rule: Rule, expected: list[str]) -> None:
    assert sorted(paths(Language(), rule)) == expected
    named = [str(remark) for remark in plan(Language(), rule).remarks if "as it was named" in remark]
    assert len(named) == len(set(expected) - {"middle"})


def test_a_plan_of_tied_layers_alone_is_refused() -> None:
    with pytest.raises(PlanError, match=r"no layer gets an adapter: lm_head.*tied to embed.weight.*name the layer"):
        plan(Language(), Rule(LoRA(rank=2), path="lm*"))


def test_a_merge_that_would_part_them_is_refused_unless_asked_for() -> None:
    model = Language()
    adapters = AdapterSet.build(model, plan(model, [Rule(LoRA(rank=2), path="lm_head"), Rule(LoRA(rank=2))])).attach()
    perturb(adapters)
    before, attached = model.embed.weight.detach().clone(), model(IDS)
    with pytest.raises(AttachError, match=r"lm_head shares its weight with embed.weight.*merge with untie=True"):
        adapters.merge()
    assert model.tied
    assert not adapters.merged
    report = adapters.merge(untie=True)
    assert report.untied == ("lm_head from embed.weight",)
    assert "untied  lm_head from embed.weight" in str(report)
    assert relative(model(IDS), attached) < 1e-5
    assert torch.equal(model.embed.weight, before)
    adapters.unmerge()
    assert model.tied


def test_only_layers_with_adapters_are_asked_about() -> None:
    model = Language()
    adapters = AdapterSet.build(model, plan(model, Rule(LoRA(rank=2)))).attach()
    perturb(adapters)
    assert adapters.merge().untied == ()
    assert model.tied


def test_networks_keep_ties(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "LyCORIS")
    model = Language()
    network = create_lycoris(model, linear_dim=2, algo="lora")
    (record,) = caplog.records
    assert "lm_head" in record.getMessage()
    assert "left out" in record.getMessage()
    network.apply_to()
    network.merge_to()
    assert model.tied


@pytest.mark.parametrize(
    "preset",
    [
        {"target_name": ["lm_head"], "target_module": []},
        {"target_module": ["Head"]},
        {"name_algo_map": {"lm_head": {"algo": "loha"}}, "target_module": []},
        {"module_algo_map": {"Head": {"algo": "loha"}}, "target_module": []},
    ],
)
def test_a_preset_names_too(preset: dict[str, object]) -> None:
    model = Language(Head)
    network = create_lycoris(model, linear_dim=2, algo="lora", apply_preset=preset)
    assert [module.lora_name for module in network.loras] == ["lycoris_lm_head"]
    network.apply_to()
    with pytest.raises(AttachError, match="untie=True"):
        network.merge_to()
    network.merge_to(untie=True)
    assert not model.tied
    network.restore()
    assert model.tied


def test_a_preset_without_it_says_so() -> None:
    preset = {"target_name": [".*head.*"], "target_module": [], "use_fnmatch": False}
    with pytest.raises(PlanError, match="name the layer"):
        create_lycoris(Language(), linear_dim=2, algo="lora", apply_preset=preset)
