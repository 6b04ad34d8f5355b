"""Private language models on the device.

The names here are loaded when they are first used, so that `import cloister` brings no torch.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cloister.bundle import Bundle
    from cloister.corpus import Example
    from cloister.distill.run import DistillSettings, distill
    from cloister.distill.schedule import Schedule
    from cloister.errors import CloisterError
    from cloister.evaluate.run import evaluate
    from cloister.message import Message
    from cloister.model.checkpoint import Checkpoint
    from cloister.model.imports import import_model
    from cloister.parts import Audio, Image
    from cloister.pipeline import export
    from cloister.quantize.apply import quantize
    from cloister.quantize.train import QatSettings
    from cloister.runtime.chat import Chat, Sampling, Token
    from cloister.runtime.client import Worker
    from cloister.runtime.engine import Engine
    from cloister.runtime.session import Session
    from cloister.tiers import Tier
    from cloister.vault.local import open_vault

__all__ = [
    "Audio",
    "Bundle",
    "Chat",
    "Checkpoint",
    "CloisterError",
    "DistillSettings",
    "Engine",
    "Example",
    "Image",
    "Message",
    "QatSettings",
    "Sampling",
    "Schedule",
    "Session",
    "Tier",
    "Token",
    "Worker",
    "distill",
    "evaluate",
    "export",
    "import_model",
    "open_vault",
    "quantize",
]

_HOMES = {
    "Audio": "parts",
    "Bundle": "bundle",
    "Chat": "runtime.chat",
    "Checkpoint": "model.checkpoint",
    "CloisterError": "errors",
    "DistillSettings": "distill.run",
    "Engine": "runtime.engine",
    "Example": "corpus",
    "Image": "parts",
    "Message": "message",
    "QatSettings": "quantize.train",
    "Sampling": "runtime.chat",
    "Schedule": "distill.schedule",
    "Session": "runtime.session",
    "Tier": "tiers",
    "Token": "runtime.chat",
    "Worker": "runtime.client",
    "distill": "distill.run",
    "evaluate": "evaluate.run",
    "export": "pipeline",
    "import_model": "model.imports",
    "open_vault": "vault.local",
    "quantize": "quantize.apply",
}


class _Face(ModuleType):
    """This module. A function keeps its name where a package of ours has the same one.

    The import system binds every package to its parent: `cloister.distill` would be the function
    before, and the package after, the first use of either.
    """

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Face


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'cloister' has no attribute {name!r}")
    return getattr(importlib.import_module(f"cloister.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
