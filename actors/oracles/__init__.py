"""Oracles: what scores a finished sequence."""
