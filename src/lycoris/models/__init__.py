"""Which models are known? Their names and outlines; no weights, and nothing of files."""
