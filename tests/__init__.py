"""Tests: unit, property, integration, cluster, benchmarks; reference.py holds slow versions written like the papers."""
