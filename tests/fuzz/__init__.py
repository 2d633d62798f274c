"""Calls of the package, valid and malformed, from seeds, in processes that may die of them."""
