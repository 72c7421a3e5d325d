"""Ops of the layers of networks: norms and convolutions."""
