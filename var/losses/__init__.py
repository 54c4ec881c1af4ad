"""One objective per file: log-probabilities and a batch in, a scalar out."""
