"""A picture becomes the encoder's pixels by the rules that are written down, or is refused."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image as Pillow
from tests.unit.media.files import chunk, formats, noise, png, saved
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

from cloister.errors import MediaTooLarge, MediaUnreadable
from cloister.media import Limits, read
from cloister.media.line import line
from cloister.parts import Image, Picture
from cloister.pieces import Fit, Resample

RESAMPLE = {Resample.BILINEAR: 2, Resample.BICUBIC: 3, Resample.LANCZOS: 1}  # as Pillow numbers


def array(picture: Picture) -> NDArray[np.uint8]:
    shape = (picture.tiles, 3, picture.height, picture.width)
    return np.frombuffer(picture.data, np.uint8).reshape(shape)


def as_it_is(data: bytes, **options: object) -> NDArray[np.uint8]:
    """Pixels uint8[H, W, 3] of a file, by a format of its own size."""
    width, height = Pillow.open(io.BytesIO(data)).size
    picture = read(Image(data=data), formats(height, width, **options))  # type: ignore[arg-type]
    return array(picture)[0].transpose(1, 2, 0)


@pytest.mark.parametrize("size", [(30, 50), (256, 256), (130, 257), (700, 90), (1, 400)])
@pytest.mark.parametrize("resample", [Resample.LANCZOS, Resample.BICUBIC])
def test_tiles_are_those_of_idefics3(size: tuple[int, int], resample: Resample) -> None:
    pixels = noise(*size)
    theirs = Idefics3ImageProcessorPil(
        size={"longest_edge": 256}, max_image_size={"longest_edge": 64}, do_rescale=False,
        do_normalize=False, do_pad=False, resample=RESAMPLE[resample], return_row_col_info=True,
    )(images=[Pillow.fromarray(pixels)], return_tensors="np")
    ours = read(Image.of(pixels), formats(64, 64, Fit.TILES, resample, tiles=256))
    assert ours.grid == (theirs["rows"][0][0], theirs["cols"][0][0])
    assert np.array_equal(array(ours), np.asarray(theirs["pixel_values"])[0])


@pytest.mark.parametrize(("edge", "grid"), [(64, (0, 0)), (65, (2, 2)), (5000, (64, 64))])
def test_the_longest_edge_decides_on_the_number_of_tiles(edge: int, grid: tuple[int, int]) -> None:
    picture = read(Image.of(noise(40, 40)), formats(64, 64, Fit.TILES, tiles=edge))
    assert picture.grid == grid
    assert len(picture.data) == picture.tiles * 3 * 64 * 64


@pytest.mark.parametrize("size", [(30, 50), (300, 20), (64, 64)])
def test_a_stretched_picture_is_that_of_gemma3(size: tuple[int, int]) -> None:
    pixels = noise(*size)
    theirs = Gemma3ImageProcessorPil(
        size={"height": 64, "width": 64}, do_rescale=False, do_normalize=False,
    )(images=[Pillow.fromarray(pixels)], return_tensors="np")["pixel_values"]
    ours = read(Image.of(pixels), formats(64, 64, Fit.STRETCH, Resample.BILINEAR))
    assert np.array_equal(array(ours), theirs)


def test_a_padded_picture_keeps_its_proportions_at_the_upper_left() -> None:
    pixels = np.full((10, 40, 3), 7, np.uint8)
    found = array(read(Image.of(pixels), formats(32, 48, Fit.PAD, fill=(1, 2, 3))))[0]
    assert (found[:, :12] == 7).all()
    assert (found[:, 12:] == np.array([1, 2, 3])[:, None, None]).all()


def test_a_line_of_text_is_made_even_and_filled_up_on_the_right() -> None:
    pixels = noise(64, 200)
    found = array(read(Image.of(pixels), formats(32, 512, Fit.LINE)))[0]
    even = np.asarray(line(Pillow.fromarray(pixels), 32, 512))
    assert even.shape == (32, 100)
    assert (found[:, :, :100] == even).all()
    assert (found[:, :, 100:] == 255).all()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_a_picture_is_turned_as_exif_says(orientation: int, kind: str) -> None:
    exif = Pillow.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if kind == "WEBP" else {"quality": 100, "subsampling": 0}
    upright = np.zeros((8, 16, 3), np.uint8)
    upright[:, :8, 0], upright[:4, :, 1] = 255, 255  # four corners of four colours
    undo = {1: lambda a: a, 2: lambda a: a[:, ::-1], 3: lambda a: a[::-1, ::-1],
            4: lambda a: a[::-1], 5: lambda a: a.swapaxes(0, 1),
            6: lambda a: a[:, ::-1].swapaxes(0, 1), 7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
            8: lambda a: a[::-1].swapaxes(0, 1)}[orientation]
    stored = Pillow.fromarray(np.ascontiguousarray(undo(upright)))
    data = saved(stored, kind, exif=exif, **options)
    found = array(read(Image(data=data), formats(8, 16)))[0].transpose(1, 2, 0)
    assert np.abs(found.astype(int) - upright).max() < 12


def test_exif_that_cannot_be_read_turns_nothing() -> None:
    image = Pillow.fromarray(noise(8, 16))
    data = saved(image, exif=b"Exif\0\0II*\0\xff\xff\xff\x7f" + b"\xff" * 40)
    assert np.array_equal(as_it_is(data), np.asarray(image))


def test_sixteen_bits_of_grey_are_rounded_and_not_clipped() -> None:
    values = np.arange(65536, dtype="<u2").reshape(256, 256)
    data = saved(Pillow.frombytes("I;16", (256, 256), values.tobytes()))
    expected = np.floor(values / 257 + 0.5)
    assert all(np.array_equal(as_it_is(data)[..., channel], expected) for channel in range(3))


def test_sixteen_bits_of_a_colour_are_at_most_one_off() -> None:
    values = np.random.default_rng(0).integers(0, 65536, (4, 4, 3), np.uint16)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    found = as_it_is(png(4, 4, 16, 2, rows))
    assert np.abs(found - values / 257).max() <= 1


def test_a_grey_a_palette_and_a_cmyk_picture_become_colours() -> None:
    image = Pillow.fromarray(noise(8, 8))
    grey, palette = image.convert("L"), image.quantize(16)
    assert np.array_equal(as_it_is(saved(grey)), np.asarray(grey.convert("RGB")))
    assert np.array_equal(as_it_is(saved(palette)), np.asarray(palette.convert("RGB")))
    data = saved(Pillow.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=100)
    assert np.abs(as_it_is(data).astype(int) - [255, 0, 0]).max() <= 3


def test_what_is_transparent_shows_the_fill_colour() -> None:
    pixels = noise(8, 8, 4)
    expected = pixels[..., :3] * (pixels[..., 3:] / 255) + np.array([10, 20, 30]) * (
        1 - pixels[..., 3:] / 255)
    for kind, options in (("PNG", {}), ("WEBP", {"lossless": True, "exact": True})):
        data = saved(Pillow.fromarray(pixels), kind, **options)
        assert np.abs(as_it_is(data, fill=(10, 20, 30)) - expected).max() <= 1


KEYED = {  # a pixel of the colour that stands for transparency, and one of another
    "one bit": png(2, 1, 1, 0, b"\0\x80", chunk(b"tRNS", struct.pack(">H", 1))),
    "two bits": png(2, 1, 2, 0, b"\0\x60", chunk(b"tRNS", struct.pack(">H", 1))),
    "grey": png(2, 1, 8, 0, b"\0\x05\x06", chunk(b"tRNS", struct.pack(">H", 5))),
    "sixteen bits of grey": png(
        2, 1, 16, 0, b"\0" + struct.pack(">2H", 1000, 40000),
        chunk(b"tRNS", struct.pack(">H", 1000))),
    "colours": png(2, 1, 8, 2, b"\0\1\2\3\4\5\6", chunk(b"tRNS", struct.pack(">3H", 1, 2, 3))),
    "sixteen bits of colours": png(
        2, 1, 16, 2, b"\0" + struct.pack(">6H", 1000, 40000, 7, 1, 2, 3),
        chunk(b"tRNS", struct.pack(">3H", 1000, 40000, 7))),
    "palette": png(
        2, 1, 8, 3, b"\0\0\1", chunk(b"PLTE", bytes(range(6))) + chunk(b"tRNS", b"\0")),
}


@pytest.mark.parametrize("kind", KEYED)
def test_the_colour_that_stands_for_transparency_shows_the_fill_colour(kind: str) -> None:
    found = as_it_is(KEYED[kind], fill=(200, 100, 50))
    assert found[0, 0].tolist() == [200, 100, 50]
    assert found[0, 1].tolist() != [200, 100, 50]


def test_a_file_of_several_views_gives_the_first() -> None:
    first, second = (Pillow.fromarray(noise(8, 8, seed=seed)) for seed in (1, 2))
    data = saved(first, "MPO", save_all=True, append_images=[second], quality=100)
    assert np.array_equal(as_it_is(data), as_it_is(saved(first, "JPEG", quality=100)))


@pytest.mark.parametrize("size", [(60000, 1), (1, 60000)])
@pytest.mark.parametrize("fit", list(Fit))
def test_a_picture_of_one_line_is_read(size: tuple[int, int], fit: Fit) -> None:
    data = saved(Pillow.new("RGB", size, (9, 8, 7)))
    found = array(read(Image(data=data), formats(
        64, 64, fit, tiles=128 if fit is Fit.TILES else None)))
    if fit not in (Fit.PAD, Fit.LINE):
        assert (found == np.array([9, 8, 7])[:, None, None]).all()


def test_a_text_that_unpacks_to_a_hundred_megabytes_is_refused() -> None:
    packed = chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(100 << 20)))
    with pytest.raises(MediaUnreadable, match="damaged"):
        read(Image(data=png(1, 1, 8, 0, b"\0\0", packed)), formats())


FRAMES = [Pillow.fromarray(noise(8, 8, seed=seed)) for seed in range(3)]
WHOLE = {kind: saved(Pillow.fromarray(noise(64, 64)), kind) for kind in ("PNG", "JPEG", "WEBP")}
REFUSED = {
    "zero width": (png(0, 5, 8, 0, b""), "no pixels"),
    "zero height": (png(5, 0, 8, 0, b""), "no pixels"),
    "animated PNG": (saved(FRAMES[0], save_all=True, append_images=FRAMES[1:]), "of 3 frames"),
    "animated WebP": (
        saved(FRAMES[0], "WEBP", save_all=True, append_images=FRAMES[1:]), "of 3 frames"),
    "SVG": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "no PNG, JPEG or WebP"),
    "PDF": (b"%PDF-1.7\n" + bytes(100), "no PNG, JPEG or WebP"),
    "GIF": (saved(FRAMES[0], "GIF"), "no PNG, JPEG or WebP"),
    "TIFF": (saved(FRAMES[0], "TIFF"), "no PNG, JPEG or WebP"),
    "nothing": (b"", "no PNG, JPEG or WebP"),
    "one byte": (b"\x89", "no PNG, JPEG or WebP"),
    **{f"truncated {kind}": (data[:len(data) // 2], "damaged or ends early")
       for kind, data in WHOLE.items()},
    **{f"head of a {kind}": (data[:40], "damaged or ends early") for kind, data in WHOLE.items()},
    "wrong checksum": (
        WHOLE["PNG"].replace(WHOLE["PNG"][29:33], b"\0\0\0\0"), "damaged or ends early"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_whole_still_picture_is_refused_by_name(name: str) -> None:
    data, why = REFUSED[name]
    with pytest.raises(MediaUnreadable, match=why):
        read(Image(data=data), formats())


def test_pixels_that_are_fewer_than_their_size_are_refused() -> None:
    with pytest.raises(MediaUnreadable, match="damaged"):
        read(Image(data=bytes(11), size=(2, 2)), formats())
    with pytest.raises(MediaUnreadable, match="no pixels"):
        read(Image(data=b"", size=(0, 2)), formats())


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_too_many_pixels_are_refused_with_the_numbers(kind: str) -> None:
    data = saved(Pillow.new("RGB", (300, 200)), kind)
    assert read(Image(data=data), formats(), limits=Limits(pixels=60000)).tiles == 1
    with pytest.raises(MediaTooLarge, match=r"300 x 200 pixels, and at most 59999"):
        read(Image(data=data), formats(), limits=Limits(pixels=59999))


def test_more_tiles_than_are_taken_are_refused_with_the_numbers() -> None:
    few = Limits(result_bytes=3 * 64 * 64 * 16)
    with pytest.raises(MediaTooLarge, match=f"{17 * 3 * 64 * 64} bytes, and at most"):
        read(Image.of(noise(9, 9)), formats(64, 64, Fit.TILES, tiles=256), limits=few)


