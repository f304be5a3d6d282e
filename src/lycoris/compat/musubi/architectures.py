"""Which blocks of a model are meant, by the classes that it has in the code that Musubi Tuner runs."""

from __future__ import annotations

from torch import nn

from lycoris.errors import ConfigError
from lycoris.models.families import DENOISERS
from lycoris.models.families.family import MusubiTargets


def detect(model: nn.Module) -> MusubiTargets:
    """What is trained of a model. Raises `ConfigError` when none of the classes is present, naming those that are.

    Of several that fit, the one whose classes are all there, and then the one with the most: HunyuanVideo-1.5 has only
    one of HunyuanVideo's two.
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
            f"{type(model).__name__} is of no known architecture: it has none of {', '.join(names)}. It has "
            f"{', '.join(sorted(have))}. lycoris.kohya takes targets from a preset"
        )
    return best
