"""Which layers get what? Rules, presets and configs, and the plan that comes of them."""
