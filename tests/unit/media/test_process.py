"""A file is decoded by a process of its own, which ends whatever happens, and is not believed."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as Pillow
from tests.unit.media.files import RATE, formats, noise, saved, sine, sound

from cloister.errors import (
    MediaTooLarge,
    MediaUnreadable,
    SettingError,
    UnsupportedMedia,
    WorkerError,
)
from cloister.media import Limits, process, read
from cloister.media.exchange import Answer, Code
from cloister.parts import LIMIT_BYTES, Audio, Image
from cloister.pieces import MediaFormats

IMAGE = Image(data=saved(Pillow.fromarray(noise(20, 20))))
AUDIO = Audio(data=sound(sine()))
# The program of a process that takes another's place: it says that it is ready, and then this.
INSTEAD = "import os, sys, time; sys.stdin.buffer.readline(); os.write(1, b'+'); "


def children() -> set[int]:
    listed = Path(f"/proc/self/task/{threading.get_native_id()}/children").read_text()
    return {int(word) for word in listed.split()}


@pytest.fixture(autouse=True)
def _no_process_stays():
    before = children()
    yield
    assert children() <= before


def test_media_for_a_model_that_takes_none_of_the_kind_are_refused_by_name() -> None:
    only = formats()
    with pytest.raises(UnsupportedMedia, match="takes no pictures"):
        read(IMAGE, MediaFormats(recording=only.recording))
    with pytest.raises(UnsupportedMedia, match="takes no recordings"):
        read(AUDIO, MediaFormats(picture=only.picture))


def test_a_file_over_the_limit_is_refused_before_a_process_starts(monkeypatch) -> None:
    monkeypatch.setattr(process, "decode", None)
    with pytest.raises(MediaTooLarge, match="over 32 MiB"):
        read(Image(data=bytes(LIMIT_BYTES + 1)), formats())


def test_a_limit_that_is_not_above_zero_is_refused() -> None:
    with pytest.raises(SettingError, match="seconds is 0"):
        Limits(seconds=0)


@pytest.mark.parametrize(("part", "package"), [(IMAGE, "PIL"), (AUDIO, "soxr")])
def test_where_a_package_is_missing_the_extra_to_install_is_named(
    part, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == package else find(name))
    with pytest.raises(WorkerError, match=r'pip install "cloister\[media\]"'):
        read(part, formats())


def test_the_process_is_given_nothing_of_this_one(monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[dict] = []
    popen = subprocess.Popen

    def begin(words, **options):
        begun.append({"words": words, **options})
        return popen(words, **options)

    monkeypatch.setenv("CLOISTER_SECRET", "canary")
    monkeypatch.setattr(process.subprocess, "Popen", begin)
    read(IMAGE, formats())
    (options,) = begun
    assert options["env"] == {} and options["stderr"] == subprocess.DEVNULL
    assert options["words"][:3] == [sys.executable, "-I", "-c"]
    assert "canary" not in str(options["words"])
    assert options.get("close_fds", True) and not options.get("pass_fds")


def test_a_descriptor_that_can_be_inherited_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """The program that takes the place tells what it has open."""
    here, there = os.pipe()
    os.set_inheritable(there, True)
    monkeypatch.setattr(process, "_BEGIN", INSTEAD + (
        "found = [n for n in os.listdir('/dev/fd') if os.path.exists('/dev/fd/' + n)]\n"
        "import struct; os.environ.pop('LC_CTYPE', 0)\n"  # which Python sets by itself
        "os.write(1, struct.pack('<3Q', 5, len(found), len(os.environ)))"))
    with pytest.raises(MediaTooLarge, match="has 3 x 1 pixels"):  # the tests' own variable
        read(IMAGE, formats())
    os.close(here)
    os.close(there)


WRONG = {
    "ends at once": ("", "fail"),
    "crashes": ("os.abort()", "fail"),
    "answers too shortly": ("os.write(1, bytes(23))", "fail"),
    "answers with an unknown code": ("os.write(1, b'\\xff' * 24)", "wrongly|fail"),
    "answers without pixels": ("os.write(1, bytes(24))", "wrongly"),
    "answers with fewer pixels": ("os.write(1, bytes(24 + 32 * 48 * 3 - 1))", "wrongly"),
    "answers with more pixels": ("os.write(1, bytes(24 + 32 * 48 * 3 + 1))", "wrongly"),
    "answers with tiles": (
        "import struct; os.write(1, struct.pack('<3Q', 0, 1, 1) + bytes(2 * 32 * 48 * 3))",
        "wrongly"),
    "answers with tiles beyond number": (
        "import struct; os.write(1, struct.pack('<3Q', 0, 2**63, 2**63))", "wrongly"),
    "does not stop answering": ("\nwhile True: os.write(1, bytes(1 << 20))", "wrongly"),
}


@pytest.mark.parametrize("how", WRONG)
def test_a_process_that_answers_otherwise_than_it_should_is_not_believed(
    how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    program, why = WRONG[how]
    monkeypatch.setattr(process, "_BEGIN", INSTEAD + program)
    with pytest.raises(MediaUnreadable, match=why):
        read(IMAGE, formats())


def test_more_samples_than_a_model_takes_are_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "_BEGIN", INSTEAD + "os.write(1, bytes(24 + 4 * 1601))")
    with pytest.raises(MediaUnreadable, match="wrongly"):
        read(AUDIO, formats(most_s=0.1))


def test_a_process_that_cannot_start_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "_BEGIN", "import sys; sys.exit(3)")
    with pytest.raises(WorkerError, match=r"could not start \(exit status 3\)"):
        read(IMAGE, formats())


@pytest.mark.parametrize("program", [
    INSTEAD + "time.sleep(60)",  # with more than a pipe holds unread
    "import time; time.sleep(60)",
    INSTEAD + "sys.stdin.buffer.read(); os.close(1); time.sleep(60)",
])
def test_a_process_that_hangs_is_ended(program: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "_BEGIN", program)
    began = time.monotonic()
    with pytest.raises(MediaTooLarge, match="took over 1 s"):
        read(Image.of(noise(500, 500)), formats(), limits=Limits(seconds=1))
    assert time.monotonic() - began < 10


def test_a_file_that_takes_more_memory_than_it_may_is_refused() -> None:
    large = Image(data=saved(Pillow.new("RGB", (4000, 4000))))
    with pytest.raises(MediaTooLarge, match="over 8 MiB"):
        read(large, formats(), limits=Limits(memory_bytes=8 << 20))
    assert read(large, formats()).tiles == 1


BOMBS = {
    "164 megapixels": (
        "Image", lambda: saved(Pillow.new("1", (12800, 12800))), "12800 x 12800 pixels"),
    "an hour": ("Audio", lambda: sound(np.zeros(3600 * RATE, np.float32), "FLAC"), "3600.00 s"),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_refused_by_its_header_and_takes_little_memory(
    name: str, tmp_path: Path
) -> None:
    kind, made, why = BOMBS[name]
    (tmp_path / "bomb").write_bytes(made())
    # Small itself: what a process has when it starts another counts for that one, too.
    program = f"""
