"""Benchmarks by lm-eval, and the sandbox for generated programs."""
