"""Changes of weights: the optimizer, averages, an attack on them, and copies in half precision."""
