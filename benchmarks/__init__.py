"""Benchmarks, run from a checkout: `python -m benchmarks.ops`, `python -m benchmarks.gpu`."""
