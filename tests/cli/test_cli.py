"""The command line: exit codes, messages, and what is left on disk."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from safetensors import safe_open
from typer.testing import CliRunner, Result

from lycoris.cli import app
from lycoris.training import data, evaluate, loop
from lycoris.training.base_model import suppress_library_output
from lycoris.training.sampling import Sampling
from lycoris.training.settings import Settings
from training_runs import small_run

LYCORIS = Path(sys.executable).with_name("lycoris")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def run(*words: str | Path) -> subprocess.CompletedProcess[str]:
    """In a process of its own, as from a shell: for what a process is, such as what it loads."""
    return subprocess.run([LYCORIS, *words], capture_output=True, text=True, check=False, env=ENVIRONMENT)


def invoke(*words: str | Path) -> Result:
    """In this process, which has the libraries loaded."""
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture
def config(tiny_base: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Few steps and no pictures, alone in its folder."""
    settings = tmp_path_factory.mktemp("settings")
    values = small_run(tiny_base, settings, max_train_steps=2, num_eval_images=2, seed=42)
    for key in ("instance_data_dir", "lycoris_config"):
        values[key] = str(settings / values[key])
    del values["validation_prompts"], values["validation_prompts_outside"]
    path = tmp_path / "config.json"
    path.write_text(json.dumps(values))
    return path


def test_version_and_help() -> None:
    assert run("--version").stdout.startswith("5.")
    shown = run("--help")
    assert shown.returncode == 0
    assert "train" in shown.stdout
    assert "demo" in shown.stdout


def test_help_does_not_load_the_training_libraries() -> None:
    code = "import sys, lycoris.cli; sys.exit(bool({'diffusers', 'transformers', 'accelerate'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False, env=ENVIRONMENT).returncode == 0


def test_an_unknown_option_exits_with_2() -> None:
    made = run("train", "--stesp", "3")
    assert made.returncode == 2
    assert "--stesp" in made.stderr


def test_what_is_quick_loads_nothing_heavy() -> None:
    heavy = {"torch", "numpy", "pydantic", "diffusers", "transformers", "accelerate", "matplotlib"}
    code = f"import sys, lycoris.cli; print(*({heavy} & set(sys.modules)))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=ENVIRONMENT)
    assert shown.stdout.strip() == ""


MISTAKES = {
    "an unknown key": ({"sede": 1}, {}, "unknown key 'sede'; did you mean 'seed'"),
    "a wrong type": ({"seed": "many"}, {}, "seed = 'many'"),
    "an unknown algorithm": ({}, {"algo": "lokrr"}, "unknown algorithm 'lokrr'; did you mean 'lokr'"),
    "an unknown preset key": ({}, {"apply_preset": {"target_modul": []}}, "unknown preset key 'target_modul'"),
    "an unknown option": ({}, {"algo": "lokr", "factr": 4}, "unknown option 'factr'; did you mean 'factor'"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_in_a_config_is_told_before_anything_heavy_is_loaded(name: str, config: Path) -> None:
    changes, lycoris, words = MISTAKES[name]
    change(config, lycoris_config="l.json", pretrained_model_name_or_path="nobody/nothing", **changes)
    (config.parent / "l.json").write_text(json.dumps(lycoris))
    code = (
        "import sys; from lycoris.cli import main\n"
        f"sys.argv = ['lycoris', 'train', {str(config)!r}]\n"
        "try: main()\n"
        "finally: print('loaded', *({'torch', 'diffusers', 'transformers', 'huggingface_hub'} & set(sys.modules)))"
    )
    made = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=ENVIRONMENT)
    assert made.returncode == 2
    assert words in made.stderr
    assert len(made.stderr.splitlines()) <= 15
    assert made.stdout.strip() == "loaded"


def test_training_prints_the_result_and_lines_that_draw_with_it(config: Path) -> None:
    made = run("train", config)
    assert made.returncode == 0, made.stderr
    assert made.stderr == ""
    out = config.parent / "out"
    assert (out / "report.json").is_file()
    code = made.stdout[made.stdout.index("from diffusers") :].replace("pipe(", "pipe(num_inference_steps=2, prompt=")
    with suppress_library_output():
        exec(code, {})
    with Image.open(out / "picture.png") as picture:
        assert picture.size == (32, 32)


def test_a_finished_run_is_replaced_only_with_force(config: Path) -> None:
    out = config.parent / "out"
    out.mkdir()
    (out / "pytorch_lora_weights.safetensors").write_text("an earlier run's")
    made = invoke("train", config)
    assert made.exit_code == 2
    assert "has pytorch_lora_weights.safetensors of an earlier run" in made.stderr
    assert "--force" in made.stderr
    assert [path.name for path in out.iterdir()] == ["pytorch_lora_weights.safetensors"]
    assert invoke("train", config, "--force").exit_code == 0
    assert (out / "report.json").is_file()


def test_the_recipe_that_is_read_is_not_written(config: Path) -> None:
    (config.parent / "lycoris_config.json").write_text('{"algo": "lora"}')
    change(config, lycoris_config="lycoris_config.json", output_dir=".")
    made = invoke("train", config)
    assert made.exit_code == 2
    assert "contains the lycoris_config of this run" in made.stderr
    assert (config.parent / "lycoris_config.json").read_text() == '{"algo": "lora"}'


def test_every_setting_is_listed() -> None:
    lines = CliRunner().invoke(app, ["train", "--list-settings"]).output.splitlines()
    assert [line.split(" ")[0] for line in lines] == list(Settings.model_fields)


def test_an_error_is_a_message_with_exit_code_2(config: Path) -> None:
    config.write_text(config.read_text().replace('"seed"', '"sede"'))
    made = run("train", config)
    assert made.returncode == 2
    assert "unknown key 'sede'; did you mean 'seed'" in made.stderr
    assert "Traceback" not in made.stderr
    assert made.stdout == ""
    assert list(config.parent.iterdir()) == [config]


def test_debug_shows_the_stack_trace(tmp_path: Path) -> None:
    made = run("train", tmp_path / "none.json", "--debug")
    assert made.returncode != 0
    assert "Traceback" in made.stderr


def test_ctrl_c_saves_and_says_how_to_go_on(config: Path) -> None:
    values = json.loads(config.read_text())
    config.write_text(json.dumps({**values, "max_train_steps": 500, "checkpointing_steps": 1}))
    out = config.parent / "elsewhere"
    process = subprocess.Popen(
        [LYCORIS, "train", config, "--output-dir", out], text=True, stderr=subprocess.PIPE, env=ENVIRONMENT
    )
    deadline = time.monotonic() + 600
    while not (out / "checkpoint-2").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=600)
    assert process.returncode == 130
    assert f"--output-dir {out} --resume latest" in said
    with safe_open(out / "pytorch_lora_weights.safetensors", "pt") as file:
        assert len(file.keys()) > 0
    assert not (out / "report.json").exists()
    assert not list(out.glob(".*"))

    last = max(int(path.name.split("-")[1]) for path in out.glob("checkpoint-*"))
    config.write_text(json.dumps({**values, "max_train_steps": last + 1}))
    made = invoke("train", config, "--output-dir", out, "--resume", "latest")
    assert made.exit_code == 0, made.output
    assert json.loads((out / "report.json").read_text())["steps"] == last + 1


