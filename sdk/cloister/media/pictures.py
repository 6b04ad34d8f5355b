"""Make an encoder's pixels of what a picture's file holds.

PNG, JPEG and WebP are read by Pillow, told by their first bytes. The orientation that EXIF (or XMP)
names is applied; one that cannot be read is none. Grey, palette and CMYK become red, green and blue
as Pillow converts them: a colour profile is not applied. Transparency is laid over the format's
`fill` colour. Of 16 bits a channel become 8: grey is divided by 257 and rounded, not clipped; of
colours Pillow keeps the upper byte, which is at most 1 off. Of a file with several views (MPO) the
first is read; an animation is refused. Pictures are resized by Pillow's filters on 8-bit channels,
as the image processors of transformers do.
"""

from __future__ import annotations

import contextlib
import io
import math
import struct
from typing import TYPE_CHECKING

# Pillow imports the one for TIFF when it first reads EXIF: too late.
from PIL import (
    Image,
    ImageFile,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

from cloister.media.exchange import Answer, Code, Refused
from cloister.media.line import line
from cloister.pieces import Fit

if TYPE_CHECKING:
    from cloister.media.exchange import Request
    from cloister.media.limits import Limits
    from cloister.pieces import PictureFormat

__all__ = ["decode"]

_READS_EXIF = TiffImagePlugin
_PNG = b"\x89PNG\r\n\x1a\n"
_ORIENTATION = 0x0112  # of EXIF: what was done to the picture, to be undone
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_90,
}
_MOST_EDGE = 4096  # of a picture that is cut into tiles: Idefics 3's own bound


def decode(request: Request, data: bytes) -> Answer:
    """Return the pixels of an answer, uint8[tiles, 3, height, width].

    Raises:
        Refused: the file is not decoded, and why.
    """
    format_ = request.picture
    assert format_ is not None
    if request.size is not None:
        height, width = request.size
        _check_size(width, height, request.limits)
        picture = Image.frombytes("RGB", (width, height), data)
    else:
        picture = _coloured(_upright(_opened(data, request.limits)), data, format_.fill)
    grid, tiles = _fitted(picture, format_, request.limits)
    return Answer(code=Code.DONE, counts=grid, data=b"".join(map(_planes, tiles)))


def _opened(data: bytes, limits: Limits) -> Image.Image:
    """Read the header, refuse what is out of bounds, and decode."""
    if announced := _announced(data):
        _check_size(*announced, limits)
    image: ImageFile.ImageFile
    file = io.BytesIO(data)
    if data.startswith(_PNG):
        image = PngImagePlugin.PngImageFile(file)
    elif data.startswith(b"\xff\xd8\xff"):
        image = JpegImagePlugin.JpegImageFile(file)
    elif data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        image = WebPImagePlugin.WebPImageFile(file)
    else:
        raise Refused(Code.UNKNOWN)
    _check_size(*image.size, limits)
    frames = getattr(image, "n_frames", 1)
    if frames > 1:
        raise Refused(Code.ANIMATED, frames)
    image.load()
    return image


