"""VAR: RLHF's optimum by supervised fine-tuning on reward-weighted responses (arXiv 2502.11026)."""

__version__ = "0.1.0"  # pyproject.toml reads it, and a checkout that is not installed has it too
