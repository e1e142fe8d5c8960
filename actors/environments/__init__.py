"""Environments: what states are, what noise does, how a finished state reads."""
