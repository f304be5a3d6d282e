"""Training for real, on a tiny pipeline of the real classes: from config to report."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from PIL import Image
from rich.console import Console
from safetensors import safe_open

from lycoris import create_lycoris_from_weights
from lycoris.errors import ConfigError, NotFiniteError, PlanError
from lycoris.training import base_model
from lycoris.training.evaluate import _name_table
from lycoris.training.preflight import check_inputs
from lycoris.training.settings import Settings
from lycoris.training.train import train_adapter

Make = Callable[..., Settings]


@pytest.mark.parametrize(
    "lycoris",
    [
        {},
        {"algo": "lokr", "factor": 4, "linear_dim": 10000},
        {"algo": "tlora", "tlora_min_rank": 2},
        pytest.param({"algo": "loha"}, marks=pytest.mark.slow),
        pytest.param({"algo": "full"}, marks=pytest.mark.slow),
        pytest.param({"dora_wd": True}, marks=pytest.mark.slow),
    ],
    ids=lambda lycoris: "-".join(map(str, lycoris.values())) or "lora",
)
def test_a_run_from_config_to_report(settings: Make, console: Console, lycoris: dict[str, object]) -> None:
    given = settings(lycoris, max_train_steps=8, report_to="tensorboard", eval_steps_interval=4, validation_steps=4)
    outcome = train_adapter(given, console)
    folder = given.output_dir
    assert outcome.report is not None
    assert outcome.report.held_out_loss_adapter < outcome.report.held_out_loss_base
    assert outcome.report.merge_difference < 1
    names = {"before_after.png", "loss.png", "report.json", "lycoris_config.json", "pytorch_lora_weights.safetensors"}
    assert {path.name for path in folder.iterdir()} == names | {"logs", "validation"}
    assert list((folder / "logs").glob("events.*"))
    assert [path.name for path in (folder / "validation").iterdir()] == ["step_000004.png"]
    numbers = json.loads((folder / "report.json").read_text())
    assert list(numbers["held_out"]) == ["0", "4", "8"]
    assert len(numbers["losses"]) == 8
    for name in ("before_after.png", "loss.png"):
        with Image.open(folder / name) as picture:
            assert picture.width > 250
    with safe_open(outcome.adapter, "pt") as file:
        recorded = json.loads(file.metadata()["lycoris_config"])
    assert (
        recorded
        == json.loads(given.lycoris_config.read_text())
        == json.loads((folder / "lycoris_config.json").read_text())
    )


def test_the_printed_three_lines_work(settings: Make, console: Console) -> None:
    given = settings()
    outcome = train_adapter(given, console)
    text = console.file.getvalue()
    lines = text[text.index("from lycoris import") :]
    pipe = base_model.load_base_model(given)
    x, t, words = torch.randn(1, 4, 8, 8), torch.tensor([3]), torch.randn(1, 16, 16)
    before = pipe.unet(x, t, words).sample
    exec(lines, {"pipe": pipe})
    assert not torch.equal(before, pipe.unet(x, t, words).sample)
    again = base_model.load_base_model(given)
    network, _ = create_lycoris_from_weights(1.0, str(outcome.adapter), again.unet)
    network.apply_to()
    torch.testing.assert_close(again.unet(x, t, words).sample, pipe.unet(x, t, words).sample)


@pytest.mark.slow
@pytest.mark.parametrize("algo", ["lora", "tlora"])
def test_gradient_checkpointing_trains_the_same(settings: Make, console: Console, algo: str) -> None:
    plain = train_adapter(settings({"algo": algo}, max_train_steps=2), console)
    again = train_adapter(
        settings({"algo": algo}, max_train_steps=2, gradient_checkpointing=True, output_dir="again"), console
    )
    with safe_open(plain.adapter, "pt") as one, safe_open(again.adapter, "pt") as two:
        for key in one.keys():  # noqa: SIM118 - not a mapping
            torch.testing.assert_close(one.get_tensor(key), two.get_tensor(key), rtol=1e-3, atol=1e-5)


def test_skipped_images_are_counted_and_named(settings: Make, console: Console, images: Path) -> None:
    (images / "orange.txt").unlink()
    outcome = train_adapter(settings(skip_unreadable_images=True), console)
    assert outcome.report is not None
    assert outcome.report.images_skipped == 1
    assert "skipped orange.png: no caption" in console.file.getvalue()


def test_cut_captions_are_counted(settings: Make, console: Console, images: Path) -> None:
    (images / "orange.txt").write_text("a ball that is " + "very " * 20 + "orange")
    train_adapter(settings(max_train_steps=1), console)
    assert "1 of 6 captions are longer than the text encoder's 16 tokens" in console.file.getvalue()


def test_errors_come_before_anything_is_written(settings: Make, console: Console, images: Path) -> None:
    nothing = {"apply_preset": {"target_module": ["Atention"]}}
    with pytest.raises(PlanError, match="Attention"):
        train_adapter(settings(nothing), console)
    with pytest.raises(ConfigError, match="algo"):
        train_adapter(settings({"algo": "lorra"}), console)
    (images / "red.txt").unlink()
    with pytest.raises(ConfigError, match=r"red\.png: no caption"):
        train_adapter(settings(), console)
    given = settings(mixed_precision="fp16")
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="fp16"):
            train_adapter(given, console)
    assert not given.output_dir.exists()


def test_nan_stops_training_and_names_the_module(settings: Make, console: Console, base: Path, tmp_path: Path) -> None:
    pipe = base_model.load_base_model(settings())
    broken = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    with torch.no_grad():
        pipe.unet.get_submodule(broken).weight[0, 0] = torch.nan
    with base_model.suppress_library_output():
        pipe.save_pretrained(tmp_path / "broken")
    given = settings(pretrained_model_name_or_path="broken")
    with pytest.raises(NotFiniteError) as caught:
        train_adapter(given, console)
    for word in (broken, "step 1", "remove FeedForward", "learning_rate, which is 0.01", "bf16"):
        assert word in str(caught.value)
    assert not (given.output_dir / "pytorch_lora_weights.safetensors").exists()


def test_a_diverging_run_keeps_its_last_good_checkpoint(settings: Make, console: Console) -> None:
    given = settings(learning_rate=1e20, max_train_steps=50, checkpointing_steps=1)
    with pytest.raises(NotFiniteError):
        train_adapter(given, console)
    folders = sorted(path.name for path in given.output_dir.glob("checkpoint-*"))
    assert folders[0] == "checkpoint-1"
    assert not list(given.output_dir.glob(".*"))


def test_the_report_measures_at_the_multiplier_that_was_trained_with(settings: Make, console: Console) -> None:
    outcome = train_adapter(settings({"multiplier": 2.0}), console)
    assert outcome.report is not None
    numbers = json.loads((outcome.adapter.parent / "report.json").read_text())
    assert outcome.report.held_out_loss_adapter == pytest.approx(numbers["held_out"]["3"], rel=1e-5)
    assert numbers["held_out"]["3"] != pytest.approx(numbers["held_out"]["0"], rel=1e-3)
    assert "create_lycoris_from_weights(2.0, " in console.file.getvalue()


@pytest.mark.sample(1)
@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_pictures_are_drawn_at_the_multiplier(
    settings: Make, console: Console, monkeypatch: pytest.MonkeyPatch, strength: float
) -> None:
    seen: list[str] = []
    sheet = Image.new("RGB", (8, 8))
    for module in ("preview", "report"):
        monkeypatch.setattr(
            f"lycoris.training.{module}.draw_grid",
            lambda blocks: seen.extend(label for label, _ in blocks[0].rows) or sheet,
        )
    train_adapter(settings({"multiplier": 2.0}, validation_steps=2, validation_lycoris_strength=strength), console)
    half, full = f"{strength:g}", f"{2 * strength:g}"
    assert seen[0] == f"strength {full}"
    assert [label.split(", ")[-1] for label in seen[2:5]] == [
        f"strength {half}",
        f"strength {full}",
        f"strength {full}",
    ]


@pytest.mark.sample(1)
@pytest.mark.parametrize("multiplier", [0, 0.0, "inf"])
def test_a_multiplier_that_trains_nothing_is_refused(settings: Make, console: Console, multiplier: object) -> None:
    with pytest.raises(ConfigError, match=r"lycoris_config\.json: multiplier = .* would train nothing"):
        train_adapter(settings({"multiplier": multiplier}), console)


@pytest.mark.parametrize("below", ["", "/deeper/still"])
def test_an_output_dir_that_cannot_be_a_folder_is_refused_first(settings: Make, tmp_path: Path, below: str) -> None:
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(ConfigError, match=r"output_dir = .*taken is a file"):
        check_inputs(settings(output_dir=f"taken{below}", pretrained_model_name_or_path="no base at all"))
    assert (tmp_path / "taken").read_text() == "a file"


@pytest.mark.slow
def test_paths_are_printed_as_they_are(settings: Make, console: Console) -> None:
    outcome = train_adapter(settings(output_dir="a[/bold]:smile:"), console)
    text = console.file.getvalue()
    assert f"saved {outcome.adapter};" in text
    assert f"wrote {outcome.adapter}" in text
    assert ":smile:" in str(outcome.adapter)


def test_errors_in_the_lycoris_config_name_that_file(settings: Make, console: Console) -> None:
    for lycoris in ({"algo": "lorra"}, {"linear_dim": "four"}, {"apply_preset": {"target_module": ["Atention"]}}):
        with pytest.raises((ConfigError, PlanError), match=r"^\S*/lycoris_config\.json: "):
            train_adapter(settings(lycoris), console)


@pytest.mark.parametrize(
    ("prompts", "title"),
    [
        (["red ball"], "Prompts of the fine-tuning set"),
        (["red ball", "a cube"], "Prompts, 1 of 2 from the fine-tuning set"),
        (["a cube"], "Prompts, none of 1 from the fine-tuning set"),
    ],
)
def test_only_prompts_that_were_trained_on_are_called_so(settings: Make, prompts: list[str], title: str) -> None:
    given = settings(validation_prompts=prompts)
    assert _name_table(given.validation_prompts, check_inputs(given).training) == title


@pytest.mark.slow
def test_what_an_interruption_left_is_removed_when_the_run_is_finished(
    settings: Make, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = settings()
    with monkeypatch.context() as patched:
        patched.setattr("lycoris.training.loop.catch_interrupt", lambda: nullcontext(lambda: True))
        stopped = train_adapter(given, console)
    assert stopped.checkpoint is not None
    assert stopped.checkpoint.is_dir()
    finished = train_adapter(given.model_copy(update={"resume_from_checkpoint": "latest"}), console)
    assert finished.report is not None
    assert not list(given.output_dir.glob("checkpoint-*"))
    train_adapter(given, console, overwrite=True)


@pytest.mark.slow
def test_checkpoints_that_were_asked_for_are_kept(settings: Make, console: Console) -> None:
    given = settings(checkpointing_steps=2)
    train_adapter(given, console)
    train_adapter(given.model_copy(update={"checkpointing_steps": 0, "resume_from_checkpoint": "latest"}), console)
    assert [path.name for path in given.output_dir.glob("checkpoint-*")] == ["checkpoint-2"]


def test_files_that_are_not_used_are_said(settings: Make, console: Console, images: Path) -> None:
    (images / "notes.gif").write_text("")
    train_adapter(settings(max_train_steps=1), console)
    assert "1 file in" in console.file.getvalue()
    assert "notes.gif" in console.file.getvalue()
