"""What sd-scripts' and Musubi Tuner's own networks have in common: adapters that can be turned off and on."""

from __future__ import annotations

from lycoris.compat.kohya_network import LycorisNetworkKohya


class SwitchableNetwork(LycorisNetworkKohya):
    """Adapters that `set_enabled` turns off and on."""

    _off: list[tuple[float, dict[str, float]]] | None = None
    """What is in force again once the adapters act; None while they do."""

    def set_enabled(self, is_enabled: bool) -> None:
        """Let the adapters act, or not. When they act again, every module has the multiplier that it had."""
        if not is_enabled and self._off is None:
            self._off = [(part.adapters.strength, dict(part.adapters.strengths.blocks)) for part in self.parts]
            for part in self.parts:
                part.adapters.set_strength(0.0)
        elif is_enabled and self._off is not None:
            for part, (strength, blocks) in zip(self.parts, self._off, strict=True):
                part.adapters.set_strength(strength, blocks)
            self._off = None

    def set_multiplier(self, multiplier: float | str) -> None:
        """As in any network; while the adapters do not act, it counts from `set_enabled(True)` on."""
        super().set_multiplier(multiplier)
        if self._off is not None:
            self._off = None
            self.set_enabled(False)
