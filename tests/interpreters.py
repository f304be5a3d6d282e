"""Code in a process of its own, without the seconds that its libraries take to load."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO

SERVER = """
import json, os, sys, traceback

import accelerate, diffusers, peft, PIL.Image, pydantic, rich, torch, transformers, typer
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

assert not any(name.partition(".")[0] == "lycoris" for name in sys.modules)
torch.set_num_threads(1)
for line in sys.stdin:
    request = json.loads(line)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            for stream, number in (("stdout", 1), ("stderr", 2)):
                os.dup2(os.open(request[stream], os.O_WRONLY), number)
            os.chdir(request["cwd"])
            sys.path[:0] = ["", *request["path"]]
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            exec(compile(request["code"], "<string>", "exec"), {"__name__": "__main__"})
            status = 0
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else int(end.code is not None)
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class WarmInterpreter:
    """Forks for each piece of code from one process that has loaded torch, diffusers and transformers.

    The library itself is not loaded there, so each piece of code imports it itself. What loading costs, and what is
    loaded, needs an interpreter of its own.
    """

    def __init__(self) -> None:
        command = [sys.executable, "-W", "ignore", "-c", SERVER]
        # What the libraries say while they load is of interest only if they fail.
        self._said = tempfile.TemporaryFile("w+")  # noqa: SIM115 - `close` closes it
        self._server = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._said, text=True
        )

    def run(self, code: str, cwd: Path, *, path: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
        """Run code as `python -c` does, with `path` before everything else that is imported from."""
        with tempfile.NamedTemporaryFile("r") as out, tempfile.NamedTemporaryFile("r") as err:
            request = {"code": code, "cwd": str(cwd), "path": [*path]}
            self._ask(json.dumps({**request, "stdout": out.name, "stderr": err.name}))
            answer = _pipe(self._server.stdout).readline()
            assert answer, f"the warm interpreter has ended: {self._read_said()[-3000:]}"
            status = int(answer)
            return subprocess.CompletedProcess(["python", "-c", code], status, out.read(), err.read())

    def _ask(self, request: str) -> None:
        pipe = _pipe(self._server.stdin)
        pipe.write(request + "\n")
        pipe.flush()

    def _read_said(self) -> str:
        self._said.seek(0)
        return self._said.read()

    def close(self) -> None:
        """End the process."""
        self._server.communicate()
        self._said.close()


def _pipe(stream: IO[str] | None) -> IO[str]:
    assert stream is not None
    return stream
