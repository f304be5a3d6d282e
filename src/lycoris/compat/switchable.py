"""What networks of sd-scripts and Musubi Tuner have in common: adapters that can be disabled and enabled."""

from __future__ import annotations

from lycoris.compat.kohya_network import LycorisNetworkKohya


class SwitchableNetwork(LycorisNetworkKohya):
    """A network whose adapters `set_enabled` disables and enables.

    Disabled adapters stay attached, at strength 0.
    """

    _off: list[tuple[float, dict[str, float]]] | None = None
    """Strengths to restore when the adapters are enabled; None while they are."""

    def set_enabled(self, is_enabled: bool) -> None:
        """Enable or disable the adapters.

        When they are enabled again, every module has the multiplier from before. Raises `AttachError` while they are
        merged.
        """
        if not is_enabled and self._off is None:
            self._off = [(part.adapters.strength, dict(part.adapters.strengths.blocks)) for part in self.parts]
            for part in self.parts:
                part.adapters.set_strength(0.0)
        elif is_enabled and self._off is not None:
            for part, (strength, blocks) in zip(self.parts, self._off, strict=True):
                part.adapters.set_strength(strength, blocks)
            self._off = None

    def set_multiplier(self, multiplier: float | str) -> None:
        """Set the strength of all adapters.

        While they are disabled, it takes effect with `set_enabled(True)`. Raises as in `LycorisNetwork`.
        """
        super().set_multiplier(multiplier)
        if self._off is not None:
            self._off = None
            self.set_enabled(False)