def change(config: Path, **changes: Any) -> None:
    config.write_text(json.dumps({**json.loads(config.read_text()), **changes}))


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('"out"', '"config.json/out"', "config.json is a file"),
        ('"learning_rate": 0.01', '"learning_rate": 1e999', "learning_rate = inf"),
        ('"seed": 42', f'"seed": {2**70}', f"seed = {2**70}"),
    ],
)
def test_bad_values_are_one_message_and_leave_nothing(config: Path, old: str, new: str, words: str) -> None:
    assert old in config.read_text()
    config.write_text(config.read_text().replace(old, new))
    made = invoke("train", config)
    assert made.exit_code == 2
    assert words in made.stderr
    assert list(config.parent.iterdir()) == [config]


def test_any_folder_name_will_do(config: Path) -> None:
    change(config, output_dir="x[/bold]")
    made = invoke("train", config)
    assert made.exit_code == 0, made.output
    assert (config.parent / "x[" / "bold]" / "report.json").is_file()


@pytest.mark.parametrize("images", [4, pytest.param(None, marks=pytest.mark.slow)])
def test_the_same_demo_command_finishes_what_ctrl_c_stopped(
    images: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    words = ["demo", "--output-dir", str(out), "--steps", "2"]
    monkeypatch.setattr(evaluate, "build_sampling", lambda settings: Sampling(settings.resolution, 1, 1.0, 0))
    split_all = data.split_examples
    monkeypatch.setattr(data, "split_examples", lambda *args, **kw: [part[:images] for part in split_all(*args, **kw)])
    with monkeypatch.context() as patched:
        patched.setattr(loop, "catch_interrupt", lambda: nullcontext(lambda: True))
        assert invoke(*words).exit_code == 130
    assert (out / "checkpoint-1").is_dir()
    made = invoke(*words)
    assert made.exit_code == 0, made.output
    assert f"resuming from {out / 'checkpoint-1'}" in made.output
    assert not (out / "checkpoint-1").exists()
    refused = invoke(*words)
    assert refused.exit_code == 2
    commands = [line.strip() for line in made.output[made.output.index("Next:") :].splitlines() if "lycoris " in line]
    assert len(commands) == 3
    for command in commands:
        program, *rest = shlex.split(command)
        assert program == "lycoris"
        done = invoke(*rest)
        assert done.exit_code == 0, done.output
        assert done.stderr == ""
