"""Folding a file into the models of a pipeline, and extracting one from what a fine-tuned model has changed."""

from lycoris.dropin.extract import extract_diff
from lycoris.dropin.merge import merge

__all__ = ["extract_diff", "merge"]
