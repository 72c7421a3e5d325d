"""A training step and what surrounds it: passes, loss, optimizer, schedule, averages, measurements."""
