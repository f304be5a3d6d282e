"""sd-scripts' own network modules: name `lycoris.compat.sd_scripts.loha` or `.lokr` as `--network_module`."""
