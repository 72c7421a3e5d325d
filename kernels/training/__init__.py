"""Ops of a training step beside its networks: the sums that it measures, and the update of weights."""
