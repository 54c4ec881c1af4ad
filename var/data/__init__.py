"""Rows, sequences and the plan of micro-batches. No model is used here."""
