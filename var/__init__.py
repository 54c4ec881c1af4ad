"""VAR: RLHF's optimum by supervised fine-tuning on reward-weighted responses (arXiv 2502.11026)."""
