"""Accuracy under attacks: measured, kept when stopped, reported."""
