"""Benchmarks: figures with a baseline of the same run beside them. Never part of the test suite's verdict."""
