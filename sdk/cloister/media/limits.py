"""How much a file may ask for before it is refused."""

from __future__ import annotations

from cloister.errors import SettingError
from cloister.records import Record, Whole

__all__ = ["Limits"]


class Limits(Record, frozen=True):
    """Bounds of one picture or recording, whatever it says of itself.

    Raises:
        SettingError: a bound is not above 0.
    """

    pixels: Whole = 1 << 24  # of the picture as it is stored; 16 megapixels
    samples: Whole = 1 << 24  # of all channels, as stored, and at the rate that it is converted to
    result_bytes: Whole = 64 << 20  # of all tiles of a picture, or of all samples
    lines: Whole = 16  # of a note
    memory_bytes: Whole = 512 << 20  # that decoding may take
    seconds: Whole = 20  # from the start of the process

    def __post_init__(self) -> None:
        for name in self.__struct_fields__:
            if getattr(self, name) < 1:
                raise SettingError(f"{name} is {getattr(self, name)}; it must be at least 1.")
