"""Errors, files, console, statistics and HTTP, used everywhere."""
