"""Results of the benchmarks: rows of CSV files, charts, targets."""
