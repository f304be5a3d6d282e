"""Skeletons of known models, and whose a set of layers may be."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from test_families import KNOWN, spelt

from lycoris import ConfigError, PlanError
from lycoris.files.recognition import guess_models, score_fit
from lycoris.files.skeleton import IDENTITY_NAMING, Skeleton, load_skeleton, name_layers, translate_layers
from lycoris.layers.geometry import Geometry
from lycoris.models.families import ARCHITECTURES


def linear(rows: int, columns: int) -> Geometry:
    return Geometry(kind="linear", shape=(rows, columns))


def tops(layers: Skeleton) -> list[tuple[str, str, str | None]]:
    """All guesses with the best score."""
    found = guess_models(layers)
    return [
        (each.architecture.name, each.naming, each.outline) for each in found if score_fit(each) == score_fit(found[0])
    ]


class TestSkeletons:
    def test_are_read_only_and_made_once(self) -> None:
        assert load_skeleton("clip-l") is load_skeleton("clip-l")
        with pytest.raises(TypeError):
            load_skeleton("clip-l")["encoder"] = linear(1, 1)  # type: ignore[index]

    def test_an_unknown_one_is_told_the_nearest(self) -> None:
        with pytest.raises(ConfigError, match=r"did you mean 'clip-l'"):
            load_skeleton("clip-1")

    def test_in_the_middle_naming_every_name_is_its_own(self) -> None:
        layers = load_skeleton("clip-l")
        assert {name: span.parts for name, span in name_layers(layers, IDENTITY_NAMING).items()} == {
            path: (path,) for path in layers
        }
        assert translate_layers(layers, IDENTITY_NAMING) == layers

    def test_a_module_that_cannot_be_parted_is_refused(self) -> None:
        flux = ARCHITECTURES["flux1"].namings["original"]
        with pytest.raises(PlanError, match=r"double_blocks\.0\.img_attn\.qkv is linear \(10, 3\).* 3 \+ 3 \+ 3"):
            translate_layers({"double_blocks.0.img_attn.qkv": linear(10, 3)}, flux)
        with pytest.raises(PlanError, match=r"linear1"):
            translate_layers({"single_blocks.0.linear1": linear(9, 3)}, flux)

    def test_grouped_queries_are_parted_by_their_heads(self) -> None:
        lumina = ARCHITECTURES["lumina2"].namings["original"]
        parts = translate_layers({"layers.0.attention.qkv": linear(2304 + 2 * 768, 2304)}, lumina)
        assert [each.out_features for each in parts.values()] == [2304, 768, 768]
        assert [path.rsplit(".", 1)[-1] for path in parts] == ["to_q", "to_k", "to_v"]


class TestGuesses:
    @pytest.mark.sample(40)
    @pytest.mark.parametrize(("architecture", "naming", "model"), KNOWN)
    def test_a_whole_model(self, architecture, naming, model) -> None:
        layers = spelt(architecture, naming, model)
        found = guess_models(layers)
        assert score_fit(found[0]) == 2 * len(layers)
        assert (architecture, naming, model) in tops(layers)

    @pytest.mark.parametrize(("architecture", "naming", "model"), KNOWN)
    def test_a_few_layers(self, architecture, naming, model) -> None:
        layers = spelt(architecture, naming, model)
        some = random.Random(model + naming).sample(sorted(layers), 12)
        assert (architecture, naming, model) in tops({name: layers[name] for name in some})

    @pytest.mark.parametrize(
        ("model", "naming", "others"),
        [
            ("sdxl", "sgm", []),
            ("sd-1.5", "diffusers", []),
            ("flux.2-klein-4b", "original", []),
            ("hunyuanvideo", "original", []),
            ("hunyuanvideo", "comfyui", [("framepack", "comfyui", "framepack-i2v")]),
            ("flux.1-schnell", "original", [("flux1", "original", "flux.1-dev")]),
            ("clip-l", "text_model", [("clip-with-projection", "diffusers", "clip-l-projection")]),
            ("gemma2-2b", "headless", []),
        ],
    )
    def test_ties_are_told(self, model: str, naming: str, others: list) -> None:
        architecture = next(each.name for each in ARCHITECTURES.values() if model in each.outlines)
        assert set(tops(spelt(architecture, naming, model))) == {(architecture, naming, model), *others}

    def test_blocks_of_flux_are_also_some_of_hunyuan_video(self) -> None:
        layers = {path: g for path, g in load_skeleton("flux.1-dev").items() if "transformer_blocks" in path}
        assert [each[2] for each in tops(layers)] == ["flux.1-dev", "flux.1-schnell", "hunyuanvideo", "framepack-i2v"]
        assert [each.share for each in guess_models(layers)[:4]] == [1, 1, 0.95, 0.95]

    def test_a_model_of_another_size_has_no_outline(self) -> None:
        layers = {f"model.layers.{n}.self_attn.{p}_proj": linear(8192, 8192) for n in range(80) for p in "qo"}
        best = guess_models(layers)[0]
        assert (best.architecture.name, best.naming, best.outline, score_fit(best)) == (
            "language-model",
            "diffusers",
            None,
            len(layers),
        )

    @pytest.mark.parametrize(("path", "shape"), [("conv_in", (320, 9, 3, 3)), ("conv_out", (8, 320, 3, 3))])
    def test_a_layer_of_another_shape_costs_half_of_itself(self, path: str, shape: tuple[int, ...]) -> None:
        layers = dict(load_skeleton("sdxl"))
        layers[path] = replace(layers[path], shape=shape)
        best = guess_models(layers)[0]
        assert (best.outline, score_fit(best)) == ("sdxl", 2 * len(layers) - 1)

    def test_a_shape_counts_as_a_matrix(self) -> None:
        layers = {path: linear(g.out_features, g.fan_in) for path, g in load_skeleton("sd-1.5").items()}
        assert tops(layers) == [("sd1.5-unet", "diffusers", "sd-1.5")]

    def test_names_of_one_naming_do_not_count_for_another(self) -> None:
        found = guess_models(load_skeleton("flux.1-dev"))
        assert "original" not in {each.naming for each in found}

    def test_what_nobody_has_is_nobody_s(self) -> None:
        assert guess_models({"body.0.weird": linear(3, 3)}) == []
        assert guess_models({}) == []
