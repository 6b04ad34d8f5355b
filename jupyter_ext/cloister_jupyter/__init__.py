"""Cloister in notebooks: a bundle's receipt as a table in the cell."""

from cloister_jupyter.receipt import Receipt

__all__ = ["Receipt"]
