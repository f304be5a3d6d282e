"""Rules and a model make a plan: first match wins, and a rule that does nothing is an error."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

from lycoris import BOFT, OFT, AdapterSet, ConfigError, DoRA, Full, LoHa, LoKr, LoRA, Norm, PlanError, Rule, TLoRA, plan
from lycoris.targeting.planning import block_classes


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k, self.norm = nn.Linear(8, 8), nn.Linear(8, 8), nn.LayerNorm(8)


class FeedForward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv_in, self.embed = nn.Conv2d(3, 8, 3), nn.Embedding(4, 8)
        self.blocks = nn.ModuleList([Attention(), FeedForward(), Attention()])


LAYERS = [
    "conv_in",
    "blocks.0.to_q",
    "blocks.0.to_k",
    "blocks.1.net.0",
    "blocks.1.net.2",
    "blocks.2.to_q",
    "blocks.2.to_k",
]


@pytest.fixture
def model() -> Model:
    return Model()


def paths(model: nn.Module, *rules: Rule) -> list[str]:
    return [placement.path for placement in plan(model, rules).placements]


def test_one_rule_for_every_layer(model: Model) -> None:
    made = plan(model, Rule(LoRA(rank=2)))
    assert [p.path for p in made.placements] == LAYERS
    assert made.skipped == ()
    assert made == plan(model, [Rule(LoRA(rank=2))])


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (Rule(LoRA(), inside="Attention"), [path for path in LAYERS if "to_" in path]),
        (Rule(LoRA(), inside="Linear"), LAYERS[1:]),
        (Rule(LoRA(), inside="Model"), LAYERS),
        (Rule(LoRA(), inside="*Forward"), LAYERS[3:5]),
        (Rule(LoRA(), kind="conv"), ["conv_in"]),
        (Rule(LoRA(), path="*.to_q"), ["blocks.0.to_q", "blocks.2.to_q"]),
        (Rule(LoRA(), path="blocks.?.to_q", inside="Attention", kind="linear"), ["blocks.0.to_q", "blocks.2.to_q"]),
        (Rule(LoRA(), path=re.compile(r"blocks\.(0|1)\..*")), LAYERS[1:5]),
    ],
)
def test_conditions_hold_together(rule: Rule, expected: list[str], model: Model) -> None:
    assert paths(model, rule) == expected


def test_expressions_match_whole_paths(model: Model) -> None:
    with pytest.raises(PlanError):
        plan(model, Rule(LoRA(), path=re.compile(r"blocks\.0")))


def test_the_first_match_wins(model: Model) -> None:
    made = plan(model, [Rule(LoKr(), path="blocks.0.to_q"), Rule((), path="*.to_k"), Rule(LoRA(), inside="Attention")])
    assert [(p.path, p.algorithms) for p in made.placements] == [
        ("blocks.0.to_q", (LoKr(),)),
        ("blocks.2.to_q", (LoRA(),)),
    ]
    assert made.skipped == ("conv_in", "blocks.0.to_k", "blocks.1.net.0", "blocks.1.net.2", "blocks.2.to_k")


def test_a_rule_that_earlier_ones_leave_nothing_raises(model: Model) -> None:
    with pytest.raises(PlanError, match=r"LoHa.*earlier rules took the layers"):
        plan(model, [Rule(LoRA()), Rule(LoHa(), inside="Attention")])


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        (Rule(LoRA(), inside="Atention"), r"did you mean Attention\?.*Attention, .*FeedForward"),
        (Rule(LoRA(), inside="Embedding"), r"Classes with such layers in Model: Attention, Conv2d"),
        (Rule(LoRA(), path="blocks.0.to_v"), r"blocks\.0\.to_[qk]"),
        (Rule(LoRA(), path=re.compile("conv_on")), r"conv_in"),
        (Rule((), path="nothing.like.this"), r"Paths like it in Model: blocks"),
    ],
)
def test_a_rule_without_layers_names_near_misses(rule: Rule, words: str, model: Model) -> None:
    with pytest.raises(PlanError, match=words):
        plan(model, [Rule(LoHa(), path="conv_in"), rule])


def test_a_model_without_layers(model: Model) -> None:
    with pytest.raises(PlanError, match="Embedding has no layer"):
        plan(nn.Embedding(2, 2), Rule(LoRA()))
    assert block_classes(nn.Embedding(2, 2)) == []


def test_an_algorithm_that_cannot_serve_a_layer_is_found_before_anything_is_made(model: Model) -> None:
    class Odd(LoRA):
        def slots(self, g):
            if g.kind == "conv":
                raise ConfigError("no convolutions")
            return super().slots(g)

    with pytest.raises(PlanError, match=r"conv_in, conv \(8, 3, 3, 3\): no convolutions"):
        plan(model, Rule(Odd()))


@pytest.mark.parametrize(
    "use",
    [
        LoRA(rank=3),
        LoHa(rank=2),
        LoKr(rank=1),
        TLoRA(rank=2),
        Full(),
        DoRA(inner=LoRA(rank=2)),
        (LoRA(rank=2), LoKr(rank=1)),
    ],
    ids=repr,
)
def test_the_count_of_parameters_is_that_of_the_adapters_made(use, model: Model) -> None:
    made = plan(model, Rule(use))
    assert made.parameters == sum(p.numel() for p in AdapterSet.build(model, made).parameters()) > 0
    assert f"{made.parameters:,} parameters" in str(made)
    assert "7 layers get adapters, 0 do not" in str(made)


def test_planning_touches_nothing_and_needs_no_weights() -> None:
    with torch.device("meta"):
        model = Model()
    keys = list(model.state_dict())
    assert [p.path for p in plan(model, Rule(LoRA())).placements] == LAYERS
    assert list(model.state_dict()) == keys


def test_a_layer_that_appears_twice_is_decided_once() -> None:
    layer = nn.Linear(4, 4)
    assert paths(nn.Sequential(layer, nn.ReLU(), layer), Rule(LoRA())) == ["0"]


def test_a_layer_is_a_model(model: Model) -> None:
    assert paths(model.conv_in, Rule(LoRA())) == [""]


@pytest.mark.parametrize("rules", [[], (), None, LoRA(), [LoRA()], Rule, "lora"])
def test_what_is_no_list_of_rules_is_refused(rules, model: Model) -> None:
    with pytest.raises(PlanError, match=r"a plan needs at least one rule, such as Rule\(LoRA"):
        plan(model, rules)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"use": "lora"}, r"`use` is an algorithm such as LoRA\(rank=8\).* not 'lora'"),
        ({"use": LoRA}, r"not the class LoRA; did you mean LoRA\(\)\?"),
        ({"use": [LoRA()]}, r"a tuple of them from the lowest up"),
        ({"use": (LoRA(), "x")}, r"a tuple of them"),
        (
            {"use": LoRA(), "kind": "lin"},
            r"unknown kind of layer 'lin'; did you mean 'linear'.*conv, embedding",
        ),
        ({"use": LoRA(), "kind": None}, r"unknown kind of layer"),
        ({"use": LoRA(), "path": 3}, r"`path` is a glob"),
        ({"use": LoRA(), "inside": nn.Linear}, r"`inside` is the name of a class, not the class Linear"),
    ],
)
def test_a_rule_that_is_none_is_refused(options, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Rule(**options)


@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [
        (LoRA, {"tucker": "no"}, r"tucker of lora must be True or False, not 'no'"),
        (LoKr, {"full_matrix": "false"}, r"full_matrix of lokr must be True or False, not 'false'"),
        (LoRA, {"use_scalar": 1}, r"use_scalar of lora must be True or False, not 1"),
        (LoRA, {"alpha": "8"}, r"alpha of lora must be a number, not '8'"),
        (LoHa, {"alpha": True}, r"alpha of loha must be a number, not True"),
        (LoRA, {"rank": 2.0}, r"rank of lora must be a whole number, not 2\.0"),
        (LoRA, {"rank": None}, r"rank of lora must be a whole number, not None"),
        (Full, {"bias": "yes"}, r"bias of full must be True or False, not 'yes'"),
        (TLoRA, {"data_init": "false"}, r"data_init of tlora must be True or False"),
    ],
)
def test_settings_have_the_types_that_they_say(kind, options, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        kind(**options)
    assert LoRA(alpha=8) == LoRA(alpha=8.0)


class Mixed(nn.Module):
    """One layer of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.conv, self.norm = nn.Embedding(9, 6), nn.Conv2d(6, 12, 3), nn.LayerNorm(12)
        self.head, self.attention = nn.Linear(12, 7), nn.MultiheadAttention(8, 2)
        self.experts = nn.ParameterList([nn.Parameter(torch.zeros(3, 4, 5))])


