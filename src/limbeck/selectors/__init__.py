"""Selectors: what counts, and how much."""
