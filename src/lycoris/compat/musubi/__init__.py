"""Musubi Tuner's network modules: name `lycoris.compat.musubi.loha` or `.lokr` as `--network_module`."""
