"""Exported files: their facts, the checks before they are read, and the networks in them."""
