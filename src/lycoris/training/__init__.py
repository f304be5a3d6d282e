"""Training runs: `settings.load_settings` reads a config, `train.train_adapter` does the rest."""
