"""Two processes that work together, kept running from test to test: starting one takes seconds."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

SIZE = 2
PATIENCE = 20
"""Seconds that one process waits for the other before it gives up."""


class Ranks:
    """Runs a function in both processes, each time in a process group of its own, and collects what it returns.

    A failure in either is raised here with its traceback; then, and after silence, the next job gets new processes.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._numbers = folder, itertools.count()
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """`function(*args)` in every process; a list of results by rank. `function` belongs to an importable module."""
        if not self._processes:
            self._start()
        meeting = self._folder / str(next(self._numbers))
        for pipe in self._pipes:
            pipe.send((function, args, meeting))
        outcomes = [pipe.recv() if pipe.poll(4 * PATIENCE) else (False, "no answer") for pipe in self._pipes]
        failures = [f"rank {rank}: {result}" for rank, (fine, result) in enumerate(outcomes) if not fine]
        if failures:
            self.stop()
            raise AssertionError("\n".join(failures))
        return [result for _, result in outcomes]

    def _start(self) -> None:
        spawn = multiprocessing.get_context("spawn")
        for rank in range(SIZE):
            here, there = spawn.Pipe()
            process = spawn.Process(target=_serve, args=(rank, there), daemon=True)
            process.start()
            there.close()
            self._processes.append(process)
            self._pipes.append(here)

    def stop(self) -> None:
        """End the processes."""
        for process, pipe in zip(self._processes, self._pipes, strict=True):
            process.kill()
            process.join()
            pipe.close()
        self._processes, self._pipes = [], []


def _serve(rank: int, pipe: Connection) -> None:
    # What a launcher tells its processes, for libraries that ask for it.
    told = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": SIZE, "MASTER_ADDR": "localhost", "OMP_NUM_THREADS": 1}
    os.environ.update({name: str(value) for name, value in told.items()})
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    # DDP's remark on speed, for factors so small that several memory layouts are the same.
    warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides", UserWarning)
    while True:
        try:
            function, args, meeting = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((True, _together(rank, meeting, function, args)))
        except Exception:  # whatever a job raises is sent to the test that asked for it
            pipe.send((False, traceback.format_exc()))


def _together(rank: int, meeting: Path, function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    patience = timedelta(seconds=PATIENCE)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=SIZE, timeout=patience)
    try:
        return function(*args)
    finally:
        dist.destroy_process_group()
