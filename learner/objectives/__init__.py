"""Objectives: pure functions of tensors."""
