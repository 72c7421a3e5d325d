"""Trained networks in use: predictions, and exported files that need no engine."""
