"""The benchmarks run, with this library alone and on layers too small to time, and what they found can be written."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks import layers, report
from benchmarks.cases import CASES, HEADLINE_LAYER, LAYERS, OVERHEAD_CASE, OVERHEAD_LAYER, Layer, Setting, cases_for
from benchmarks.libraries import ARMS, OURS
from benchmarks.measure import Arm, memory
from benchmarks.processes import WorkerError
from benchmarks.worker import FROZEN, Session

PLAIN = Setting(device="cpu", dtype="float32", threads=1)
QUICK = ["--no-peers", "--rounds", "1", "--seconds", "0", "--device", "cpu"]


class InProcess(Session):
    """A worker without a process of its own."""

    def ask(self, **request: Any) -> dict[str, Any]:
        return json.loads(json.dumps(self.answer(request)))


class Dying:
    """A worker whose process ends at the first question."""

    library = "peft-0.21.2"

    def ask(self, **request: Any) -> dict[str, Any]:
        raise WorkerError("the peft-0.21.2 process ended with -9: Killed")


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """The headline layer and one convolution, at sizes that every case can serve."""
    small = {
        HEADLINE_LAYER: Layer(name=HEADLINE_LAYER, kind="linear", into=64, out=64, size=4),
        "conv-320-s64": Layer(name="conv-320-s64", kind="conv", into=64, out=64, size=5),
    }
    for name, layer in small.items():
        monkeypatch.setitem(LAYERS, name, layer)


def measured(layer: str, cases: list[str]) -> list[dict[str, Any]]:
    options = layers.parse([*QUICK, "--layers", layer, "--algorithms", *cases])
    worker = InProcess(OURS)
    return [layers.measure([worker], LAYERS[layer], PLAIN, case, options) for case in cases_for(LAYERS[layer], cases)]


@pytest.mark.parametrize("layer", [HEADLINE_LAYER, "conv-320-s64"])
def test_every_case_gives_numbers_or_is_not_built(layer: str) -> None:
    for row in measured(layer, list(CASES)):
        ours = row["arms"]["ours"]
        if "error" in ours:
            assert ours["error"] == "not built", row["case"]
        else:
            assert ours["low"] <= ours["ratio"] <= ours["high"]
            assert ours["parameters"] > 0
            assert ours["memory"]["saved"] >= 0


def test_results_can_be_written_and_read(tmp_path: Path) -> None:
    rows = measured(HEADLINE_LAYER, ["lora-r16", "oft-32", "ia3"])
    report.write(tmp_path, rows, report.hardware("cpu"), "python -m benchmarks.layers")
    about = json.loads((tmp_path / "layers.json").read_text())
    assert about["rows"] == rows
    assert {"hardware", "torch", "date", "command"} <= about.keys()
    assert re.search(r"^\| LoRA r16 \| 1\.12 \| \d+\.\d\d \|$", (tmp_path / "headline.md").read_text(), re.MULTILINE)
    assert (tmp_path / "headline.png").stat().st_size > 0


def test_the_small_layer_is_told_in_microseconds() -> None:
    rows = measured(OVERHEAD_LAYER, [OVERHEAD_CASE])
    assert "Microseconds beyond the frozen layer" in report.section(rows)
    assert all(case.name != OVERHEAD_CASE for case in cases_for(LAYERS[HEADLINE_LAYER], list(CASES)))


def test_a_library_that_dies_is_a_remark_and_the_others_go_on() -> None:
    options = layers.parse(QUICK)
    row = layers.measure([InProcess(OURS), Dying()], LAYERS[HEADLINE_LAYER], PLAIN, CASES["lora-r16"], options)
    assert "ratio" in row["arms"]["ours"]
    assert report.line(row).endswith("peft      -")
    assert "ended with -9: Killed" in report.section([row])


@pytest.mark.parametrize("question", [{"do": "time", "seconds": 0}, {"do": "memory"}])
def test_an_arm_that_fails_late_leaves_the_others(question: dict[str, Any]) -> None:
    session = InProcess(OURS)
    session.ask(do="prepare", layer=HEADLINE_LAYER, case="lora-r16", setting=PLAIN.as_dict())
    session.arms["ours"] = dataclasses.replace(session.arms["ours"], call=torch.linalg.cholesky)
    answer = session.ask(**question)
    assert "Error: " in answer["ours"]["error"]
    assert "error" not in answer[FROZEN]
    assert session.ask(**question).keys() == {FROZEN}


def test_memory_tells_what_is_kept_and_whether_it_is_a_weight() -> None:
    W, x = torch.randn(6, 8), torch.randn(1, 5, 8, requires_grad=True)
    train = torch.nn.Parameter(torch.randn(6, 8))
    frozen = Arm(lambda x: x @ W.T, x, torch.ones(1, 5, 6), (W,))
    dense = Arm(lambda x: x @ (W + train.exp()).T, x, torch.ones(1, 5, 6), (W,), (train,))
    assert memory(frozen)["saved"] == 0
    assert not memory(frozen)["saves_weight"]
    assert memory(dense)["saved"] == 2 * W.nbytes
    assert memory(dense)["saves_weight"]
    assert memory(dense)["peak"] > memory(frozen)["peak"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--layers", "linear-1024"], "unknown layer 'linear-1024'; did you mean"),
        (["--algorithms", "lora"], "unknown case 'lora'; did you mean"),
        (["--rounds", "0"], "must be a whole number of at least 1, not '0'"),
        (["--layers", OVERHEAD_LAYER, "--algorithms", "ia3"], "none of these cases is measured with these layers"),
    ],
)
def test_wrong_options_name_what_exists(words: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        layers.parse(words)
    assert told in capsys.readouterr().err


def test_a_request_out_of_order_is_refused() -> None:
    with pytest.raises(ValueError, match="not 'sing'"):
        Session(OURS).answer({"do": "sing"})


def test_every_arm_has_a_column() -> None:
    assert set(report.COLUMNS) == {arm for arms in ARMS.values() for arm in arms}
    assert FROZEN not in report.COLUMNS
