"""The environments of the other libraries, made on demand, and the worker processes that run in them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from benchmarks.libraries import OLD, OURS, PEFT

ROOT = Path(__file__).parent.parent
ENVIRONMENTS = Path(__file__).parent / ".envs"
REQUIREMENTS: Mapping[str, str] = {OLD: "lycoris-lora==4.1.3", PEFT: "peft==0.21.2"}

KEEP_MEMORY: Mapping[str, str] = {"MALLOC_TRIM_THRESHOLD_": str(1 << 32), "MALLOC_MMAP_THRESHOLD_": str(1 << 30)}
"""Has glibc keep freed memory, in every worker: given back to the system and faulted in again, the activations of a
lone layer cost milliseconds in some steps and nothing in others. A whole network keeps its heap grown."""


class WorkerError(RuntimeError):
    """A worker process ended instead of answering."""


def python_of(library: str) -> str:
    """The interpreter that has a library: ours is the running one, the others get an environment of their own.

    The two packages called lycoris cannot share one. torch is the same version in all, that of constraints.txt.
    """
    if library == OURS:
        return sys.executable
    folder = ENVIRONMENTS / library
    python, done = folder / "bin" / "python", folder / ".installed"
    if not done.exists():
        print(f"making {folder.relative_to(ROOT)}", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        # torch first and alone: from constraints.txt it comes as the main environment's build.
        for requirement in ("torch", REQUIREMENTS[library]):
            install = ["-m", "pip", "install", "--quiet", "--constraint", ROOT / "constraints.txt", requirement]
            subprocess.run([python, *install], check=True)
        done.touch()
    return str(python)


class Worker:
    """One process of `benchmarks.worker`, with a fixed number of threads. It waits without using the processor."""

    def __init__(self, library: str, threads: int, longest: float) -> None:
        self.library, self.threads, self.longest = library, threads, longest
        self._errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 -- it outlives this block; `close` closes it
        self._process: subprocess.Popen[str] | None = None

    def ask(self, **request: Any) -> dict[str, Any]:
        """The answer to one request.

        Raises `WorkerError`, with what the process said last, when it dies or takes more than `longest` seconds. The
        next request then starts a new one.
        """
        process = self._running()
        assert process.stdin is not None
        assert process.stdout is not None
        limit = threading.Timer(self.longest, process.kill)
        limit.start()
        try:
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            line = ""
        late = not limit.is_alive()
        limit.cancel()
        if not line:
            code = process.wait()
            self._process = None
            if late:
                raise WorkerError(f"no answer within {self.longest:.0f} seconds")
            self._errors.seek(0)
            last = self._errors.read().decode(errors="replace").strip().splitlines()[-3:]
            raise WorkerError(f"the {self.library} process ended with {code}: {' / '.join(last)}")
        return json.loads(line)

    def close(self) -> None:
        if self._process is not None:
            self._process.communicate()
            self._process = None
        self._errors.close()

    def _running(self) -> subprocess.Popen[str]:
        if self._process is None:
            self._errors.truncate(0)
            self._process = subprocess.Popen(
                [python_of(self.library), "-m", "benchmarks.worker", self.library],
                cwd=ROOT,
                env=self._environment(),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                text=True,
            )
        return self._process

    def _environment(self) -> dict[str, str]:
        threads = str(self.threads)
        env = {**os.environ, **KEEP_MEMORY, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
        if self.library != OURS:
            # A path that leads to our package would hide the other one of the same name.
            env.pop("PYTHONPATH", None)
        return env
