"""Benchmarks and training tasks behind ``python -m throughtime``."""
