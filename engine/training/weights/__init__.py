"""How weights change: the optimizer, their averages, an attack on them, and their copies in half precision."""
