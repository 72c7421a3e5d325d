"""Single calls that are timed: ops, matrix products, convolutions, BatchNorms."""
