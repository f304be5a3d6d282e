"""Model families, one file each, as data."""
