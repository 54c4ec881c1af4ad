"""Responses to prompts that did not train, and what is measured on them."""
