"""Images and captions: folders, sheets, what cannot be used, and the held-out split."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lycoris.errors import ConfigError
from lycoris.training import data


def test_a_folder_is_read_in_order_of_names(images: Path) -> None:
    found = data.read_examples(images)
    assert [example.name for example in found.usable] == sorted(path.name for path in images.glob("*.png"))
    assert found.usable[0].caption == "black ball"
    assert found.problems == []


def test_missing_captions_and_broken_images_are_named_and_counted(images: Path) -> None:
    (images / "red.txt").unlink()
    whole = (images / "blue.png").read_bytes()
    (images / "blue.png").write_bytes(whole[: len(whole) // 2])
    (images / "green.png").write_text("no image")
    with pytest.raises(ConfigError) as caught:
        data.read_examples(images)
    for word in ("3 of 6", "red.png: no caption", "blue.png: not a readable", "green.png", "skip_unreadable_images"):
        assert word in str(caught.value)


def test_the_rest_is_used_when_asked_for(images: Path) -> None:
    (images / "red.txt").unlink()
    found = data.read_examples(images, skip_unreadable=True)
    assert len(found.usable) == 5
    assert found.problems == ["red.png: no caption, expected red.txt"]


def test_no_captions_at_all_is_an_error_even_when_skipping(images: Path) -> None:
    for caption in images.glob("*.txt"):
        caption.unlink()
    with pytest.raises(ConfigError, match="6 of 6 images cannot be used; none is left"):
        data.read_examples(images, skip_unreadable=True)


def test_an_empty_folder_and_a_missing_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no images"):
        data.read_examples(tmp_path)
    with pytest.raises(ConfigError, match="neither a folder"):
        data.read_examples(tmp_path / "nowhere")


def test_pixels_are_cropped_resized_and_on_white(tmp_path: Path) -> None:
    image = Image.new("RGBA", (40, 20), (0, 0, 0, 0))
    image.paste((255, 0, 0, 255), (20, 0, 40, 20))
    image.save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("half")
    x = data.load_pixels(data.read_examples(tmp_path).usable[0], 16)
    assert x.shape == (3, 16, 16)
    torch.testing.assert_close(x[:, 8, 2], torch.ones(3))
    torch.testing.assert_close(x[:, 8, 13], torch.tensor([1.0, -1.0, -1.0]))


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    image = Image.new("RGB", (16, 16), "white")
    image.paste((0, 0, 0), (0, 0, 16, 8))
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    image.save(tmp_path / "a.png", exif=exif)
    (tmp_path / "a.txt").write_text("lower half black")
    x = data.load_pixels(data.read_examples(tmp_path).usable[0], 16)
    assert x[0, 2, 8] > 0 > x[0, 13, 8]


def sheet(folder: Path, **changes: Any) -> Path:
    grid = Image.new("RGB", (16, 16), "white")
    grid.paste((0, 0, 0), (8, 0, 16, 8))
    grid.save(folder / "s.png")
    values = {"image": "s.png", "pixels": 8, "columns": 2, "items": [{"caption": word} for word in ("a", "b", "c")]}
    (folder / "s.json").write_text(json.dumps({**values, **changes}))
    return folder / "s.json"


def test_a_sheet_is_cut_into_tiles(tmp_path: Path) -> None:
    found = data.read_examples(sheet(tmp_path)).usable
    assert [example.caption for example in found] == ["a", "b", "c"]
    assert [data.load_pixels(example, 8).mean().item() for example in found] == [1, -1, 1]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"image": "../s.png"}, "must be the name of a file in the folder of the sheet"),
        ({"image": "/etc/passwd"}, "must be the name of a file in the folder of the sheet"),
        ({"image": "other.png"}, "other.png is not a readable image"),
        ({"columns": 3}, "8 pixels in 3 columns"),
        ({"items": [{"name": "x"}]}, "is not a sheet"),
    ],
)
def test_a_bad_sheet_is_refused(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        data.read_examples(sheet(tmp_path, **changes))


def test_the_split_depends_on_the_seed_alone_and_respects_prompts(images: Path) -> None:
    found = data.read_examples(images).usable

    def held(seed: int) -> list[str]:
        training, held_out = data.split_examples(found, count=2, seed=seed, inside=["red ball"], outside=["blue ball"])
        assert len(training) == 3
        assert "red ball" in {example.caption for example in training}
        return [example.caption for example in held_out]

    assert held(1) == held(1)
    assert all("blue ball" in held(seed) for seed in range(5))
    assert len({tuple(held(seed)) for seed in range(8)}) > 1


def test_holding_out_too_many_is_an_error(images: Path) -> None:
    found = data.read_examples(images).usable
    with pytest.raises(ConfigError, match="num_eval_images = 7, but only 6"):
        data.split_examples(found, count=7, seed=0)
    with pytest.raises(ConfigError, match="all 6 images are held out"):
        data.split_examples(found, count=6, seed=0)


def test_an_empty_caption_is_a_missing_one(images: Path) -> None:
    (images / "red.txt").write_text(" \n")
    assert data.read_examples(images, skip_unreadable=True).problems == ["red.png: its caption red.txt is empty"]
    with pytest.raises(ConfigError, match=r"red\.png: its caption red\.txt is empty"):
        data.read_examples(images)


def test_an_empty_caption_of_a_tile_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"s\.png\[1\]: its caption is empty"):
        data.read_examples(sheet(tmp_path, items=[{"caption": "a"}, {"caption": " "}]))


def test_files_that_are_no_part_of_it_are_counted_and_the_first_named(images: Path) -> None:
    assert data.read_examples(images).unused is None
    (images / "alone.txt").write_text("a caption without an image")
    (images / "film.gif").write_text("")
    (images / "more").mkdir()
    (images / "more" / "deep.png").write_text("")
    (images / "more" / "deep.txt").write_text("")
    (images / ".DS_Store").write_text("")
    unused = data.read_examples(images).unused
    assert unused is not None
    assert unused.startswith("3 files in ")
    assert unused.endswith(": alone.txt, film.gif, more/deep.png")
    (images / "other.gif").write_text("")
    assert str(data.read_examples(images).unused).endswith("more/deep.png, ...")


def test_images_in_subfolders_are_named_when_there_are_no_others(tmp_path: Path) -> None:
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "a.png").write_text("")
    with pytest.raises(ConfigError, match=r"holds no images; .*1 file in .* not used .*: more/a\.png"):
        data.read_examples(tmp_path)


def test_sixteen_bits_are_scaled_and_not_clipped(tmp_path: Path) -> None:
    ramp = np.linspace(0, 65535, 16 * 16).reshape(16, 16).astype(np.uint16)
    Image.fromarray(ramp).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("a ramp")
    x = data.load_pixels(data.read_examples(tmp_path).usable[0], 16)
    expected = torch.from_numpy(ramp.astype(np.float32)) / 65535 * 2 - 1
    torch.testing.assert_close(x[0], expected, atol=1 / 127, rtol=0)


@pytest.mark.parametrize("kind", [np.int32, np.float32])
def test_gray_levels_without_a_range_are_refused(tmp_path: Path, kind: type) -> None:
    Image.fromarray(np.zeros((8, 8), kind)).save(tmp_path / "a.png", format="TIFF")
    (tmp_path / "a.txt").write_text("what is white?")
    with pytest.raises(ConfigError, match=r"a\.png: not a readable image \(mode [IF], 32 bits"):
        data.read_examples(tmp_path)


def test_a_bomb_is_an_unreadable_image(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ConfigError, match=r"6 of 6 images(.|\n)*red\.png: not a readable image \(Image size"):
        data.read_examples(images)
    with pytest.raises(ConfigError, match=r"s\.png is not a readable image"):
        data.read_examples(sheet(tmp_path))


def test_a_mark_is_no_part_of_a_caption(images: Path) -> None:
    for caption in images.glob("*.txt"):
        caption.write_bytes(b"\xef\xbb\xbf" + caption.read_bytes())
    assert data.read_examples(images).usable[0].caption == "black ball"
    (images / "red.txt").write_bytes("red ball".encode("utf-16"))
    assert "is encoded as UTF-16" in data.read_examples(images, skip_unreadable=True).problems[0]
