"""Adapters of data sets: each converts its records to rows."""
