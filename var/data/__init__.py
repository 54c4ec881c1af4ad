"""Data: rows, their sequences of tokens, and the plan of batches. No model is loaded here."""
