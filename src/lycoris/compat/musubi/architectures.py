"""Which blocks of a model Musubi Tuner trains, by the classes of its code."""

from __future__ import annotations

from torch import nn

from lycoris.errors import ConfigError
from lycoris.models.families import DENOISERS
from lycoris.models.families.family import MusubiTargets


def detect_musubi_targets(model: nn.Module) -> MusubiTargets:
    """Return what Musubi Tuner trains of a model.

    Of several architectures that match, one whose classes are all present is preferred, then the one with the most:
    HunyuanVideo-1.5 has one of HunyuanVideo's two classes. Raises `ConfigError` when none matches, with the model's
    classes.
    """
    have = {type(module).__name__ for module in model.modules()}
    known = [each.musubi_targets for each in DENOISERS if each.musubi_targets is not None]

    def fit(one: MusubiTargets) -> tuple[bool, int]:
        present = sum(name in have for name in one.targets)
        return present == len(one.targets), present

    best = max(known, key=fit)
    if not fit(best)[1]:
        names = dict.fromkeys(name for each in known for name in each.targets)
        raise ConfigError(
            f"{type(model).__name__} is not a known architecture: it has none of {', '.join(names)}. It has "
            f"{', '.join(sorted(have))}. For other models use lycoris.kohya with a preset"
        )
    return best
