"""Measurements: `bench.kernels` times the ops, `bench.profile` lists the ops of a training step."""
