"""Cloister in notebooks: tiers side by side on a prompt, and a bundle's receipt in plots."""

from cloister_jupyter.lab import PromptLab
from cloister_jupyter.receipt import ReceiptView

__all__ = ["PromptLab", "ReceiptView"]
