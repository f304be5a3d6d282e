"""An outline is as good as the model to plan on."""

from __future__ import annotations

import json
import re

import pytest
from tools.models import PAGE, made, table
from tools.models import known as known_models
from torch import nn

from cases import LAYERS
from lycoris import ConfigError
from lycoris.layers.geometry import describe
from lycoris.layers.sites import ModelSites
from lycoris.models import outline
from lycoris.models.families import ARCHITECTURES, FAMILIES

MODELS = known_models()


@pytest.mark.parametrize("layer", LAYERS)
def test_every_kind_of_layer_comes_back(layer: str) -> None:
    model = nn.Sequential(LAYERS[layer].layer(), nn.ModuleList(LAYERS[layer].layer() for _ in range(3)))
    told = json.loads(json.dumps(outline.make_outline(model)))
    back = outline.build_model(told)
    assert [(p, type(m).__name__) for p, m in back.named_modules()] == [
        (p, type(m).__name__) for p, m in model.named_modules()
    ]
    assert {n: p.shape for n, p in back.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}
    if LAYERS[layer].make.__name__ != "Conv1D":
        assert [*ModelSites(back).geometries.items()] == [*ModelSites(model).geometries.items()]
    assert all(parameter.is_meta for parameter in back.parameters())


def test_a_range_is_no_name() -> None:
    model = nn.ModuleDict({"2-1": nn.Linear(2, 2), "0": nn.Linear(2, 2), "1": nn.Linear(2, 2)})
    told = outline.make_outline(model)
    assert list(told["children"]) == ["2-1", "0..1"]
    assert [name for name, _ in outline.build_model(told).named_children()] == ["2-1", "0", "1"]


def test_a_shared_module_is_told_once() -> None:
    one = nn.Linear(2, 3)
    back = outline.build_model(outline.make_outline(nn.ModuleList([one, one])))
    assert sum(parameter.numel() for parameter in back.parameters()) == 9


def test_a_tied_parameter_is_one() -> None:
    model = nn.ModuleDict(
        {"tokens": nn.Embedding(5, 3), "between": nn.Linear(3, 3), "head": nn.Linear(3, 5, bias=False)}
    )
    model["head"].weight = model["tokens"].weight
    back = outline.build_model(json.loads(json.dumps(outline.make_outline(model))))
    assert back.head.weight is back.tokens.weight
    assert sum(p.numel() for p in back.parameters()) == sum(p.numel() for p in model.parameters())


@pytest.mark.sample(7)
@pytest.mark.parametrize("name", outline.list_models())
def test_places_are_the_sites(name: str) -> None:
    assert [*outline.iterate_layers(outline.load_outline(name))] == [
        (s.path, s.geometry) for s in ModelSites(outline.load_model(name)).values()
    ]


# Chroma's class uses one that diffusers means to remove, and warns of it.
@pytest.mark.sample(6)
@pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated:FutureWarning")
@pytest.mark.parametrize("name", MODELS)
def test_known_models_are_those_of_the_library(name: str) -> None:
    """What `make models` would write now, and a model that is built from it."""
    pytest.importorskip("diffusers")
    transformers = pytest.importorskip("transformers")
    architecture, config = MODELS[name]
    if architecture.classes[0].startswith("CLIP") and int(transformers.__version__.split(".")[0]) < 5:
        pytest.skip("transformers before 5 has another level in the class")
    model, known = made(architecture, config), outline.load_model(name)
    assert outline.load_outline(name) == json.loads(json.dumps(outline.make_outline(model)))
    assert {n: p.shape for n, p in known.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}
    assert {p: (type(m).__name__, describe(m)) for p, m in known.named_modules()} == {
        p: (type(m).__name__, describe(m)) for p, m in model.named_modules()
    }


def test_the_page_has_every_model() -> None:
    rows = re.findall(r"^\| (?!family)\S+ \| (\S+) \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert rows == [name for family in FAMILIES.values() for name in ARCHITECTURES[family.components[""]].models]


@pytest.mark.slow
def test_the_page_of_models_is_what_make_models_writes() -> None:
    assert PAGE.read_text(encoding="utf-8") == table()


def test_an_unknown_name_is_told_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"did you mean 'flux\.1-dev'"):
        outline.load_model("flux.1-dve")
