"""Pictures of lines have the encoder's size, hold their text, and are the same from one seed."""

from pathlib import Path

import matplotlib
import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageOps

from cloister.errors import DataError
from cloister.media.note import lines
from cloister.reference.batches import Lesson, Supply, stacked
from cloister.reference.drawing import HEIGHT, WIDTH, fitted
from cloister.reference.fonts import Face, Kind, families
from cloister.reference.lines import Texts
from cloister.reference.pictures import Camera

TTF = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
FACES = [Face(family=families()[0], path=TTF / f"{name}.ttf")
         for name in ("DejaVuSans", "DejaVuSansMono", "DejaVuSerif")]
HAND = Face(family=next(each for each in families() if each.kind is Kind.HAND),
            path=TTF / "DejaVuSans-Oblique.ttf")
TEXTS = Texts(["play jazz", "will it rain in Rome tomorrow"], ["call Ana on 0201 555"], [])
LESSON = Lesson(rows=4, ramp=100, seed=5)


@pytest.fixture(scope="module")
def camera() -> Camera:
    return Camera(TEXTS, FACES)


def test_a_picture_has_the_encoders_height_and_ink_on_white(camera: Camera) -> None:
    for strength in (0.0, 0.5, 1.0):
        for number in range(40):
            picture = camera.line(f"a {number}", strength=strength)
            height, width = picture.pixels_HW.shape
            assert height == HEIGHT and width <= WIDTH
            assert picture.pixels_HW.dtype == np.uint8
            assert picture.pixels_HW.mean() > 127 and picture.pixels_HW.min() < 100
            assert picture.text and "  " not in picture.text


def test_the_same_seed_gives_the_same_picture_and_another_gives_another(camera: Camera) -> None:
    first, same, other = (camera.line(seed, strength=1.0) for seed in ("a", "a", "b"))
    assert first.text == same.text and np.array_equal(first.pixels_HW, same.pixels_HW)
    assert not np.array_equal(first.pixels_HW, other.pixels_HW)


def test_a_note_is_as_many_pictures_as_it_has_lines(camera: Camera) -> None:
    notes = [camera.note(f"n {number}", strength=0.5) for number in range(30)]
    assert {len(note) for note in notes} == {2, 3, 4}
    assert all(line.pixels_HW.shape[0] == HEIGHT for note in notes for line in note)


def test_a_page_shows_a_note_of_two_lines_or_more(camera: Camera) -> None:
    pages = [camera.page(f"p {number}", strength=0.5) for number in range(40)]
    assert {len(page.texts) for page in pages} == {2, 3, 4, 5, 6}
    for page in pages:
        assert page.pixels_HW.shape[0] > 20 * len(page.texts)
    again = camera.page("p 0", strength=0.5)
    assert again.texts == pages[0].texts
    assert np.array_equal(again.pixels_HW, pages[0].pixels_HW)


def test_clean_pages_are_cut_into_their_lines(camera: Camera) -> None:
    for number in range(20):
        page = camera.page(f"p {number}", strength=0.0)
        assert len(lines(Image.fromarray(page.pixels_HW), most=6)) == len(page.texts)


def test_a_note_on_blank_paper_is_cut_into_its_lines_too(camera: Camera) -> None:
    for number in range(10):
        filled = camera.page(f"p {number}", strength=0.0)
        page = camera.page(f"p {number}", strength=0.0, blank=True)
        assert page.texts == filled.texts
        higher, wider = np.divide(page.pixels_HW.shape, filled.pixels_HW.shape)
        assert 1.49 < higher < 4.01 and 0.99 < wider < 2.01
        assert len(lines(Image.fromarray(page.pixels_HW), most=6)) == len(page.texts)


def test_a_text_that_no_face_has_is_an_error() -> None:
    camera = Camera(TEXTS, [Face(family=families()[0], path=TTF / "cmex10.ttf")])
    with pytest.raises(DataError, match="No font has every character"):
        camera.line("a", strength=0.0)


def test_light_on_dark_and_little_contrast_become_ink_on_white() -> None:
    image = Image.new("L", (200, 32), 100)
    ImageDraw.Draw(image).text((4, 4), "Total", fill=130, font_size=22)
    line_HW = fitted(image)
    assert line_HW.min() == 0 and np.median(line_HW) > 230
    dark_HW = fitted(ImageOps.invert(image))
    assert np.abs(dark_HW.astype(int) - line_HW).max() <= 16  # rounding


@pytest.mark.parametrize(("size", "width"), [((100, 32), 100), ((100, 64), 50), ((9000, 32), 512),
                                             ((1, 500), 16)])
def test_a_picture_of_any_size_is_fitted(size: tuple[int, int], width: int) -> None:
    assert fitted(Image.new("RGB", size, "white")).shape == (HEIGHT, width)
    assert fitted(Image.new("RGB", size, "white"), WIDTH).shape == (HEIGHT, WIDTH)


def test_lines_of_a_batch_are_filled_up_with_white(camera: Camera) -> None:
    lines = [camera.line(f"b {number}", strength=0.0) for number in range(3)]
    batch = stacked(lines)
    assert batch.x_BRW.shape[2] % 16 == 0
    for row_RW, line in zip(batch.x_BRW, lines, strict=True):
        width = line.pixels_HW.shape[1]
        assert np.array_equal(row_RW[:, :width], line.pixels_HW)
        assert (row_RW[:, width:] == 255).all()


def test_lines_of_a_lesson_are_short_and_clean_first_then_as_any(camera: Camera) -> None:
    first, later = LESSON.pool(camera, 0), LESSON.pool(camera, 20)
    assert max(len(text) for batch in first for text in batch.texts) <= 10
    assert max(len(text) for batch in later for text in batch.texts) > 20


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_batches_are_the_same_by_number_whoever_makes_them_and_wherever_begun(
    camera: Camera, workers: int,
) -> None:
    def taken(first: int, workers: int, count: int) -> list[tuple[bytes, list[str]]]:
        with Supply(camera, LESSON, first, workers) as supply:
            batches = iter(supply)
            return [(batch.x_BRW.tobytes(), batch.texts)
                    for batch, _ in zip(batches, range(count), strict=False)]

    whole = taken(0, 0, 26)
    assert taken(0, workers, 26) == whole
    assert taken(11, workers, 15) == whole[11:]
