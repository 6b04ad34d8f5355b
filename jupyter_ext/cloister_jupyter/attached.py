"""Files that a page was given, until they are asked about: in this process's memory only.

A page sends a file in messages of a part each, since a server ends connections over large ones:
`attach` with its `id`, `kind`, `data` in base64, and whether it is now `whole`; and `remove`. It is
sent `unattached` where a file is refused. Nothing here reads what a file holds: `Chat.answer` has
it decoded in a process of its own.
"""

from __future__ import annotations

import base64
import threading
from typing import TYPE_CHECKING, Any, Literal

from cloister.bundle import Bundle
from cloister.errors import BundleError, CloisterError, MediaTooLarge, SettingError
from cloister.parts import LIMIT_BYTES, Audio, Image
from cloister_jupyter.sent import Sent, read

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from pathlib import Path

__all__ = ["MOST", "Attached", "kinds_of"]

MOST = 8  # files at a time


class _Attach(Sent, frozen=True, tag="attach"):
    id: str
    kind: Literal["image", "audio"]
    data: str
    whole: bool


class _Remove(Sent, frozen=True, tag="remove"):
    ids: tuple[str, ...]


class Attached:
    """The files of a widget's pages, MOST at a time. Its repr shows nothing of them."""

    def __init__(self, send: Callable[[dict[str, str]], None]) -> None:
        """Tell pages by `send` of files that are refused."""
        self._send = send
        self._growing: dict[str, bytearray] = {}  # as far as they came
        self._files: dict[str, Image | Audio] = {}
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"Attached({len(self._files)} files)"

    def receive(self, content: Any) -> None:
        """Take a part of a file, or remove some. Of more than MOST files the oldest goes.

        Raises:
            SettingError: it is no such message.
        """
        sent = read(content, _Attach | _Remove)
        with self._lock:
            if isinstance(sent, _Remove):
                for id_ in sent.ids:
                    self._drop(id_)
                return
            try:
                self._take(sent)
            except CloisterError as error:
                self._drop(sent.id)
                self._send({"type": "unattached", "id": sent.id, "message": str(error)})

    def parts(self, ids: Sequence[str]) -> tuple[Image | Audio, ...]:
        """Return files in the order of `ids`.

        Raises:
            SettingError: one is not there, or not whole.
        """
        with self._lock:
            if not all(id_ in self._files for id_ in ids):
                raise SettingError("A file is no longer in the kernel; remove it and add it again.")
            return tuple(self._files[id_] for id_ in ids)

    def _take(self, sent: _Attach) -> None:
        held = [*self._files, *self._growing]
        if sent.id not in held and len(held) >= MOST:
            self._drop(held[0])
        data = self._growing.setdefault(sent.id, bytearray())
        try:
            data += base64.b64decode(sent.data, validate=True)
        except ValueError:
            raise SettingError("The page sent what is no file; load it anew.") from None
        if len(data) > LIMIT_BYTES:
            raise MediaTooLarge(
                f"A picture or recording is over {LIMIT_BYTES >> 20} MiB; give a smaller one.")
        if sent.whole:
            kind = Image if sent.kind == "image" else Audio
            self._files[sent.id] = kind(data=bytes(self._growing.pop(sent.id)))

    def _drop(self, id_: str) -> None:
        self._files.pop(id_, None)
        self._growing.pop(id_, None)


def kinds_of(bundles: Iterable[Path]) -> list[str]:
    """Return which kinds of file one of the bundles takes: image, audio."""
    found = set()
    for path in bundles:
        try:
            media = Bundle.open(path).manifest.media
        except BundleError:  # which is told when it is asked
            continue
        if media is not None:
            found |= {"image"} if media.picture is not None else set()
            found |= {"audio"} if media.recording is not None else set()
    return sorted(found, reverse=True)
