"""The process that decodes one file, and ends; `process` starts it."""

from __future__ import annotations

import os
import sys
import warnings
from typing import TYPE_CHECKING

import msgspec

from cloister.media.confinement import confine
from cloister.media.exchange import READY, Answer, Code, Refused, Request
from cloister.pieces import Fit

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["main"]


def main() -> None:
    """Decode what comes on the standard input, and answer on the standard output."""
    warnings.simplefilter("ignore")  # their words go nowhere, and would be looked up in files
    request = msgspec.json.decode(sys.stdin.buffer.readline(), type=Request)
    decode = _decoder(request)
    confine(request.limits)
    _say(READY)
    _say(_answer(decode, request).pack())
    os._exit(0)


def _decoder(request: Request) -> Callable[[Request, bytes], Answer]:
    """Import what the kind of file needs: nothing can be opened later."""
    if request.picture is not None:
        from cloister.media import pictures

        if request.picture.fit is Fit.LINE:
            from cloister.media import note  # noqa: F401  # by far the longest to import
        return pictures.decode
    from cloister.media import recordings

    return recordings.decode


def _answer(decode: Callable[[Request, bytes], Answer], request: Request) -> Answer:
    try:
        return decode(request, sys.stdin.buffer.read())
    except Refused as refused:
        return refused.answer
    except MemoryError:
        return Answer(code=Code.MEMORY)
    except ImportError:  # ours to mend: a module that was not imported in time
        raise
    except Exception:  # decoders raise what they like of a damaged file
        return Answer(code=Code.DAMAGED)


def _say(data: bytes) -> None:
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()
