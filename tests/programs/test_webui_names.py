"""Names of tensors for which WebUI is said to reject a whole file."""

from __future__ import annotations

import pytest

from lycoris.files.programs.webui import explain_rejection

LAYER = "lora_unet_down_blocks_0_attentions_0_proj_in.alpha"


@pytest.mark.parametrize(
    "names",
    [
        {"bundle_emb.word.string_to_param.*"},
        {"bundle_emb.word.clip_l", "bundle_emb.word.clip_g"},
        {"bundle_emb.one.vector", "bundle_emb.other.vector"},
    ],
)
def test_embeddings_that_it_knows(names: set[str]) -> None:
    assert explain_rejection({LAYER, *names}, None) == ""


@pytest.mark.parametrize(
    ("names", "why"),
    [
        ({"bundle_emb.word"}, "knows embeddings of a word by two names, and rejects the file for bundle_emb.word"),
        ({"bundle_emb.word.clip_l", "bundle_emb.word.t5"}, "knows no embedding of clip_l, t5, and rejects the file"),
    ],
)
def test_embeddings_that_it_does_not_know(names: set[str], why: str) -> None:
    assert why in explain_rejection({LAYER, *names}, None)


def test_names_of_one_dot_in_a_file_for_sd3() -> None:
    assert LAYER in explain_rejection({LAYER}, "sd3")
    assert explain_rejection({LAYER}, "sdxl-unet") == ""
