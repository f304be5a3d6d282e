"""Musubi Tuner's network modules: name `lycoris.dropin.musubi.loha` or `.lokr` as `--network_module`."""
