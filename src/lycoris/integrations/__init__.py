"""One file for each outside library, imported only when asked for."""
