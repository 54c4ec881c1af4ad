"""Text in, a number out."""
