"""Time and memory of one frozen layer with an adapter, as a ratio to the frozen layer alone, beside other libraries.

`make bench`, or `python -m benchmarks.layers --help`. How it is measured: docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import os
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from benchmarks import report
from benchmarks.cases import CASES, HEADLINE_LAYER, LAYERS, OVERHEAD_LAYER, Case, Layer, Setting, cases_for
from benchmarks.libraries import ARMS, OURS
from benchmarks.processes import Worker, WorkerError
from benchmarks.worker import FROZEN
from lycoris.errors import unknown

FEWEST_ROUNDS = 3


class Asked(Protocol):
    """What answers like a worker process."""

    library: str

    def ask(self, **request: Any) -> dict[str, Any]: ...


def main(words: Sequence[str] | None = None) -> None:
    """Measure what the command line asks for; results are written anew after every layer."""
    options = parse(sys.argv[1:] if words is None else words)
    hardware = report.hardware(options.device)
    folder = options.output or Path(__file__).parent / "results" / report.slug(hardware)
    libraries = [OURS] if options.no_peers else list(ARMS)
    command = shlex.join(["python", "-m", "benchmarks.layers", *(sys.argv[1:] if words is None else words)])
    rows: list[dict[str, Any]] = []
    for setting in settings(options.device, options.threads):
        workers = [Worker(library, setting.threads, options.longest) for library in libraries]
        try:
            for name in options.layers:
                for case in cases_for(LAYERS[name], options.algorithms):
                    row = measure(workers, LAYERS[name], setting, case, options)
                    print(report.line(row), flush=True)
                    rows.append(row)
                report.write(folder, rows, hardware, command)
        finally:
            for worker in workers:
                worker.close()
    print(f"results are in {folder}")


def parse(words: Sequence[str]) -> argparse.Namespace:
    """The options; a wrong name ends the program with an error that lists what exists."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.layers", description=__doc__)
    parser.add_argument("--quick", action="store_true", help=f"the headline only: {HEADLINE_LAYER}, one thread")
    parser.add_argument("--layers", nargs="+", metavar="NAME", type=_one_of("layer", LAYERS), default=list(LAYERS))
    parser.add_argument("--algorithms", nargs="+", metavar="NAME", type=_one_of("case", CASES), default=list(CASES))
    parser.add_argument("--threads", nargs="+", type=_whole, default=[1, 2], help="numbers of threads; CPU only")
    parser.add_argument("--rounds", type=_whole, default=9, help="rounds in which every library has its turn")
    parser.add_argument("--seconds", type=float, default=0.6, help="length of a library's turn; one pass at least")
    parser.add_argument(
        "--patience", type=float, default=60, help=f"seconds after which {FEWEST_ROUNDS} rounds are enough for a case"
    )
    parser.add_argument("--longest", type=float, default=600, help="seconds within which a library must answer")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--no-peers", action="store_true", help="this library only; installs nothing")
    parser.add_argument("--output", type=Path, metavar="DIR", help="default: benchmarks/results/<hardware>")
    options = parser.parse_args(words)
    if options.device == "auto":
        options.device = "cuda" if torch.cuda.is_available() else "cpu"
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this PyTorch sees no CUDA device; use --device cpu")
    if options.quick:
        options.layers, options.threads = [HEADLINE_LAYER], [1]
    if not any(cases_for(LAYERS[name], options.algorithms) for name in options.layers):
        parser.error(f"none of these cases is measured with these layers; {OVERHEAD_LAYER} has only lora-r4")
    return options


def settings(device: str, threads: Iterable[int]) -> list[Setting]:
    """float32 with each number of threads on a CPU; bfloat16, eager and compiled, on a GPU."""
    if device == "cpu":
        return [Setting(device=device, dtype="float32", threads=count) for count in threads]
    return [Setting(device=device, dtype="bfloat16", threads=1, compiled=compiled) for compiled in (False, True)]


def measure(
    workers: Sequence[Asked], layer: Layer, setting: Setting, case: Case, options: argparse.Namespace
) -> dict[str, Any]:
    """One case in all libraries, which take turns: what disturbs the machine disturbs all of them.

    A round gives each arm the ratio of its median time to that of the frozen layer in the same process and turn; the
    result is the median over rounds. The first round is for warming up.
    """
    arms: dict[str, dict[str, Any]] = {}
    ready = [worker for worker in workers if _prepare(worker, layer, setting, case, arms)]
    turns: dict[str, list[tuple[float, float]]] = {}
    begun = time.monotonic()
    for number in range(options.rounds + 1):
        if number > FEWEST_ROUNDS and time.monotonic() - begun > options.patience:
            break
        for worker in ready:
            taken = _guarded(worker, arms, do="time", seconds=options.seconds)
            for arm in _working(taken, arms):
                turns.setdefault(arm, []).append((taken[arm]["median"], taken[FROZEN]["median"]))
    for worker in ready:
        sizes = _guarded(worker, arms, do="memory")
        for arm in _working(sizes, arms):
            arms[arm]["memory"] = sizes[arm] | {"ratio": sizes[arm]["peak"] / sizes[FROZEN]["peak"]}
    for arm, pairs in turns.items():
        if "error" not in arms[arm]:
            arms[arm] |= _summary(pairs[1:])
    where = {"layer": layer.name, "setting": setting.as_dict(), "case": case.name}
    return {**where, "load": os.getloadavg()[0], "arms": arms}


def _prepare(worker: Asked, layer: Layer, setting: Setting, case: Case, arms: dict[str, dict[str, Any]]) -> bool:
    """Have a worker build the case; whether one of its arms works."""
    told = _guarded(worker, arms, do="prepare", layer=layer.name, setting=setting.as_dict(), case=case.name)
    arms |= told
    return any("error" not in arm for arm in told.values())


def _guarded(worker: Asked, arms: dict[str, dict[str, Any]], **request: Any) -> dict[str, Any]:
    """A worker's answer; when it dies, its arms have failed and the answer is empty."""
    if any(arms.get(arm, {}).get("died") for arm in ARMS[worker.library]):
        return {}
    try:
        return worker.ask(**request)
    except WorkerError as error:
        arms |= {arm: {"error": str(error), "died": True} for arm in ARMS[worker.library]}
        return {}


def _working(answer: dict[str, Any], arms: dict[str, dict[str, Any]]) -> list[str]:
    """The arms that an answer has numbers for; those that failed meanwhile are noted as such."""
    failed = {arm: found for arm, found in answer.items() if "error" in found}
    arms |= failed
    return [arm for arm in answer if arm != FROZEN and arm not in failed]


def _summary(pairs: Sequence[tuple[float, float]]) -> dict[str, Any]:
    ratios = [adapted / frozen for adapted, frozen in pairs]
    return {
        "ratio": statistics.median(ratios),
        "low": min(ratios),
        "high": max(ratios),
        "rounds": ratios,
        "seconds": statistics.median(adapted for adapted, _ in pairs),
        "frozen_seconds": statistics.median(frozen for _, frozen in pairs),
        "overhead_seconds": statistics.median(adapted - frozen for adapted, frozen in pairs),
    }


def _one_of(what: str, known: Iterable[str]) -> Callable[[str], str]:
    def check(word: str) -> str:
        if word not in known:
            raise argparse.ArgumentTypeError(unknown(what, word, known))
        return word

    return check


def _whole(word: str) -> int:
    if not word.isdigit() or int(word) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, not {word!r}")
    return int(word)


if __name__ == "__main__":
    main()
