"""Deny this process and its children the network. Standard library and ctypes only."""

from cloister.guard.network import Guard, close_inherited, enforce
from cloister.guard.probe import Attempt, probe

__all__ = ["Attempt", "Guard", "close_inherited", "enforce", "probe"]
