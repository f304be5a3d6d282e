"""Write the files that every later release has to read: `python -m tools.fixtures`, once for each release.

Every setting of `tests/cases.py` in every dialect, for a model of four small layers, in one archive
`tests/fixtures/<release>.tar.xz`, together with what each adapter adds to each weight and bias.
`tests/files/test_fixtures.py` reads them all. An archive of a release is never written again.
"""

from __future__ import annotations

import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from cases import ALGORITHMS  # noqa: E402  # the tests' own list, which is no package
from lycoris import __version__  # noqa: E402
from lycoris.adapters.adapter_set import AdapterSet  # noqa: E402
from lycoris.adapters.bundle import Bundle  # noqa: E402
from lycoris.algorithms.conversion import adapt_affine  # noqa: E402
from lycoris.errors import FileError  # noqa: E402
from lycoris.files import write, write_peft  # noqa: E402
from lycoris.files.dialects import DIALECTS  # noqa: E402
from lycoris.layers.geometry import Affine  # noqa: E402
from lycoris.layers.sites import ModelSites  # noqa: E402
from lycoris.targeting.planning import Rule, plan  # noqa: E402
from lycoris.testing.algorithms import perturb  # noqa: E402
from lycoris.testing.dialects import keep_held_layers  # noqa: E402

FOLDER = ROOT / "tests" / "fixtures"
SAME_FILES = ("drops", "stable")
"""In names of settings that differ in training alone."""


class Attention(nn.Module):
    """The layers that files of attention processors hold."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q = nn.Linear(4, 8, bias=False)


class Model(nn.Module):
    """One layer of each kind, as small as adapters of every kind fit on."""

    def __init__(self) -> None:
        super().__init__()
        self.attn1 = Attention()
        self.proj = nn.Linear(4, 8)
        self.conv = nn.Conv2d(4, 4, 3)
        self.norm = nn.LayerNorm(4)


def build_model() -> Model:
    """Build the model that all fixtures are for, with the same weights everywhere."""
    model = Model()
    for at, parameter in enumerate(model.parameters()):
        values = torch.arange(parameter.numel(), dtype=torch.float64).reshape(parameter.shape)
        parameter.data = (torch.sin(values * 0.7 + at) / 2).float()
    return model.requires_grad_(False)


def changes(model: nn.Module, bundle: Bundle) -> dict[str, Tensor]:
    """Return what adapters add to each weight and bias, in float64, by layer."""
    found = {}
    for path, layer, _, _ in ModelSites(model).values():
        if path in bundle.entries:
            bias = None if getattr(layer, "bias", None) is None else layer.bias.double()
            base = affine = Affine(layer.weight.double(), bias)
            for entry in bundle.entries[path]:
                affine = adapt_affine(entry, affine)
            found[f"{path}.weight"] = affine.weight - base.weight
            if affine.bias is not None and base.bias is not None:
                found[f"{path}.bias"] = affine.bias - base.bias
    return found


def settings() -> Iterator[str]:
    """Yield the settings that make files of their own."""
    yield from (name for name in ALGORITHMS if not any(part in name for part in SAME_FILES))


def trained(name: str) -> tuple[Model, Bundle]:
    """Build the model with adapters of one setting, trained by random numbers."""
    torch.manual_seed(0)
    model = build_model()
    adapters = AdapterSet.build(model, plan(model, Rule(ALGORITHMS[name], kind="*"), strict=False, unserved="skip"))
    perturb(adapters)
    return model, adapters.bundle()


def main() -> None:
    """Write the archive of this release."""
    FOLDER.mkdir(exist_ok=True)
    target = FOLDER / f"{'.'.join(__version__.split('.')[:2])}.tar.xz"
    if target.exists():
        sys.exit(f"{target} exists; files of a release are never written again")
    expected: dict[str, Tensor] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in settings():
            model, bundle = trained(name)
            expected |= {f"{name}:{path}": change.float() for path, change in changes(model, bundle).items()}
            for dialect, kind in DIALECTS.items():
                path = Path(folder) / dialect / (name if kind.is_folder else f"{name}.safetensors")
                path.parent.mkdir(exist_ok=True)
                held = keep_held_layers(bundle, dialect)
                if not held.entries:
                    continue
                try:
                    (write_peft if kind.is_folder else write)(held, path, *(() if kind.is_folder else (dialect,)))
                except FileError as error:
                    sys.stderr.write(f"{name} is not in {dialect}: {str(error).splitlines()[0]}\n")
        save_file(expected, Path(folder) / "expected.safetensors")
        with tarfile.open(target, "x:xz") as archive:
            for path in sorted(path for path in Path(folder).rglob("*") if path.is_file()):
                member = archive.gettarinfo(path, str(path.relative_to(folder)))
                member.mtime, member.uid, member.gid, member.uname, member.gname = 0, 0, 0, "", ""
                with path.open("rb") as file:
                    archive.addfile(member, file)


if __name__ == "__main__":
    main()
