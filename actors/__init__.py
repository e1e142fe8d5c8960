"""Trajectories, environments, oracles, rollout workers, replay buffer: plain classes, usable without Ray."""