@pytest.mark.parametrize(
    ("algorithm", "options", "words"),
    [
        (Norm(), {"path": "head"}, r"head, linear \(7, 12\): norm serves norm, not a linear"),
        (LoRA(), {"kind": "norm"}, r"norm, norm \(12,\): lora serves .*, not a norm; norms take Norm\(\)"),
        (OFT(block_size=4), {"path": "head"}, r"head.*block_size 4 does not divide the 7 outputs, and nothing near it"),
        (BOFT(block_size=4), {"path": "conv"}, r"conv.*12 outputs are it times a power of two: not 4; .* 6 and 12"),
        (BOFT(block_size=4), {"path": "head"}, r"head.*no size does, leave it out"),
        (LoRA(rank=8), {"path": "head"}, r"head.*rank 8 is above 7.*use rank=7"),
        (TLoRA(rank=8), {"path": "head"}, r"head.*rank 8 is above 7"),
        (DoRA(inner=LoRA(rank=2), axis="in"), {"path": "words", "kind": "*"}, r"words.*axis='out'"),
        (LoKr(factor=5), {"path": "conv"}, r"conv.*factor 5 does not divide 6, so it means 2; the nearest.* is 6"),
        (LoKr(full_matrix=True, rank_dropout=0.5), {"path": "head"}, r"head.*no rank to drop"),
        (LoRA(rank=2, dropout=0.5), {"path": "words", "kind": "*"}, r"words.*an embedding has none to drop"),
        (LoRA(rank=2, dropout=0.5), {"kind": "parameter"}, r"a parameter has none to drop"),
        (Full(weight=False), {"path": "words", "kind": "*"}, r"words.*trains biases, and this embedding has none"),
    ],
)
def test_what_a_layer_cannot_use_is_refused_with_the_nearest_that_works(algorithm, options, words: str) -> None:
    with pytest.raises(PlanError, match=words):
        plan(Mixed(), Rule(algorithm, **options))


