"""sd-scripts' own network modules: name `lycoris.dropin.sd_scripts.loha` or `.lokr` as `--network_module`."""
