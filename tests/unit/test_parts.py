import numpy as np
import pytest

from cloister.errors import MediaTooLarge, MediaUnreadable, SettingError
from cloister.message import Message
from cloister.parts import LIMIT_BYTES, Audio, Image, Picture, Recording, one_by_one


def test_a_file_is_taken_as_it_is(tmp_path):
    (tmp_path / "note.png").write_bytes(b"\x89PNG")
    assert Image.open(tmp_path / "note.png").data == b"\x89PNG"
    assert Audio.open(str(tmp_path / "note.png")).rate is None


@pytest.mark.parametrize("path", ["https://example.org/a.png", "file:///etc/passwd", "data:,x"])
def test_a_url_is_refused_and_not_fetched(path):
    with pytest.raises(MediaUnreadable, match="nothing is fetched") as refused:
        Image.open(path)
    assert "example" not in str(refused.value)


def test_a_missing_file_is_refused_without_its_name(tmp_path):
    with pytest.raises(MediaUnreadable) as refused:
        Audio.open(tmp_path / "secret.wav")
    assert "secret" not in str(refused.value)


def test_a_file_over_the_limit_is_refused(tmp_path):
    with (tmp_path / "large").open("wb") as file:
        file.truncate(LIMIT_BYTES + 1)
    with pytest.raises(MediaTooLarge):
        Image.open(tmp_path / "large")


def test_arrays_keep_their_values_and_their_shape():
    pixels = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    assert Image.of(pixels) == Image(data=pixels.tobytes(), size=(2, 4))
    samples = np.linspace(-1, 1, 6, dtype=np.float32).reshape(3, 2)
    assert Audio.of(samples, rate=8000) == Audio(data=samples.tobytes(), rate=8000, channels=2)


@pytest.mark.parametrize("pixels", [
    np.zeros((2, 2), np.uint8), np.zeros((2, 2, 4), np.uint8), np.zeros((2, 2, 3), np.float32),
    np.zeros((0, 2, 3), np.uint8)])
def test_pixels_of_another_kind_are_refused(pixels):
    with pytest.raises(SettingError, match="uint8"):
        Image.of(pixels)


def test_samples_of_another_kind_are_refused():
    with pytest.raises(SettingError, match="float32"):
        Audio.of(np.zeros(3, np.int16), rate=8000)
    with pytest.raises(SettingError, match="rate"):
        Audio.of(np.zeros(3, np.float32), rate=0)


def test_chunks_of_a_microphone_make_one_recording():
    audio = Audio.of_chunks(
        [np.array([0, 16384], "<i2").tobytes(), np.array([-32768], "<i2").tobytes()], rate=16000)
    assert np.frombuffer(audio.data, np.float32).tolist() == [0, 0.5, -1]
    with pytest.raises(MediaUnreadable, match="within a sample"):
        Audio.of_chunks([b"\0"], rate=16000)


def test_an_endless_microphone_is_stopped_at_the_limit():
    def chunks():
        while True:
            yield bytes(1 << 20)

    with pytest.raises(MediaTooLarge):
        Audio.of_chunks(chunks(), rate=16000)


def test_decoded_media_are_as_large_as_they_say():
    assert Picture(data=bytes(3 * 5 * 12), height=3, width=4, grid=(2, 2)).tiles == 5
    with pytest.raises(MediaUnreadable):
        Picture(data=bytes(35), height=3, width=4)
    with pytest.raises(MediaUnreadable):
        Picture(data=bytes(3 * 6 * 12), height=3, width=4, grid=(2, 2), lines=2)
    with pytest.raises(MediaUnreadable):
        Picture(data=b"", height=3, width=4, lines=0)
    assert Recording(data=bytes(8), rate=8000).samples == 2
    with pytest.raises(MediaUnreadable):
        Recording(data=bytes(7), rate=8000)


def test_a_note_is_as_many_pictures_as_it_has_lines():
    note = Picture(data=bytes(range(12)) + bytes(12), height=2, width=2, lines=2)
    sound = Recording(data=bytes(8), rate=8000)
    assert list(one_by_one([note, sound])) == [
        Picture(data=bytes(range(12)), height=2, width=2),
        Picture(data=bytes(12), height=2, width=2), sound]
    assert note.label == "picture of 2 lines"


def test_no_repr_shows_content():
    image = Image(data=b"secret")
    message = Message(role="user", content=[image, "a secret"])
    assert "secret" not in f"{image!r} {message!r}"


def test_a_message_of_parts_has_the_text_of_its_texts():
    message = Message(role="user", content=["What ", Image(data=b"x"), "is this?"])
    assert message.content == ("What ", Image(data=b"x"), "is this?")
    assert message.text == "What is this?"
