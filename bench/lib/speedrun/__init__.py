"""Robust speedrun: its rules, recipes, costs, runs and records."""
