"""Training steps that are timed: by a textbook, by an expert, by the engine."""
