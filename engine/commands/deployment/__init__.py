"""Commands that put a trained network to use."""
