"""Rewards: texts to numbers."""
