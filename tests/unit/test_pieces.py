import msgspec
import pytest

from cloister.errors import SettingError, UnsupportedMedia
from cloister.parts import Picture, Recording
from cloister.pieces import Fit, PictureFormat, RecordingFormat, Resample, Tiles

SQUARE = PictureFormat(
    height=2, width=2, tokens=4, fit=Fit.STRETCH, resample=Resample.BILINEAR, before="\n<a>",
    after="<b>\n")


def test_a_picture_is_its_vectors_between_its_texts():
    assert SQUARE.layout(Picture(data=bytes(12), height=2, width=2)) == ["\n<a>", 4, "<b>\n"]


def test_tiles_have_their_rows_and_columns_and_the_whole_comes_last():
    tiled = msgspec.structs.replace(SQUARE, fit=Fit.TILES, before="", after="<f>", tiles=Tiles(
        longest_edge=4, before="<f><row_{row}_col_{column}>", row_end="\n", grid_end="\n",
        whole="<f><global>"))
    two = Picture(data=bytes(36), height=2, width=2, grid=(1, 2))
    assert tiled.layout(two) == [
        "<f><row_1_col_1>", 4, "<f><row_1_col_2>", 4, "\n", "\n", "<f><global>", 4,
        "<f>"]
    one = Picture(data=bytes(12), height=2, width=2)
    assert tiled.layout(one) == ["<f><global>", 4, "<f>"]


def test_lines_of_a_note_have_a_line_break_between_them():
    note = Picture(data=bytes(36), height=2, width=2, lines=3)
    lines = msgspec.structs.replace(SQUARE, fit=Fit.LINE)
    assert lines.layout(note) == ["\n<a>", 4, "\n", 4, "\n", 4, "<b>\n"]
    with pytest.raises(UnsupportedMedia, match="for a model that takes others"):
        SQUARE.layout(note)


def test_a_recording_is_filled_up_to_its_multiple():
    sound = RecordingFormat(rate=16000, samples_per_token=1280, multiple=2560, most=160000)
    assert sound.padded(1) == 2560
    assert sound.layout(Recording(data=bytes(4 * 2561), rate=16000)) == [4]


@pytest.mark.parametrize("change", [
    {"height": 0}, {"tokens": 0}, {"fill": (0, 0, 256)}, {"fit": Fit.TILES}])
def test_a_picture_format_out_of_bounds_is_refused(change):
    with pytest.raises(SettingError):
        msgspec.structs.replace(SQUARE, **change)


@pytest.mark.parametrize("change", [
    {"rate": 0}, {"multiple": 1281}, {"multiple": 0}, {"most": 1}])
def test_a_recording_format_out_of_bounds_is_refused(change):
    given = {"rate": 16000, "samples_per_token": 1280, "multiple": 1280, "most": 160000}
    with pytest.raises(SettingError):
        RecordingFormat(**(given | change))
