"""Cloister in notebooks: what a bundle is and what it lost, as a table in the cell."""

from cloister_jupyter.receipt import Receipt

__all__ = ["Receipt"]
