"""Where pictures and recordings stand in a prompt.

A chat template that goes through a list of parts writes the format's marker for each. To any other,
and where the format has no marker, a part is a mark among the text, which nobody can guess. Then
each is replaced by the texts that its format has around its vectors.
"""

from __future__ import annotations

import re
from itertools import count
from typing import TYPE_CHECKING

from cloister.errors import TokenizerError
from cloister.parts import Picture

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from cloister.parts import Content, Media
    from cloister.pieces import MediaFormats

__all__ = ["Placeholders"]


class Placeholders:
    """The places of the media of one conversation, in the order of its messages."""

    def __init__(
        self, media: Sequence[Media], formats: MediaFormats, *, mark: str, lists: bool,
    ) -> None:
        """Take all of `media`, for a template that goes through lists of parts, or does not.

        `mark` is a text in brackets that nobody can guess.

        Raises:
            UnsupportedMedia, MediaTooLarge: see `MediaFormats.layout`.
        """
        self._pieces = [formats.layout(part) for part in media]
        self._marks = [f"{mark[:-1]}:{number}]" for number in range(len(media))]
        # By number: what the template writes; None where it is given the mark.
        self._markers = [formats.of(part).marker or None if lists else None for part in media]
        self._kinds = ["image" if isinstance(part, Picture) else "audio" for part in media]
        self._numbers = count()

    def restart(self) -> None:
        """Begin again with the first message."""
        self._numbers = count()

    def content(
        self, content: Content, typed: Callable[[str], str]
    ) -> str | list[dict[str, str]]:
        """Return the next message's content as the template is given it, its texts by `typed`.

        A list where it has a part that the template writes itself.
        """
        items: list[dict[str, str]] = []
        for part in [content] if isinstance(content, str) else _joined(content):
            if isinstance(part, str):
                text = typed(part)
            else:
                number = next(self._numbers)
                if self._markers[number] is not None:
                    items.append({"type": self._kinds[number]})
                    continue
                text = self._marks[number]
            if items and items[-1]["type"] == "text":
                items[-1]["text"] += text
            else:
                items.append({"type": "text", "text": text})
        if all(item["type"] == "text" for item in items):
            return "".join(item["text"] for item in items)
        return items

    def fill(self, text: str, stand_in: str) -> tuple[str, dict[int, int]]:
        """Put the texts of each medium in its place, and `stand_in` where its vectors are.

        Return the text, and how many vectors each `stand_in` is for by where it begins.

        Raises:
            TokenizerError: the template left a medium out, or changed their order.
        """
        wanted = [marker or mark for marker, mark in zip(self._markers, self._marks, strict=True)]
        found = list(re.finditer("|".join(map(re.escape, wanted)), text)) if wanted else []
        if [match[0] for match in found] != wanted:
            raise TokenizerError(
                "The chat template does not write each picture and recording once, in their "
                "order; give them with the text of one message of the user, or correct it.")
        filled, vectors, end = "", dict[int, int](), 0
        for match, pieces in zip(found, self._pieces, strict=True):
            filled += text[end:match.start()]
            for piece in pieces:
                if isinstance(piece, int):
                    vectors[len(filled)] = piece
                    filled += stand_in
                else:
                    filled += piece
            end = match.end()
        return filled + text[end:], vectors


def _joined(parts: Sequence[str | Media]) -> list[str | Media]:
    """Return `parts`, texts that follow one another as one."""
    joined: list[str | Media] = []
    for part in parts:
        if isinstance(part, str) and joined and isinstance(joined[-1], str):
            joined[-1] += part
        else:
            joined.append(part)
    return joined
