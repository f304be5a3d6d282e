"""Measure which small wrong changes of the source the tests notice: `python -m tools.mutate --seed 0 --count 60`.

A sample of mutants (`tools/mutants.py`) of algorithms, files and adapters is run one by one against the tests of its
area, until one fails. To compare two selections of tests on the same sample:

    python -m tools.mutate --seed 0 --count 60 --report new.jsonl
    python -m tools.mutate --again new.jsonl --root ../older --report old.jsonl

`--again` runs only the mutants that survived there, here in the tests of another checkout: where its tests contain
those of the first, what the first killed is killed by it as well.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import os
import random
import resource
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

from tools.mutants import Mutant, compiles, mutants

ROOT = Path(__file__).parent.parent
NOT_RUN = 99
"""Exit code of a run that failed before any test."""
CPU_SECONDS = 900
"""After which a run counts as one that does not end; a mutant that loops for ever is killed."""
CONTRACTS = "tests/contracts"
STAGES = {
    "algorithms": (
        [f"{CONTRACTS}/test_equality.py", f"{CONTRACTS}/test_golden.py"],
        [f"{CONTRACTS}/test_gradients.py", f"{CONTRACTS}/test_filling.py", "tests/test_rows*.py", "tests/algorithms"],
        [
            "tests/ops",
            "tests/test_slices*.py",
            "tests/test_recast.py",
            "tests/test_explain.py",
            "tests/files/test_files*.py",
        ],
        [f"{CONTRACTS}/test_lifecycle.py", f"{CONTRACTS}/test_shapes.py", f"{CONTRACTS}/test_programs.py"],
        [f"{CONTRACTS}/test_dialects.py", f"{CONTRACTS}/test_recomputation*.py", "tests/test_derivative.py"],
    ),
    "files": (
        ["tests/files"],
        [f"{CONTRACTS}/test_dialects.py", f"{CONTRACTS}/test_equality.py", f"{CONTRACTS}/test_filling.py"],
        [f"{CONTRACTS}/test_programs*.py", "tests/programs"],
        ["tests/tools", "tests/cli/test_cli_tools.py", "tests/cli/test_converting.py", "tests/test_saving.py"],
    ),
    "adapters": (
        [f"{CONTRACTS}/test_states.py", f"{CONTRACTS}/test_equality.py", "tests/test_verification.py"],
        [
            f"{CONTRACTS}/test_recomputation*.py",
            "tests/test_schedule.py",
            "tests/test_freezing.py",
            "tests/test_ties.py",
        ],
        [
            f"{CONTRACTS}/test_lifecycle.py",
            f"{CONTRACTS}/test_filling.py",
            "tests/test_watching.py",
            "tests/test_merging.py",
        ],
        ["tests/test_bases.py", "tests/test_batch_layout.py", "tests/test_checkpoints.py", "tests/test_paths.py"],
        ["tests/test_distributed.py", "tests/test_planning.py", "tests/test_saving.py", "tests/test_outline.py"],
    ),
}
"""Folder → its tests, in the order in which they are run: what kills most per second goes first."""
HEAVY = ("torch", "transformers", "diffusers", "peft", "accelerate", "hypothesis", "pytest")
"""Imported once, before the process is forked for each run."""


@dataclass(frozen=True)
class Outcome:
    mutant: Mutant
    killed: bool
    stage: str
    seconds: float


def sample(seed: int, count: int, source: Path) -> list[Mutant]:
    """Return as many mutants from each area, in an order that any prefix of is a fair sample too."""
    draw = random.Random(seed)
    areas = []
    for area in STAGES:
        found = [
            mutant
            for path in sorted((source / "lycoris" / area).rglob("*.py"))
            for mutant in mutants(path.relative_to(source).as_posix(), path.read_bytes())
        ]
        draw.shuffle(found)
        sound = (mutant for mutant in found if compiles(mutant, (source / mutant.path).read_bytes()))
        areas.append(list(islice(sound, -(-count // len(STAGES)))))
    return [mutant for group in zip(*areas, strict=True) for mutant in group][:count]


class Bench:
    """A copy of the source in which one mutant at a time lives, and the tests that are run over it."""

    def __init__(self, folder: Path, root: Path, expression: str) -> None:
        self._source, self._root, self._expression = folder / "src", root, expression
        self._changes = 0
        shutil.copytree(root / "src", self._source, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))

    def run(self, mutant: Mutant) -> Outcome:
        """Put the mutant in place, run stage after stage until one fails, and put the source back."""
        path, began = self._source / mutant.path, _spent()
        original = path.read_bytes()
        self._write(path, mutant.apply(original))
        try:
            for stage in STAGES[mutant.path.split("/")[1]]:
                files = [str(file) for pattern in stage for file in sorted(self._root.glob(pattern))]
                if not self._passes(files):
                    return Outcome(mutant, True, stage[0], _spent() - began)
            return Outcome(mutant, False, "", _spent() - began)
        finally:
            self._write(path, original)

    def _write(self, path: Path, source: bytes) -> None:
        path.write_bytes(source)
        # Compiled files are told apart by whole seconds, and by a size that a mutant may not change.
        self._changes += 1
        os.utime(path, (self._changes, self._changes))

    def _passes(self, files: Sequence[str]) -> bool:
        process = os.fork()
        if process == 0:
            code = NOT_RUN
            try:
                code = self._pytest(files)
            finally:
                os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        if code in (4, 5, NOT_RUN):
            raise RuntimeError(f"pytest ran no tests of {', '.join(files)}: exit code {code}")
        return code == 0

    def _pytest(self, files: Sequence[str]) -> int:
        import pytest

        resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        os.chdir(self._root)
        sys.path.insert(0, str(self._source))
        os.environ["PYTHONPATH"] = str(self._source)
        words = ["-x", "-q", "-m", self._expression, "-p", "no:cacheprovider", "-p", "no:xdist", "--tb=no"]
        # Plugins among the libraries that were loaded before.
        words += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]
        return int(pytest.main([*words, f"--rootdir={self._root}", *files]))


def _spent() -> float:
    """CPU seconds of this process and of those that it waited for."""
    own, children = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime


def work(chosen: Sequence[Mutant], root: Path, expression: str, report: Path) -> None:
    """Run mutants one after the other, in a process that has the libraries loaded and the package not."""
    for name in HEAVY:
        importlib.import_module(name)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), root, expression)
        for mutant in chosen:
            outcome = bench.run(mutant)
            verdict = f"killed by {outcome.stage}" if outcome.killed else "SURVIVED"
            sys.stderr.write(f"{outcome.seconds:6.1f} s  {verdict}  {mutant.path}:{mutant.line}  {mutant.what}\n")
            with report.open("a") as lines:
                lines.write(json.dumps(asdict(outcome)) + "\n")


def read(report: Path) -> list[Outcome]:
    """The outcomes that a report has so far."""
    found = [json.loads(line) for line in report.read_text().splitlines()]
    return [Outcome(**{**each, "mutant": Mutant(**each["mutant"])}) for each in found]


def summary(outcomes: Sequence[Outcome]) -> str:
    """The rate of each area and of all."""
    every, killed = Counter[str](), Counter[str]()
    for outcome in outcomes:
        for area in (outcome.mutant.path.split("/")[1], "all"):
            every[area] += 1
            killed[area] += outcome.killed
    return "\n".join(f"{area}: {killed[area]} of {every[area]} killed" for area in every)


def main() -> None:
    """Sample, run, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=60)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--root", type=Path, default=ROOT, help="the checkout whose source and tests are used")
    parser.add_argument("--select", default="not slow", help="pytest's -m")
    parser.add_argument("--again", type=Path, help="a report, of which the survivors are run")
    parser.add_argument("--report", type=Path, required=True, help="where to write the outcomes, a line for each")
    given = parser.parse_args()
    root = given.root.resolve()
    if given.again:
        chosen = [outcome.mutant for outcome in read(given.again) if not outcome.killed]
    else:
        chosen = sample(given.seed, given.count, root / "src")
    given.report.write_text("")
    spawn = multiprocessing.get_context("spawn")
    shares = [(chosen[at :: given.jobs], root, given.select, given.report) for at in range(given.jobs)]
    workers = [spawn.Process(target=work, args=share) for share in shares]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    sys.stdout.write(summary(read(given.report)) + "\n")


if __name__ == "__main__":
    main()
