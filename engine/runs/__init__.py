"""Runs: their directory, checkpoints, teachers, epochs, resuming, reports."""
