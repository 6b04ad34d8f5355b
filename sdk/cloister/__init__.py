"""Private language models on the device.

The names here are loaded when they are first used, so that `import cloister` brings no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cloister.bundle import Bundle
    from cloister.errors import CloisterError
    from cloister.message import Message
    from cloister.model.checkpoint import Checkpoint
    from cloister.pipeline import export
    from cloister.quantize.apply import quantize
    from cloister.runtime.chat import Chat, Sampling, Token
    from cloister.runtime.client import Worker
    from cloister.runtime.engine import Engine
    from cloister.runtime.session import Session
    from cloister.tiers import Tier

__all__ = [
    "Bundle",
    "Chat",
    "Checkpoint",
    "CloisterError",
    "Engine",
    "Message",
    "Sampling",
    "Session",
    "Tier",
    "Token",
    "Worker",
    "export",
    "quantize",
]

_HOMES = {
    "Bundle": "bundle", "Chat": "runtime.chat", "Checkpoint": "model.checkpoint",
    "CloisterError": "errors", "Engine": "runtime.engine", "Message": "message",
    "Sampling": "runtime.chat", "Session": "runtime.session", "Tier": "tiers",
    "Token": "runtime.chat", "Worker": "runtime.client", "export": "pipeline",
    "quantize": "quantize.apply",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'cloister' has no attribute {name!r}")
    return getattr(importlib.import_module(f"cloister.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
