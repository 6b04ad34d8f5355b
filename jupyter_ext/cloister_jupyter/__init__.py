"""Cloister in notebooks: tiers side by side on a prompt, and a bundle's receipt as a table."""

from cloister_jupyter.lab import PromptLab
from cloister_jupyter.receipt import Receipt

__all__ = ["PromptLab", "Receipt"]
