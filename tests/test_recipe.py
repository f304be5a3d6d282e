"""`lycoris_config.json`: read strictly, every option honoured, refused or remarked upon."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lycoris import ConfigError, DoRA, LoKr, LoRA, PlanError, RankSchedule, TLoRA
from lycoris.algorithms.base import Algorithm
from lycoris.targeting.options import ALGORITHMS, OPTIONS
from lycoris.targeting.preset import PRESETS_WITH_CONV
from lycoris.targeting.recipe import Recipe, schedule_of

BUILT = [name for name, _ in ALGORITHMS]


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k = nn.Linear(8, 8), nn.Linear(8, 8)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.proj = nn.Conv2d(4, 8, 3), nn.Conv2d(8, 8, 1)
        self.attn, self.norm, self.head = Attention(), nn.LayerNorm(8), nn.Linear(8, 4)


def planned(**config: Any) -> dict[str, Algorithm]:
    return {placement.path: placement.algorithms[0] for placement in Recipe.parse(config).plan(Model()).placements}


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"algo": "lokar"}, r"unknown algorithm 'lokar'; did you mean 'lokr'\?.*loha"),
        ({"algo": "dylora", "linear_dim": 6, "block_size": 4}, r"must divide the rank 6.*nearest that does is 3"),
        ({"algo": "lora", "mask_group_id": 2}, r"mask_group_id = 2 is not built yet"),
        ({"algo": "lora", "linear_dims": 4}, r"unknown option 'linear_dims'; did you mean 'linear_dim'"),
        ({"algo": "lokr", "fulll_matrix": True}, r"did you mean 'full_matrix'"),
        ({"linear_dim": "many"}, r"linear_dim must be a whole number, not 'many'"),
        ({"linear_dim": 4.5}, r"linear_dim must be a whole number, not 4\.5"),
        ({"linear_dim": True}, r"linear_dim must be a whole number, not True"),
        ({"linear_dim": -3}, r"rank must be at least 1, not linear_dim = -3"),
        ({"linear_alpha": []}, r"linear_alpha must be a number"),
        ({"linear_alpha": "nan"}, r"alpha of lora must be finite"),
        ({"multiplier": "strong"}, r"multiplier must be a number"),
        ({"algo": "lokr", "factor": 0}, r"factor of lokr"),
        ({"algo": "lokr", "full_matrix": "perhaps"}, r"full_matrix must be true or false, not 'perhaps'"),
        ({"algo": "lokr", "full_matrix": True, "decompose_both": True}, r"both full_matrix and decompose_both"),
        ({"algo": "tlora", "sig_type": "first"}, r"vectors of tlora must be principal"),
        ({"dropout": 1.0}, r"dropout of lora is a probability of at least 0 and below 1, not 1\.0"),
        ({"preset": "attn"}, r"unknown preset 'attn'; did you mean 'attn-"),
        ({"apply_preset": ["Attention"]}, r"a preset must be an object.*\['Attention'\]"),
        ({"apply_preset": {"target_modul": []}}, r"unknown preset key 'target_modul'; did you mean 'target_module'"),
        ({"apply_preset": {"target_module": "Attention"}}, r"'target_module' must be a list of names"),
        ({"apply_preset": {"target_name": ["*.to_q"]}}, r"'\*\.to_q' is not a regular expression.*use_fnmatch"),
        ({"apply_preset": {"enable_conv": "no"}}, r"'enable_conv' must be true or false"),
        ({"apply_preset": {"lora_prefix": "a.b"}}, r"'lora_prefix' must be a word without dots"),
        ({"apply_preset": {"module_algo_map": {"Attention": 4}}}, r"'module_algo_map' must map names to objects"),
        (
            {"apply_preset": {"module_algo_map": {"Attention": {"factr": 4}}}},
            r"unknown option 'factr'; did you mean 'factor'.* in module_algo_map\['Attention'\]",
        ),
        ({"apply_preset": {"name_algo_map": {"x": {"algo": "lorra"}}}}, r"unknown algorithm 'lorra'"),
    ],
)
def test_strict_errors_name_key_value_and_the_nearest(config: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Recipe.parse(config).plan(Model())


def test_loosely_unknown_options_become_remarks() -> None:
    recipe = Recipe.parse({"linear_dims": 4, "factor": 8, "module_dropout": None}, strict=False)
    assert len(recipe.remarks) == 2
    assert "'linear_dims'; did you mean 'linear_dim'" in recipe.remarks[0]
    assert recipe.remarks[1] == "lora has no factor; it is for lokr"


@pytest.mark.parametrize("algo", BUILT)
@pytest.mark.parametrize("option", OPTIONS)
def test_every_known_option_is_honoured_refused_or_remarked(algo: str, option: str) -> None:
    """Switched on, an option changes what layers get, changes the schedule, is remarked upon, or raises."""
    values = {bool: True, int: 2, float: 0.5, str: "last"}
    if option in ("bypass_mode", "wd_on_output", "wd_on_out", "use_data_init"):
        return  # nothing to see when switched on by itself: one has no effect at all, the others are on already
    on = {"algo": algo, "linear_dim": 4, option: values[OPTIONS[option].kind]}
    model = Model()
    if not OPTIONS[option].built:
        with pytest.raises(ConfigError, match=f"{option} = .* is not built yet"):
            Recipe.parse(on)
        return
    recipe = Recipe.parse(on)
    plain = Recipe.parse({"algo": algo, "linear_dim": 4})
    changed = recipe.plan(model).placements != plain.plan(model).placements or recipe.schedule != plain.schedule
    assert changed or any(f"no {option}" in remark or f"{option} has no effect" in remark for remark in recipe.remarks)


def test_options_that_need_others() -> None:
    assert planned(algo="lora", dora_wd=True, wd_on_output=False)["head"].axis == "in"
    assert planned(algo="lora", dora_wd=True, wd_on_out=False)["head"].axis == "in"
    assert planned(algo="lora", dora_wd=True)["head"] == DoRA(inner=LoRA(rank=4, alpha=1.0))
    assert planned(algo="tlora", use_data_init=False)["head"] == TLoRA(rank=4, alpha=1.0, data_init=False)


@pytest.mark.parametrize(
    ("config", "rank", "alpha"),
    [
        ({}, 4, 1.0),
        ({"linear_dim": 16, "linear_alpha": 2}, 16, 2.0),
        ({"linear_dim": "16", "linear_alpha": "2.5"}, 16, 2.5),
        ({"linear_dim": None, "linear_alpha": None}, 4, None),
        ({"linear_dim": 8, "linear_alpha": 0}, 8, None),
    ],
)
def test_sizes(config: dict[str, Any], rank: int, alpha: float | None) -> None:
    assert planned(**config)["head"] == LoRA(rank=rank, alpha=alpha)


def test_sizes_of_convolutions_fall_back_on_linear_ones_and_1x1_are_linear() -> None:
    assert planned(linear_dim=8, linear_alpha=2)["conv"] == LoRA(rank=8, alpha=2.0)
    own = planned(linear_dim=8, linear_alpha=2, conv_dim=3, conv_alpha=1)
    assert own["conv"] == LoRA(rank=3, alpha=1.0)
    assert own["proj"] == own["head"] == LoRA(rank=8, alpha=2.0)


def test_maps_override_by_class_and_by_name_innermost_first() -> None:
    preset = {
        "target_module": ["Model"],
        "module_algo_map": {"Attention": {"factor": 2, "dim": 3}, "Model": {"factor": 8}},
        "name_algo_map": {"attn.to_k": {"algo": "lora", "alpha": 6}},
    }
    made = planned(algo="lokr", linear_dim=2, linear_alpha=2, factor=4, apply_preset=preset)
    assert made["attn.to_q"] == LoKr(rank=3, alpha=2.0, factor=2)
    assert made["attn.to_k"] == LoRA(rank=2, alpha=6.0)
    assert made["head"] == LoKr(rank=2, alpha=2.0, factor=8)


@pytest.mark.parametrize("name", PRESETS_WITH_CONV)
def test_built_in_presets_say_whether_convolutions_are_meant(name: str) -> None:
    assert ("conv" in planned(preset=name)) == PRESETS_WITH_CONV[name]
    assert "conv" not in planned(preset=name, apply_preset={"enable_conv": False})
    assert "proj" in planned(preset=name)


def test_zero_matches_name_the_classes_of_the_model() -> None:
    with pytest.raises(PlanError, match=r"Atention\. Did you mean Attention\? Classes.*: Attention, Conv2d, Linear"):
        planned(apply_preset={"target_module": ["Atention"]})
    with pytest.raises(PlanError, match=r"no layer of Embedding.*\(none\)"):
        Recipe.parse({}).plan(nn.Embedding(2, 2))


def test_targets_without_layers_are_remarked_upon() -> None:
    preset = {"target_module": ["Attention", "FeedForward"], "exclude_name": ["attn.to_v"]}
    remarks = Recipe.parse({"apply_preset": preset}).plan(Model()).remarks
    text = "matches no layer of Model that adapters can serve"
    assert remarks == (f"'FeedForward' {text}", f"'attn.to_v' {text}")
    assert {remark.kind for remark in remarks} == {"unmatched"}


def test_a_target_that_exists_without_a_layer_to_serve_is_remarked_upon() -> None:
    """The embedding and the block around it are there; adapters cannot serve them."""
    model = Model()
    model.words = nn.Sequential(nn.Embedding(2, 2))
    preset = {
        "target_module": ["Attention", "Sequential", "Embedding"],
        "target_name": ["words.0", "attn"],
        "exclude_name": ["words", "attn.to_q"],
    }
    remarks = Recipe.parse({"apply_preset": preset}).plan(model).remarks
    assert [remark.split("'")[1] for remark in remarks] == ["Sequential", "Embedding", "words.0", "words"]


def test_a_target_of_convolutions_only_is_remarked_upon_when_they_are_off() -> None:
    preset = {"target_module": ["Conv2d", "Attention"], "target_name": ["conv"], "enable_conv": False}
    remarks = Recipe.parse({"apply_preset": preset}).plan(Model()).remarks
    assert [remark.split("'")[1] for remark in remarks] == ["conv"]
    assert remarks[0].endswith("(convolutions with a real kernel are off)")


@pytest.mark.parametrize(
    "config",
    [
        {"linear_dim": 0},
        {"linear_dim": "0"},
        {"linear_dim": False},
        {"apply_preset": {"module_algo_map": {"Attention": {"dim": 0}}}},
        {"apply_preset": {"name_algo_map": {"head": {"linear_dim": 0}}}},
    ],
)
def test_rank_zero_is_refused(config: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"rank must be at least 1, not (linear_)?dim = "):
        Recipe.parse(config)


def test_no_rank_for_convolutions_means_the_linear_one() -> None:
    for none in (0, None):
        assert planned(linear_dim=8, conv_dim=none)["conv"].rank == 8
        preset = {"module_algo_map": {"Model": {"conv_dim": none, "dim": None}}}
        assert planned(linear_dim=8, apply_preset=preset)["conv"].rank == 8


def remarked(**config: Any) -> str:
    return "; ".join(Recipe.parse(config).remarks)


def test_what_has_no_effect_is_remarked_upon() -> None:
    keys = {"unet_target_module": ["A"], "text_encoder_target_name": ["b"], "unet_target_name": []}
    assert "unet_target_module has no effect here" in remarked(apply_preset=keys)
    assert "text_encoder_target_name has no effect here" in remarked(apply_preset=keys)
    assert "unet_target_name" not in remarked(apply_preset=keys)
    assert "'attn-only' only says that convolutions with a real kernel do not get" in remarked(preset="attn-only")
    assert "bypass_mode has no effect: every path here is exact" in remarked(bypass_mode=True)
    assert remarked(bypass_mode=False) == ""
    assert "wd_on_output has no effect without dora_wd" in remarked(wd_on_output=False)
    assert remarked(wd_on_output=False, dora_wd=True) == ""
    inner = {"module_algo_map": {"Attention": {"dora_wd": True}}}
    assert remarked(wd_on_output=False, apply_preset=inner) == ""
    assert "linear_dim has no effect on full" in remarked(algo="full", linear_dim=4)
    assert remarked(algo="full", linear_dim=4, apply_preset={"module_algo_map": {"Attention": {"algo": "lora"}}}) == ""


def test_the_schedule_of_tlora() -> None:
    config = {"algo": "tlora", "linear_dim": 64, "tlora_min_rank": 4, "tlora_alpha": 2.0}
    assert Recipe.parse(config).schedule == RankSchedule(max_rank=64, min_rank=4, alpha=2.0)
    assert Recipe.parse({"algo": "lora"}).schedule is None
    with pytest.raises(ConfigError, match="min rank"):
        _ = Recipe.parse(config | {"tlora_min_rank": 65}).schedule


def mapped(**overrides: dict[str, Any]) -> dict[str, Any]:
    return {"apply_preset": {"module_algo_map": overrides}}


def test_the_schedule_of_a_recipe_in_which_some_layers_are_tlora() -> None:
    inner = {"algo": "tlora", "tlora_min_rank": 2}
    assert Recipe.parse(mapped(Linear=inner)).schedule == RankSchedule(max_rank=4, min_rank=2)
    assert Recipe.parse(mapped(Linear=inner) | {"tlora_alpha": 2}).schedule == RankSchedule(
        max_rank=4, min_rank=2, alpha=2.0
    )
    assert Recipe.parse(mapped(Linear=inner | {"dim": 9}) | {"linear_dim": 64}).schedule.max_rank == 9
    larger = mapped(Linear={"dim": 9}) | {"algo": "tlora"}
    assert Recipe.parse(larger).schedule.max_rank == 9
    assert Recipe.parse({"algo": "tlora", "conv_dim": 16}).schedule.max_rank == 16
    assert (
        Recipe.parse({"algo": "tlora", "conv_dim": 16, "apply_preset": {"enable_conv": False}}).schedule.max_rank == 4
    )
    assert Recipe.parse(mapped(Linear={"algo": "loha"})).schedule is None
    with pytest.raises(ConfigError, match=r"tlora_min_rank is 2 in module_algo_map\['Linear'\] and 3 elsewhere"):
        Recipe.parse(mapped(Linear=inner) | {"tlora_min_rank": 3})
    with pytest.raises(ConfigError, match="one schedule"):
        Recipe.parse(mapped(Linear=inner, Attention=inner | {"tlora_min_rank": 1}))


@pytest.mark.parametrize(
    "config",
    [
        {"algo": "tlora", "linear_dim": 64, "tlora_alpha": 2.0, "dropout": 0.1, "no_such": 1, "preset": "?"},
        mapped(Linear={"algo": "TLoRA", "tlora_min_rank": 2, "no": 1}, Conv={"algo": "boft"}) | {"algo": "nothing"},
        {"algo": "tlora", "apply_preset": {"name_algo_map": {"*": {"dim": 16}, "x": 3}, "what": 1}},
    ],
)
def test_a_header_gives_the_schedule_whatever_else_it_says(config: dict[str, Any]) -> None:
    found = schedule_of({"lycoris_config": json.dumps(config)})
    assert found is not None
    assert (found.max_rank, found.min_rank, found.alpha) in [(64, 1, 2.0), (4, 2, 1.0), (16, 1, 1.0)]


@pytest.mark.parametrize("text", ["{}", "[1]", '{"algo": "lora"}', '{"apply_preset": []}', "not json"])
def test_a_header_without_a_schedule(text: str) -> None:
    assert schedule_of({"lycoris_config": text}) is None
    assert schedule_of({}) is None


@pytest.mark.parametrize("algo", BUILT)
def test_the_config_comes_back_as_it_was_given(algo: str) -> None:
    given = {"algo": algo, "multiplier": 1.0, "linear_dim": 2, "apply_preset": {"target_module": ["Attention"]}}
    assert Recipe.parse(given).as_dict() == given


KEYS = st.sampled_from(
    [*OPTIONS, "algo", "linear_dim", "linear_alpha", "conv_dim", "multiplier", "preset", "apply_preset"]
)
VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 9),
    st.floats(allow_nan=True),
    st.sampled_from(["", "on", "0.5", "nan", "lora", "full-lin"]),
    st.lists(st.integers(), max_size=2),
    st.dictionaries(st.sampled_from(["x", "target_name", "enable_conv"]), st.none(), max_size=1),
)


@given(config=st.dictionaries(KEYS, VALUES, max_size=4))
def test_any_json_is_read_or_refused_with_a_lesson(config: dict[str, Any]) -> None:
    with torch.device("meta"):
        model = Model()
    # Any other exception fails the test.
    with contextlib.suppress(ConfigError, PlanError):
        assert Recipe.parse(config).plan(model).placements


class FluxAttention(Attention):
    pass


class Renamed(nn.Module):
    """Attention under another name, and a little of what the targets do mean."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(FluxAttention() for _ in range(4))
        self.ff = nn.ModuleDict({"FeedForward": nn.Linear(8, 8)})
        self.plain = FeedForward()


