"""Loggers that are built in: Weights & Biases, MLflow and Trackio."""
