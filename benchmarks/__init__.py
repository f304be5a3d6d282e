"""Measurements beside other libraries. Nothing here is installed with the package."""
