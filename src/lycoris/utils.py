"""Folding a file into the models of a pipeline."""

from lycoris.dropin.merge import merge

__all__ = ["merge"]
