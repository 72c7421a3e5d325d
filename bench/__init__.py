"""Measurements, one command a module: `python -m bench` lists them."""