class FeedForward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(8, 8)


def targets(*names: str) -> dict[str, Any]:
    return {"algo": "lora", "apply_preset": {"target_module": [*names]}}


def test_a_target_that_was_renamed_is_named_and_few_layers_are_warned_about() -> None:
    made = Recipe.parse(targets("Attention", "FeedForward")).plan(Renamed())
    assert [each.path for each in made.placements] == ["plain.net"]
    told = [each for each in made.remarks if each.kind == "unmatched"]
    assert told[0].startswith("'Attention' matches no layer of Renamed")
    assert told[0].endswith("did you mean 'FluxAttention'?")
    assert "reach 1 of 10 layers" in told[1]
    assert "FluxAttention (8)" in told[1]
    assert len(told) == 2


def test_targets_may_have_wildcards_and_mean_what_they_meant_without() -> None:
    made = Recipe.parse(targets("*Attention", "FeedForward")).plan(Renamed())
    assert len(made.placements) == 9
    assert not made.remarks
    with pytest.raises(PlanError, match="Did you mean FluxAttention"):
        Recipe.parse(targets("Attention")).plan(Renamed())


def test_a_class_by_its_own_name_comes_before_a_wildcard() -> None:
    maps = {"*Attention": {"dim": 1}, "FluxAttention": {"dim": 2}}
    made = Recipe.parse({"apply_preset": {"target_module": [], "module_algo_map": maps}}).plan(Renamed())
    assert {each.algorithms[0].rank for each in made.placements} == {2}


def test_narrow_lists_of_paths_are_not_warned_about() -> None:
    preset = {"target_module": ["FeedForward"], "target_name": [r"blocks\.0\."]}
    assert not Recipe.parse({"apply_preset": preset}).plan(Renamed()).remarks


def test_a_config_may_leave_out_what_cannot_be_served() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 7))
    given = {"algo": "diag-oft", "linear_dim": 4}
    with pytest.raises(PlanError, match=r"^1, "):
        Recipe.parse(given).plan(model)
    made = Recipe.parse({**given, "unserved": "skip"}).plan(model)
    assert [each.path for each in made.unserved] == ["1"]
    with pytest.raises(ConfigError, match="did you mean 'skip'"):
        Recipe.parse({**given, "unserved": "skp"})
