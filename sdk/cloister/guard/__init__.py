"""Deny this process and its children the network, and its memory to others.

Standard library and ctypes only.
"""

from cloister.guard.dumps import keep_out_of_dumps
from cloister.guard.network import Guard, close_inherited, enforce
from cloister.guard.probe import Attempt, probe

__all__ = ["Attempt", "Guard", "close_inherited", "enforce", "keep_out_of_dumps", "probe"]
