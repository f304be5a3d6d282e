"""Training: `settings.load` reads a config, `trainer.train` does the rest."""
