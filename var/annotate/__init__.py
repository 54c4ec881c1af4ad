"""One requirement of a loss per file: compute it, keep it in the cache, put it on the batch."""
