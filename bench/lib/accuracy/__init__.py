"""Accuracies of trained networks by one protocol: what it is, its cells, and what they say."""
