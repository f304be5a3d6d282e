"""Inference: pictures from stock pipelines with adapters."""
