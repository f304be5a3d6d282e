"""Numerics: tensors in, tensors out. Nothing here knows of layers, adapters or files."""
