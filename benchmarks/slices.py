"""What an adapter of fused layers takes on a model that has a layer for each part. `python -m benchmarks.slices`

Reading a LoKr of Flux's `linear1` for the layers of diffusers, and reading and attaching a file for all of
Flux.2-klein-4B, whose weights take addresses and no memory, for nothing writes to them.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lycoris import AdapterSet, LoKr, read, write
from lycoris.adapter import Adapter
from lycoris.algorithms import write_tensors
from lycoris.bundle import Bundle, Entry
from lycoris.files import load_tensors, resolve
from lycoris.files.families import ARCHITECTURES
from lycoris.files.layout import Layout
from lycoris.geometry import Geometry

ROUNDS = 5


def resident(field: str = "VmRSS") -> float:
    """Megabytes of this process in memory now, or with VmHWM at most since `forget_peak`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1000 for line in lines if line.startswith(field))


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def lokr(geometry: Geometry, factor: int) -> Entry:
    """Whole factors in bfloat16, the first one as near to factor x factor as divides."""
    algorithm = LoKr(factor=factor, full_matrix=True)
    adapter = Adapter(algorithm, geometry, dtype=torch.bfloat16)
    return Entry(algorithm, geometry, {name: torch.randn_like(t) for name, t in adapter.tensors().items()})


def megabytes(tensors: Any) -> float:
    """Of the memory under tensors, each piece once."""
    pieces = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(pieces.values()) / 1e6


def best(run: Callable[[], Any], rounds: int) -> tuple[float, Any]:
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        found = run()
        times.append(time.perf_counter() - start)
    return min(times), found


def of_linear1() -> None:
    """One layer of Flux.1, in a file by itself."""
    layout = Layout.known(ARCHITECTURES["flux1"], "flux.1-dev")
    layers = [path for path in layout.middle if path.startswith("single_transformer_blocks.0.")]
    rows = sum(layout.middle[path].out_features for path in layers if path.endswith(("to_q", "to_k", "to_v", "mlp")))
    fused = Geometry(kind="linear", shape=(rows, 3072))
    entry = lokr(fused, 32)
    tensors = {
        f"diffusion_model.single_blocks.0.linear1.{name}": tensor
        for name, tensor in write_tensors(entry.algorithm, entry.tensors, fused).items()
    }
    size = megabytes(tensors.values())
    print(f"linear1 of Flux.1, {rows} x 3072, a file of {size:.3f} MB:")
    for shared in (True, False):
        seconds, bundle = best(
            lambda shared=shared: resolve(tensors, layout, "comfyui", shared=shared), ROUNDS if shared else 1
        )
        held = megabytes(t for stack in bundle.entries.values() for e in stack for t in e.tensors.values())
        told = "slices" if shared else "an adapter for each layer"
        print(f"  read as {told}: {seconds:.4f} s, {held:.3f} MB ({held / size:.2f} times the file)")


def transformer() -> nn.Module:
    """Flux.2-klein-4B as diffusers has it, in bfloat16."""
    import diffusers

    sizes: Mapping[str, Any] = {
        "num_layers": 5,
        "num_single_layers": 20,
        "num_attention_heads": 24,
        "attention_head_dim": 128,
        "joint_attention_dim": 7680,
        "in_channels": 128,
        "guidance_embeds": False,
    }
    with torch.device("meta"):
        model = diffusers.Flux2Transformer2DModel(**sizes).to(torch.bfloat16)
    return model.to_empty(device="cpu")


def of_klein(folder: Path) -> None:
    """All of a model."""
    model = transformer()
    layout = Layout.of(model)
    architecture = layout.architecture
    assert architecture is not None
    original = layout.renamed(next(iter(architecture.namings)))
    blocks = {path: g for path, g in original.layers.items() if "blocks" in path and g.kind == "linear"}
    bundle = Bundle({path: (lokr(g, 16),) for path, g in blocks.items()})
    path = folder / "klein.safetensors"
    write(bundle, path, "comfyui", model=original)
    size = path.stat().st_size / 1e6
    weights = sum(p.numel() for p in model.parameters())
    del bundle
    before = resident()
    forget_peak()
    start = time.perf_counter()
    adapters = AdapterSet.load(model, read(path, model)).attach()
    seconds = time.perf_counter() - start
    peak, now = resident("VmHWM") - before, resident() - before
    print(f"Flux.2-klein-4B, {weights / 1e9:.2f} G parameters, {len(blocks)} layers in a file of {size:.1f} MB:")
    print(f"  read and attached in {seconds:.2f} s on {len(adapters.stacks)} layers of diffusers")
    print(f"  {peak:.0f} MB at most above the model, {now:.0f} MB afterwards")
    write(adapters.bundle(), folder / "again.safetensors", "comfyui", dtype=torch.bfloat16)
    print(f"  written back: {_same(load_tensors(path)[0], load_tensors(folder / 'again.safetensors')[0])}")


def _same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> str:
    if one.keys() != other.keys():
        return f"other names, such as {sorted(one.keys() ^ other.keys())[0]}"
    odd = [name for name in one if one[name].dtype != other[name].dtype or not torch.equal(one[name], other[name])]
    return f"{len(odd)} tensors differ, such as {odd[0]}" if odd else f"the same {len(one)} tensors, bit for bit"


def main() -> None:
    torch.set_num_threads(1)
    of_linear1()
    if "--small" not in sys.argv:
        with tempfile.TemporaryDirectory() as folder:
            of_klein(Path(folder))


if __name__ == "__main__":
    main()
