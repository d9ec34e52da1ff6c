"""Benchmarks: `python -m benchmarks run` on a GPU, `python -m benchmarks report` to publish its figures."""
