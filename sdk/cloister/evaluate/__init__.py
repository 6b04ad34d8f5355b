"""Scores of a model, and its divergence from another, with standard errors."""
