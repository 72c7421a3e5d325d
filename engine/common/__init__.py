"""Modules that need nothing else of the engine: files, names, errors, signals, the terminal."""