def _announced(data: bytes) -> tuple[int, int] | None:
    """Return the width and height that a PNG or WebP begins with.

    Pillow refuses a picture of zero width like any other damage, and libwebp allocates the whole
    canvas before it tells its size.
    """
    if len(data) < 30:
        return None
    if data.startswith(_PNG):
        width, height = struct.unpack_from(">II", data, 16)
        return width, height
    if data[8:16] == b"WEBPVP8X":
        return tuple(  # type: ignore[return-value]
            int.from_bytes(data[place:place + 3], "little") + 1 for place in (24, 27))
    if data[8:16] == b"WEBPVP8L":
        bits = int.from_bytes(data[21:25], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    return None


def _check_size(width: int, height: int, limits: Limits) -> None:
    if min(width, height) < 1:
        raise Refused(Code.EMPTY)
    if width * height > limits.pixels:
        raise Refused(Code.PIXELS, width, height)


def _upright(image: Image.Image) -> Image.Image:
    turn = None
    with contextlib.suppress(Exception):  # EXIF is damaged in more ways than can be named
        turn = _TURNS.get(image.getexif()[_ORIENTATION])
    return image if turn is None else image.transpose(turn)


def _coloured(image: Image.Image, data: bytes, fill: tuple[int, int, int]) -> Image.Image:
    """Return it in red, green and blue of 8 bits, laid over `fill` where it is transparent."""
    depth = data[24] if data.startswith(_PNG) else 8
    key = image.info.get("transparency")
    if image.mode.startswith("I;16"):
        wide = image.convert("I")
        image = wide.point([(value + 128) // 257 for value in range(65536)], "L")
        if key is not None:
            image.putalpha(wide.point([255 * (value != key) for value in range(65536)], "L"))
    elif isinstance(key, tuple) and depth == 16:  # the file's, which has 16 bits
        image.info["transparency"] = tuple(value >> 8 for value in key)
    elif isinstance(key, int) and image.mode == "L" and depth in (2, 4):
        image.info["transparency"] = key * 255 // (2**depth - 1)
    if "transparency" not in image.info and image.mode not in ("LA", "PA", "RGBA"):
        return image.convert("RGB")
    image = image.convert("RGBA")
    below = Image.new("RGB", image.size, fill)
    below.paste(image, mask=image.getchannel("A"))
    return below


def _fitted(
    picture: Image.Image, format_: PictureFormat, limits: Limits
) -> tuple[tuple[int, int], list[Image.Image]]:
    """Return the counts of an answer, and the pictures of the encoder's size."""
    width, height = format_.width, format_.height
    resample = Image.Resampling[format_.resample.name]
    _check_result(1, format_, limits)
    if format_.fit is Fit.TILES:
        return _tiled(picture, format_, limits)
    if format_.fit is Fit.STRETCH:
        return (0, 0), [picture.resize((width, height), resample)]
    if format_.fit is Fit.LINE:
        return _lines(picture, format_, limits)
    padded = Image.new("RGB", (width, height), format_.fill)
    scale = min(width / picture.width, height / picture.height)
    size = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
    padded.paste(picture.resize(size, resample))
    return (0, 0), [padded]


def _lines(
    picture: Image.Image, format_: PictureFormat, limits: Limits
) -> tuple[tuple[int, int], list[Image.Image]]:
    from cloister.media import note  # which imports numpy; see `child`

    found = note.lines(picture, limits.lines)
    _check_result(len(found), format_, limits)
    tiles = []
    for each in found:
        tile = Image.new("RGB", (format_.width, format_.height), format_.fill)
        tile.paste(line(each, format_.height, format_.width))
        tiles.append(tile)
    return (len(found), 0), tiles


def _tiled(
    picture: Image.Image, format_: PictureFormat, limits: Limits
) -> tuple[tuple[int, int], list[Image.Image]]:
    """Cut as Idefics 3 does: in one size first, then in multiples of a tile, each resized anew."""
    assert format_.tiles is not None
    width, height = format_.width, format_.height
    resample = Image.Resampling[format_.resample.name]
    size = _longest_edge(picture.size, format_.tiles.longest_edge)
    columns, rows = _tiles_of(size, (width, height))
    _check_result(rows * columns + 1, format_, limits)
    picture = picture.resize(size, resample).resize((columns * width, rows * height), resample)
    if rows * columns == 1:
        return (0, 0), [picture]
    corners = [(column * width, row * height) for row in range(rows) for column in range(columns)]
    tiles = [picture.crop((x, y, x + width, y + height)) for x, y in corners]
    return (rows, columns), [*tiles, picture.resize((width, height), resample)]


def _longest_edge(size: tuple[int, int], edge: int) -> tuple[int, int]:
    """Return width and height with the longer one of `edge`, the other one made even."""
    width, height = size
    ratio = width / height
    if width >= height:
        width, height = edge, int(edge / ratio)
        height += height % 2
    else:
        width, height = int(edge * ratio), edge
        width += width % 2
    width, height = max(width, 1), max(height, 1)
    ratio = width / height
    if width >= height and width > _MOST_EDGE:
        width, height = _MOST_EDGE, int(_MOST_EDGE / ratio)
    elif height > _MOST_EDGE:
        width, height = int(_MOST_EDGE * ratio), _MOST_EDGE
    return max(width, 1), max(height, 1)


def _tiles_of(size: tuple[int, int], tile: tuple[int, int]) -> tuple[int, int]:
    """Return the numbers of columns and rows: the longer edge's first, the other one's by it."""
    width, height = size
    ratio = width / height
    if width >= height:
        columns = math.ceil(width / tile[0])
        return columns, max(1, math.ceil(int(columns * tile[0] / ratio) / tile[1]))
    rows = math.ceil(height / tile[1])
    return max(1, math.ceil(int(rows * tile[1] * ratio) / tile[0])), rows


def _check_result(tiles: int, format_: PictureFormat, limits: Limits) -> None:
    size = tiles * 3 * format_.height * format_.width
    if size > limits.result_bytes:
        raise Refused(Code.RESULT, size)


def _planes(picture: Image.Image) -> bytes:
    """Return uint8[3, height, width]."""
    return b"".join(channel.tobytes() for channel in picture.split())
