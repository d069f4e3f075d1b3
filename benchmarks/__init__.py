"""Measurements: each runs as `python benchmarks/X.py`, and its results lie beside it."""
