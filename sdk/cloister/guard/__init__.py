"""Deny this process and its children the network. Standard library and ctypes only."""

from cloister.guard.network import Guard, close_inherited, enforce

__all__ = ["Guard", "close_inherited", "enforce"]