import resource
from cloister.errors import MediaTooLarge
from cloister.media import read
from cloister.parts import Audio, Image
from cloister.pieces import *
formats = MediaFormats(
    picture=PictureFormat(
        height=64, width=64, tokens=1, fit=Fit.PAD, resample=Resample.BICUBIC),
    recording=RecordingFormat(rate=16000, samples_per_token=1, multiple=1, most=160000))
try:
    read({kind}.open({str(tmp_path / "bomb")!r}), formats)
except MediaTooLarge as error:
    print(error)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True,
                          check=True, env={"PYTHONPATH": ":".join(sys.path)})
    said, peak_kib = done.stdout.splitlines()
    assert why in said
    assert int(peak_kib) < 150 << 10


def test_threads_read_at_once() -> None:
    found: list[bytes] = []
    expected = read(IMAGE, formats()).data

    def run() -> None:
        for _ in range(3):
            found.append(read(IMAGE, formats()).data)
            assert read(AUDIO, formats()).samples == RATE

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == 12 * [expected]


SCENE = """
import os, signal, sys, threading, time
from cloister.errors import CloisterError
from cloister.guard import enforce, keep_out_of_dumps
from cloister.media import read
from cloister.parts import Audio, Image
from tests.unit.media.files import formats, noise, sine
signal.signal(signal.SIGINT, signal.default_int_handler)
image, audio = Image.of(noise(400, 400)), Audio.of(sine(), rate=16000)
"""


def scene(program: str, **options) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", SCENE + program], capture_output=True, text=True, timeout=120,
        check=True, env={**os.environ, "PYTHONPATH": ":".join(sys.path)}, **options)


def test_it_starts_from_a_process_that_guards_itself() -> None:
    """As the worker does: no network, no local service, no dump."""
    done = scene("""
keep_out_of_dumps()
enforce().narrow()
print(read(image, formats()).tiles, read(audio, formats()).samples)
""")
    assert done.stdout == f"1 {RATE}\n"


def test_ctrl_c_ends_the_reading_and_no_process_stays() -> None:
    """It comes from a terminal: to the whole group, at any moment."""
    done = scene("""
interrupted = read_whole = 0
def press():
    time.sleep(delay)
    os.killpg(0, signal.SIGINT)
for delay in [0.002 * number for number in range(20)] + [0.1, 0.2, 0.3, 1.0]:
    thread = threading.Thread(target=press)
    try:
        thread.start()
        while thread.is_alive():
            read(image, formats())
        time.sleep(5)
    except KeyboardInterrupt:
        interrupted += 1
    thread.join()
    read_whole += read(image, formats()).tiles
try:
    os.waitpid(-1, os.WNOHANG)
except ChildProcessError:
    print(interrupted, read_whole, "no child")
""", start_new_session=True)
    assert done.stdout == "24 24 no child\n"


def test_it_is_not_ended_by_ctrl_c_that_this_process_does_not_heed() -> None:
    done = scene("""
signal.signal(signal.SIGINT, signal.SIG_IGN)
over = threading.Event()
def press():
    while not over.wait(0.005):
        os.killpg(0, signal.SIGINT)
threading.Thread(target=press).start()
print([read(image, formats()).tiles for _ in range(5)])
over.set()
""", start_new_session=True)
    assert done.stdout == "[1, 1, 1, 1, 1]\n"


def test_it_starts_without_a_directory_to_be_in_and_with_a_false_package_at_hand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("PIL", "numpy", "struct", "msgspec"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit(9)")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert read(IMAGE, formats()).tiles == 1


def test_an_answer_inverts() -> None:
    answer = Answer(code=Code.LONG, counts=(1, 2**63), data=b"x")
    assert Answer.unpack(answer.pack()) == answer
    with pytest.raises(ValueError, match="not a valid Code"):
        Answer.unpack(24 * b"\xff")
