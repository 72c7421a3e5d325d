"""Exports of networks: the formats, their writers, the comparison with the original, the model card."""
