"""Measuring contestants of an operation: verified first, then timed in turns."""
