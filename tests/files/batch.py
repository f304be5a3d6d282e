"""Runs mutated files in a process of its own, which may neither take memory nor time: `batch.py KIND=COUNT ...`.

Prints one JSON object: for each kind how many files were read, how many refused, and what else happened.
"""

from __future__ import annotations

import faulthandler
import io
import json
import random
import resource
import signal
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))

import mutations

from cases import ALGORITHMS, perturb
from lycoris import AdapterSet, FileError, LycorisError, Rule, plan, read
from lycoris.files import encode, load_tensors, read_header
from tiny import flux_transformer

SECONDS = 20
"""A single case that takes longer hangs."""
HEADROOM = 256 * 2**20
"""Bytes of address space beside what the process has after a good file of each kind; the files have some thousand."""

ADAPTED = (
    "lora",
    "loha",
    "lokr",
    "lokr-factor",
    "lokr-tucker",
    "glora",
    "oft",
    "boft",
    "dora-lora",
    "full",
    "ia3",
    "tlora",
)


def storage_files() -> list[bytes]:
    some = {
        "a.up": torch.rand(4, 2),
        "a.alpha": torch.tensor(2.0),
        "b": torch.rand(3, 5).half(),
        "c": torch.zeros(0, 2),
    }
    more = {f"lora_unet_{n}.lora_up.weight": torch.rand(2, 2).bfloat16() for n in range(20)}
    return [save(some, metadata={"k": "v"}), save(more), save({"x": torch.arange(8)})]


def pickle_files(zipped: bool) -> list[bytes]:
    a = torch.rand(4, 2)
    found = []
    for what in ({"a": a, "b": a.T, "c": torch.nn.Parameter(a.half())}, {"state_dict": {"a": a}, "epoch": 3}):
        buffer = io.BytesIO()
        torch.save(what, buffer, _use_new_zipfile_serialization=zipped)
        found.append(buffer.getvalue())
    return found


def adapter_files(model: nn.Module) -> list[bytes]:
    found = []
    for name in ADAPTED:
        rule = Rule(ALGORITHMS[name], path="transformer_blocks.*.attn.*")
        adapters = AdapterSet.build(model, plan(model, rule, strict=False))
        perturb(adapters)
        prefix = "lora_unet" if len(found) % 3 == 2 else "lycoris"
        tensors = {key.replace("lycoris", prefix, 1): t for key, t in encode(adapters.bundle()).items()}
        found.append(save(tensors, metadata={"note": name}))
    return found


def loads(path: Path) -> None:
    """What this library accepts is what safetensors' own reader finds."""
    found, metadata = load_tensors(path)
    head = read_header(path)
    assert metadata == head.metadata
    own = load_file(path)
    assert found.keys() == own.keys()
    for key, tensor in found.items():
        assert (tensor.dtype, tuple(tensor.shape), tensor.nbytes) == head.tensors[key]
        assert tensor.reshape(-1).view(torch.uint8).equal(own[key].clone().reshape(-1).view(torch.uint8))


def unpickles(path: Path) -> None:
    for tensor in load_tensors(path)[0].values():
        tensor.clone()


class Reads:
    """Reading for a model, which stays as it was."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.before = {key: value.clone() for key, value in model.state_dict().items()}
        self.types = [type(each) for each in model.modules()]

    def __call__(self, path: Path) -> None:
        try:
            read(path, self.model)
        finally:
            after = self.model.state_dict()
            assert after.keys() == self.before.keys()
            assert all(torch.equal(after[key], value) for key, value in self.before.items())
            assert [type(each) for each in self.model.modules()] == self.types
            assert not any(m._forward_hooks or m._forward_pre_hooks for m in self.model.modules())


def alarm(*_: Any) -> None:
    raise TimeoutError(f"longer than {SECONDS} s")


def run(
    kind: str,
    count: int,
    goods: Sequence[bytes],
    ways: Sequence[mutations.Mutation],
    suffix: str,
    door: Callable[[Path], None],
    allowed: type[Exception],
    folder: Path,
) -> dict[str, Any]:
    told: dict[str, Any] = {"read": 0, "refused": 0, "longest": 0, "wrong": []}
    for n in range(count):
        r = random.Random(f"{kind}-{n}")
        content, way = r.choice(goods), r.choice(ways)
        path = folder / f"{n}{suffix}"
        path.write_bytes(way(r, content))
        signal.alarm(SECONDS)
        try:
            door(path)
            told["read"] += 1
        except allowed as error:
            told["refused"] += 1
            if str(path) not in str(error):
                told["wrong"].append(f"{way.__name__} {n}: {str(error)[:300]!r} does not name the file")
            told["longest"] = max(told["longest"], len(str(error)))
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            place = f"{Path(where.filename).name}:{where.lineno}"
            told["wrong"].append(f"{way.__name__} {n}: {type(error).__name__} at {place}: {str(error)[:300]}")
        finally:
            signal.alarm(0)
        path.unlink()
    return told


def main(asked: dict[str, int]) -> dict[str, Any]:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    faulthandler.enable()
    signal.signal(signal.SIGALRM, alarm)
    model = flux_transformer()
    reads = Reads(model)
    kinds: dict[str, tuple[list[bytes], Sequence[mutations.Mutation], str, Callable[[Path], None], type[Exception]]] = {
        "structure": (storage_files(), mutations.STRUCTURE, ".safetensors", loads, FileError),
        "bytes": (storage_files(), mutations.BYTES, ".safetensors", loads, FileError),
        "zips": (pickle_files(True), mutations.ZIPS, ".pt", unpickles, FileError),
        "legacy": (pickle_files(False), mutations.LEGACY, ".ckpt", unpickles, FileError),
        "adapters": (adapter_files(model), mutations.ADAPTERS, ".safetensors", reads, LycorisError),
    }
    told: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        for goods, _, suffix, door, _ in kinds.values():
            for good in goods:
                (folder / f"good{suffix}").write_bytes(good)
                door(folder / f"good{suffix}")
        held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (held + HEADROOM, resource.RLIM_INFINITY))
        for kind, count in asked.items():
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            told[kind] = run(kind, count, *kinds[kind], folder)
            told[kind]["grown"] = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    return told


if __name__ == "__main__":
    json.dump(main({kind: int(count) for kind, count in (each.split("=") for each in sys.argv[1:])}), sys.stdout)
