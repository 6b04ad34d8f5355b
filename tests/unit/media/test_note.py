"""A picture of a note becomes one picture a line, and one of a line stays what it is."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image as Pillow
from PIL import ImageDraw, ImageFilter, ImageOps
from tests.unit.media.files import formats, noise, saved

from cloister.errors import MediaTooLarge
from cloister.media import Limits, note, read
from cloister.media.exchange import Refused
from cloister.media.line import line
from cloister.parts import Image, one_by_one
from cloister.pieces import Fit

FORMATS = formats(32, 512, Fit.LINE)
TEXTS = ("Call Ana at 6 pm", "buy milk, eggs", "5", "Tel. 0326 847 399", "ok", "Regards, Jo")


def written(*texts: str, size: int = 26, pitch: float = 1.4) -> Pillow.Image:
    image = Pillow.new("L", (16 * size, round((len(texts) * pitch + 1) * size)), 235)
    for number, text in enumerate(texts):
        ImageDraw.Draw(image).text(
            (size, (number * pitch + 0.5) * size), text, fill=40, font_size=size)
    return image


def on_paper(
    size: tuple[int, int], count: int, pitch: int, top: int | None = None, gap: int = 0,
) -> Pillow.Image:
    """Lines on a large page, in its middle or from `top` on; `gap` is before the second half."""
    image = Pillow.new("L", size, 235)
    top = (size[1] - count * pitch) // 2 if top is None else top
    for number in range(count):
        y = top + number * pitch + (gap if number >= count / 2 else 0)
        ImageDraw.Draw(image).text(
            (size[0] // 10, y), TEXTS[number % 2], fill=40, font_size=pitch / 1.4)
    return image


def bricks(width: int, height: int, pitch: int) -> Pillow.Image:
    image = Pillow.fromarray(noise(height // 8, width // 8).mean(axis=2).astype(np.uint8) // 2)
    image = image.resize((width, height))
    for y in range(0, height, pitch):
        ImageDraw.Draw(image).rectangle((0, y, width, y + pitch // 3), fill=200)
    return image


def cut(image: Pillow.Image) -> list[Pillow.Image]:
    return note.lines(image, 16)


def grey(image: Pillow.Image, seed: int = 0) -> Pillow.Image:
    """Paper of two shades under a lamp at the left, as a sensor sees it."""
    height, width = image.size[::-1]
    rng = np.random.default_rng(seed)
    light_HW = np.linspace(1, 0.55, width) * np.where(np.arange(width) > 0.7 * width, 0.6, 1)
    seen_HW = np.asarray(image) * light_HW + rng.normal(0, 8, (height, width))
    return Pillow.fromarray(seen_HW.clip(0, 255).astype(np.uint8))


def rows_of_ink(image: Pillow.Image) -> float:
    """The share of the rows that have ink."""
    return float((np.asarray(image) < 120).any(axis=1).mean())


@pytest.mark.parametrize("count", range(2, 7))
@pytest.mark.parametrize("size", [16, 26, 90])
def test_a_note_has_as_many_pictures_as_lines(count: int, size: int) -> None:
    texts = TEXTS[-count:]
    found = cut(written(*texts, size=size))
    assert len(found) == count
    for each in found:
        assert each.height < 1.4 * size
        assert rows_of_ink(each) > 0.3


def test_each_picture_has_its_own_line_and_nothing_of_the_next() -> None:
    alone = [written(*("" if text != each else each for text in TEXTS)) for each in TEXTS]
    found = cut(written(*TEXTS))
    assert len(found) == len(TEXTS)
    for picture, only in zip(found, alone, strict=True):
        dark = int((np.asarray(only) < 120).sum())
        assert dark == int((np.asarray(picture) < 120).sum())


@pytest.mark.parametrize("change", [
    grey, ImageOps.invert, lambda image: grey(ImageOps.invert(image)),
    lambda image: image.filter(ImageFilter.GaussianBlur(2)),
    lambda image: image.convert("RGB"),
], ids=["shadow and noise", "light on dark", "light on dark in a shadow", "blur", "colours"])
def test_light_and_paper_do_not_change_the_number(change) -> None:  # type: ignore[no-untyped-def]
    assert len(cut(change(written(*TEXTS)))) == len(TEXTS)
    assert len(cut(change(written(TEXTS[0])))) == 1


@pytest.mark.parametrize("degrees", [-3, -1.5, 0.5, 3])
def test_a_tilted_note_is_made_level(degrees: float) -> None:
    tilted = written(*TEXTS[:4]).rotate(
        degrees, Pillow.Resampling.BICUBIC, expand=True, fillcolor=235)
    found = cut(tilted)
    assert len(found) == 4
    assert all(each.height < 1.4 * 26 for each in found)  # of a tilted line it would be more


def test_lines_that_fan_out_are_made_level() -> None:
    image = written(*TEXTS)
    width, height = image.size
    corners = (0, 0, 0, height, width, 0.96 * height, width, 0.04 * height)
    seen = image.transform(image.size, Pillow.Transform.QUAD, corners, fillcolor=235)
    assert len(cut(seen)) == len(TEXTS)


@pytest.mark.parametrize("text", [
    "i", "iiiii", "jÄÖÜ", "Will it rain in Rome tomorrow?", "-", "gypq", "HELLO", ""])
@pytest.mark.parametrize("size", [16, 26, 90])
def test_a_line_stays_the_picture_that_it_is(text: str, size: int) -> None:
    for image in (written(text, size=size), grey(written(text, size=size))):
        assert cut(image) == [image]


def test_edges_of_the_lines_above_and_below_are_no_lines() -> None:
    image = written(*TEXTS[:2], TEXTS[3])
    middle = round(1.9 * 26)
    edges = image.crop((0, middle - 10, image.width, middle + round(1.4 * 26)))
    assert cut(edges) == [edges]


@pytest.mark.parametrize("size", [(1, 1), (1, 9000), (9000, 1), (40, 35), (20, 400), (64, 64)])
def test_what_has_no_text_is_one_picture(size: tuple[int, int]) -> None:
    for image in (Pillow.new("RGB", size), Pillow.fromarray(noise(size[1], size[0]))):
        assert cut(image) == [image]


def test_a_note_is_read_as_tiles_that_each_are_a_line() -> None:
    image = grey(written(*TEXTS))
    picture = read(Image(data=saved(image)), FORMATS)
    assert (picture.lines, picture.tiles, picture.grid) == (6, 6, (0, 0))
    assert picture.label == "picture of 6 lines"
    for part, each in zip(one_by_one([picture]), cut(image), strict=True):
        even_HW = np.asarray(line(each, 32, 512))
        tile_3HW = np.frombuffer(part.data, np.uint8).reshape(3, 32, 512)
        assert (tile_3HW[:, :, :even_HW.shape[1]] == even_HW).all()
        assert (tile_3HW[:, :, even_HW.shape[1]:] == 255).all()


def test_a_line_is_read_as_the_whole_picture_whatever_is_around_it() -> None:
    for image in (written("Total 12.50"), grey(written("i", size=60)), written("")):
        picture = read(Image(data=saved(image)), FORMATS)
        even_HW = np.asarray(line(image, 32, 512))
        tile_3HW = np.frombuffer(picture.data, np.uint8).reshape(3, 32, 512)
        assert picture.lines == 1
        assert (tile_3HW[:, :, :even_HW.shape[1]] == even_HW).all()


PAGES = [((3000, 4000), 8, 180), ((3000, 4000), 16, 195), ((3000, 4000), 16, 50),
         ((1080, 1920), 2, 72), ((1080, 1920), 5, 72), ((600, 1300), 16, 60), ((400, 1200), 10, 36)]


@pytest.mark.parametrize(("size", "count", "pitch"), PAGES)
def test_a_note_on_a_large_page_is_cut_and_the_blank_paper_left_out(
    size: tuple[int, int], count: int, pitch: int,
) -> None:
    for image in (on_paper(size, count, pitch), on_paper(size, count, pitch, top=5)):
        found = cut(image)
        assert len(found) == count
        assert sum(int((np.asarray(each) < 120).sum()) for each in found) == int(
            (np.asarray(image) < 120).sum())
        assert all(each.height < 1.2 * pitch and each.width < 0.9 * size[0] for each in found)


@pytest.mark.parametrize("pitch", [40, 50, 60, 100])
def test_two_notes_at_the_ends_of_a_page_are_cut_both(pitch: int) -> None:
    assert len(cut(on_paper((3000, 4000), 16, pitch, top=200, gap=3600 - 16 * pitch))) == 16


@pytest.mark.parametrize("size", [(1080, 1920), (3000, 4000), (1000, 400)])
def test_one_line_on_a_large_page_is_cut_out_of_it(size: tuple[int, int]) -> None:
    image = on_paper(size, 1, 72)
    (found,) = cut(image)
    assert found.height < 72 and found.width < 0.9 * size[0]
    ink, of = ((np.asarray(each) < 120).sum() for each in (found, image))
    assert ink == pytest.approx(of, rel=0.01)  # made level, at most
    tile_3HW = np.frombuffer(read(Image(data=saved(image)), FORMATS).data, np.uint8)
    even_HW = np.asarray(line(found, 32, 512))
    assert (tile_3HW.reshape(3, 32, 512)[:, :, :even_HW.shape[1]] == even_HW).all()


def test_worn_and_tilted_notes_on_large_pages_are_cut() -> None:
    image = on_paper((1080, 1920), 5, 72)
    assert len(cut(grey(image))) == len(cut(ImageOps.invert(image))) == 5
    assert len(cut(image.rotate(2, Pillow.Resampling.BICUBIC, fillcolor=235))) == 5


@pytest.mark.parametrize("number", [60, 75, 100])
def test_a_page_of_small_lines_is_refused_and_not_taken_for_one(number: int) -> None:
    image = on_paper((3000, 4000), number, 3900 // number)
    with pytest.raises(Refused) as refused:
        cut(image)
    assert refused.value.answer.counts[0] == pytest.approx(number, abs=1)


def test_what_only_looks_like_lines_of_text_is_not_said_to_have_them() -> None:
    with pytest.raises(MediaTooLarge, match="looks like 25 lines of text, and at most 16"):
        read(Image(data=saved(bricks(1200, 900, 36))), FORMATS)


@pytest.mark.parametrize("number", [17, 30, 60])
def test_more_lines_than_are_taken_are_refused_with_their_number(number: int) -> None:
    data = saved(grey(written(*([TEXTS[0], TEXTS[3]] * 30)[:number])))
    with pytest.raises(MediaTooLarge, match=f"{number} lines of text, and at most 16"):
        read(Image(data=data), FORMATS)


def test_as_many_lines_as_are_taken_are_read() -> None:
    data = saved(written(*TEXTS, *TEXTS[:5], *TEXTS[:5]))
    assert read(Image(data=data), FORMATS).lines == 16
    with pytest.raises(MediaTooLarge, match="16 lines of text, and at most 15"):
        read(Image(data=data), FORMATS, limits=Limits(lines=15))


def test_only_a_format_of_lines_cuts() -> None:
    assert read(Image(data=saved(written(*TEXTS))), formats(32, 512, Fit.PAD)).tiles == 1
