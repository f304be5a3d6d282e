"""Pictures, plots, and writes that leave no half file."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lycoris.training import base_model, report
from lycoris.training.jsonfile import write_atomically
from lycoris.training.preview import build_sampling
from lycoris.training.run import History
from lycoris.training.sampling import PictureTable, draw_grid, draw_pictures
from lycoris.training.settings import Settings


def test_a_picture_depends_on_its_place_and_seed_and_not_on_the_batch(settings: Callable[..., Settings]) -> None:
    given = settings()
    pipe = base_model.load_base_model(given)
    prompts = ["red ball", "blue ball", "red ball"]
    together = draw_pictures(pipe, prompts, build_sampling(given))
    one_by_one = draw_pictures(pipe, prompts, dataclasses.replace(build_sampling(given), batch_size=1))
    assert together.shape == (3, 32, 32, 3)
    np.testing.assert_allclose(together, one_by_one, atol=1e-4)
    assert not np.allclose(together[0], together[2], atol=1e-3)


def test_a_grid_holds_every_block_and_row() -> None:
    row = np.zeros((2, 32, 32, 3), np.float32)
    block = PictureTable(
        "a title", ["short", "a prompt that is much too long for one line"], [("one", row), ("two", row)]
    )
    single, double = draw_grid([block]), draw_grid([block, block])
    assert double.size == (single.width, 2 * single.height)
    assert np.asarray(single).min() == 0


def test_smoothing_keeps_the_length() -> None:
    assert report.smooth_losses([2.0, 4.0, 6.0], window=2) == [2.0, 3.0, 5.0]


def test_the_plot_is_a_picture_with_or_without_held_out_losses(tmp_path: Path) -> None:
    for history in (History([1.0, 0.5]), History([1.0, 0.5], {0: 1.0, 2: 0.6})):
        report.draw_plot(history, tmp_path / "loss.png")
        with Image.open(tmp_path / "loss.png") as picture:
            assert picture.format == "PNG"


def test_a_failed_write_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    path.write_text("old")

    def half(temporary: Path) -> None:
        temporary.write_text("ne")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, half)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
