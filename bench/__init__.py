"""``python -m bench``: benchmarks and training tasks, in a checkout."""
