"""Helpers that know nothing about the project: errors, console, files, HTTP, statistics."""
