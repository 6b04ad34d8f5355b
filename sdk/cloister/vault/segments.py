"""Segments: sealed files that are written once, for what is too large for the database."""

from __future__ import annotations

import os
import re
import secrets
from typing import TYPE_CHECKING

from cloister.errors import VaultDamaged
from cloister.files import sync
from cloister.vault.disk import check_private, private, write_failed
from cloister.vault.seal import PIECE_BYTES, InvalidTag, open_into, seal_parts, sealed_bytes

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator
    from io import FileIO
    from pathlib import Path

    from cloister.vault.seal import Buffer

__all__ = ["Segments"]

_NAME = re.compile(r"[0-9a-f]{32}(\.part)?")


class Segments:
    """The files of one directory. Which of them count is the database's to say."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def write(
        self, key: bytes, place: bytes, parts: Iterable[Buffer], *, durable: bool
    ) -> tuple[str, int]:
        """Seal `parts`, one after the other, into a new file; return its name, and their size.

        Raises:
            NotEnoughDisk: the disk is full; nothing is left behind.
            VaultError: the file cannot be written.
        """
        name = secrets.token_hex(16)
        part = self.directory / f"{name}.part"
        size = 0

        def counted() -> Iterable[Buffer]:
            nonlocal size
            for piece in parts:
                size += memoryview(piece).nbytes
                yield piece

        try:
            with open(part, "xb", buffering=0, opener=private) as file:
                for sealed in seal_parts(key, place, counted()):
                    while sealed:
                        sealed = sealed[file.write(sealed):]
                if durable:
                    os.fsync(file.fileno())
            part.rename(self.directory / name)
            if durable:
                sync(self.directory)
        except BaseException as error:
            part.unlink(missing_ok=True)
            if not isinstance(error, OSError):
                raise
            raise write_failed(error, "a segment of the vault") from None
        return name, size

    def read(self, name: str, key: bytes, place: bytes, size: int) -> bytearray:
        """Return the `size` bytes that were sealed into the file `name`.

        Raises:
            VaultDamaged: the file is missing, or not what was written for this place.
            VaultUnsafe: others can read or replace it.
        """
        path = self.directory / str(name)
        try:
            if not _NAME.fullmatch(path.name):  # somebody else's row
                raise InvalidTag
            with open(path, "rb", buffering=0, opener=private) as file:
                status = os.fstat(file.fileno())
                check_private(status, path)
                if status.st_size != sealed_bytes(size):
                    raise InvalidTag
                content = bytearray(size)
                # To zero whole pieces takes longer than all else of a small segment.
                pieces = _pieces(file, min(status.st_size, PIECE_BYTES))
                open_into(key, place, pieces, memoryview(content))
        except (OSError, InvalidTag):
            raise VaultDamaged(
                f"Segment {path.name!a} of the vault is not what was written; its content is made "
                "anew, or lost."
            ) from None
        return content

    def remove(self, name: str) -> None:
        """Delete a file that no row names any more."""
        (self.directory / name).unlink(missing_ok=True)

    def orphans(self, named: Collection[str]) -> list[str]:
        """Return the names of files that were begun here and that no row has `named`."""
        return [
            path.name for path in self.directory.iterdir()
            if _NAME.fullmatch(path.name) and path.name not in named
        ]


def _pieces(file: FileIO, size: int) -> Iterator[memoryview]:
    buffer = memoryview(bytearray(size))
    while count := file.readinto(buffer):
        yield buffer[:count]
