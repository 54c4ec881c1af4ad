"""Packed tokens in, log-probabilities out; loading, adapters and export."""
