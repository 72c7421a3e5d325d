"""Readers of data sets: folders, archives, .beton files, and the published ones."""
