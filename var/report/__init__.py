"""Compare runs and evaluations: read their folders, and write tables, figures and pages."""
