"""What an adapter of fused layers takes on a model that has a layer for each part. `python -m benchmarks.slices`

Reading a LoKr of Flux's `linear1` for the layers of diffusers, and reading and attaching a file for all of
Flux.2-klein-4B, whose weights take addresses and no memory, for nothing writes to them. Seconds are those of one core.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lycoris import AdapterSet, LoKr, read, write
from lycoris.adapters.adapter import Adapter
from lycoris.adapters.bundle import Bundle
from lycoris.algorithms.base import Entry
from lycoris.algorithms.tensors import write_tensors
from lycoris.files import load_tensors, resolve, save_tensors
from lycoris.files.layout import NamedLayout
from lycoris.layers.geometry import Geometry


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


def measure_time(run: Callable[[], Any]) -> tuple[float, Any]:
    start = time.process_time()
    found = run()
    return time.process_time() - start, found


def of_linear1(folder: Path) -> None:
    """One layer of Flux.1, in a file by itself."""
    import diffusers

    with torch.device("meta"):
        model = diffusers.FluxTransformer2DModel()
    fused = NamedLayout.from_model(model).in_naming("original").layers["single_blocks.0.linear1"]
    entry = lokr(fused, 32)
    tensors = {
        f"diffusion_model.single_blocks.0.linear1.{name}": tensor
        for name, tensor in write_tensors(entry.algorithm, entry.tensors, fused).items()
    }
    path, size = folder / "linear1.safetensors", megabytes(tensors.values())
    save_tensors(tensors, path, {})
    print(f"linear1 of Flux.1, {fused}, a file of {size:.3f} MB, read for all of diffusers' model:")
    for shared in (True, False):
        seconds, bundle = measure_time(lambda shared=shared: resolve(load_tensors(path)[0], model, shared=shared))
        held = megabytes(t for stack in bundle.entries.values() for e in stack for t in e.tensors.values())
        form = "slices" if shared else "an adapter for each layer"
        print(f"  as {form}: {seconds:.3f} s, {held:.3f} MB ({held / size:.2f} times the file)")


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
    layout = NamedLayout.from_model(model)
    original = layout.in_naming("original")
    blocks = {path: g for path, g in original.layers.items() if "blocks" in path and g.kind == "linear"}
    bundle = Bundle({path: (lokr(g, 16),) for path, g in blocks.items()})
    path = folder / "klein.safetensors"
    write(bundle, path, "comfyui", model=original)
    size = path.stat().st_size / 1e6
    weights = sum(p.numel() for p in model.parameters())
    del bundle
    before = resident()
    forget_peak()
    seconds, adapters = measure_time(lambda: AdapterSet.load(model, read(path, model)).attach())
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
    with tempfile.TemporaryDirectory() as folder:
        of_linear1(Path(folder))
        of_klein(Path(folder))


if __name__ == "__main__":
    main()
