"""What pages send, read strictly."""

from __future__ import annotations

from typing import Any

import msgspec

from cloister.errors import SettingError

__all__ = ["Sent", "read"]


class Sent(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="type"
):
    """A message of a page; its repr shows no text."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


def read(content: object, kind: Any) -> Any:
    """Return a message as one of `kind`.

    Raises:
        SettingError: it is none.
    """
    try:
        return msgspec.convert(content, kind)
    except msgspec.ValidationError:  # its words may quote what was typed
        raise SettingError("A setting is not of its kind; correct the numbers.") from None