def test_what_is_only_wasteful_may_be_asked_for() -> None:
    made = plan(nn.Sequential(*(nn.Linear(4, 4) for _ in range(9))), Rule(LoRA(rank=8)), strict=False)
    assert len(made.placements) == 9
    assert "0, linear (4, 4): rank 8 is above 4" in made.remarks[0]
    assert made.remarks[-1] == "and 6 more layers like these"


def test_rules_reach_every_kind_of_place_by_name() -> None:
    rules = [
        Rule(LoRA(rank=2), kind=("linear", "conv", "embedding")),
        Rule(Norm(), kind="norm"),
        Rule(LoRA(rank=2), kind="parameter"),
    ]
    found = {placement.path: placement.geometry.kind for placement in plan(Mixed(), rules).placements}
    assert found == {
        "words": "embedding",
        "conv": "conv",
        "norm": "norm",
        "head": "linear",
        "attention.in_proj_weight": "parameter",
        "attention.out_proj.weight": "parameter",
        "experts.0": "parameter",
    }
    assert not plan(Mixed(), Rule(LoRA(rank=2))).skipped


def test_fused_attention_and_experts_are_adapted() -> None:
    model = nn.MultiheadAttention(8, 2, batch_first=True).double()
    x = torch.randn(2, 3, 8, dtype=torch.float64)
    before = model(x, x, x)[0]
    adapters = AdapterSet.build(model, plan(model, Rule(LoRA(rank=2), kind="parameter"))).attach()
    assert set(adapters.stacks) == {"in_proj_weight", "out_proj.weight"}
    assert torch.equal(model(x, x, x)[0], before)
    with torch.no_grad():
        for parameter in adapters.parameters():
            parameter.add_(torch.randn_like(parameter))
    attached = model(x, x, x)[0]
    assert (attached - before).abs().max() > 0.01
    attached.sum().backward()
    assert all(parameter.grad is not None for parameter in adapters.parameters())
    adapters.merge()
    assert (model(x, x, x)[0] - attached).abs().max() < 1e-12
    adapters.detach()
    assert torch.equal(model(x, x, x)[0], before)
    assert type(model) is nn.MultiheadAttention


def test_what_an_algorithm_cannot_serve_may_be_left_out_and_is_listed(model: Model) -> None:
    rules = Rule(OFT(block_size=3))
    odd = nn.ModuleDict({"good": nn.Linear(8, 9), "bad": nn.Linear(8, 8), "worse": nn.Linear(8, 4)})
    with pytest.raises(PlanError, match=r'^bad, .*unserved="skip" leaves such layers out'):
        plan(odd, rules)
    made = plan(odd, rules, unserved="skip")
    assert [each.path for each in made.placements] == ["good"]
    assert [each.path for each in made.unserved] == ["bad", "worse"]
    assert all("block_size" in each.why for each in made.unserved)
    assert made.skipped == ("bad", "worse")
    assert "2 of those cannot be served by what they were to get:\n    bad, " in str(made)
    AdapterSet.build(odd, made).attach()


def test_leaving_out_everything_is_an_error(model: Model) -> None:
    with pytest.raises(PlanError, match="none of 7 layers can be served"):
        plan(model, Rule(OFT(block_size=3)), unserved="skip")
    with pytest.raises(ConfigError, match="unknown value of unserved 'skp'; did you mean 'skip'"):
        plan(model, Rule(LoRA(rank=2)), unserved="skp")  # type: ignore[arg-type]


def test_leaving_out_does_not_hide_waste(model: Model) -> None:
    with pytest.raises(PlanError, match="rank"):
        plan(model, Rule(LoRA(rank=100)), unserved="skip")
