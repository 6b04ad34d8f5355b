"""Read a picture or recording as a model takes it, or say in one sentence why not."""

from __future__ import annotations

from typing import TYPE_CHECKING, overload

from cloister.errors import MediaTooLarge, MediaUnreadable
from cloister.media import process
from cloister.media.exchange import Answer, Code, Refused, Request
from cloister.media.limits import Limits
from cloister.parts import LIMIT_BYTES, Audio, Image, Picture, Recording
from cloister.pieces import Fit

if TYPE_CHECKING:
    from cloister.errors import CloisterError
    from cloister.pieces import MediaFormats, PictureFormat, RecordingFormat

__all__ = ["read"]

_LIMITS = Limits()


@overload
def read(part: Image, formats: MediaFormats, *, limits: Limits = ...) -> Picture: ...
@overload
def read(part: Audio, formats: MediaFormats, *, limits: Limits = ...) -> Recording: ...


def read(
    part: Image | Audio, formats: MediaFormats, *, limits: Limits = _LIMITS
) -> Picture | Recording:
    """Decode `part` into what a model of `formats` takes, a file in a process of its own.

    Samples in memory are no file that somebody made: they are mixed and converted here.
    The quiet beginning and end of a recording are left out where its `trim` says so
    (`silence.sound_span`), before its length is judged. Nothing is ever cut otherwise.

    Raises:
        UnsupportedMedia: `formats` has no picture, or no recording.
        MediaTooLarge: it has more pixels, lines, samples or bytes, or takes more memory or time,
            than `limits` allow, or is longer than the format's `most`.
        MediaUnreadable: it is no file of a known format, or damaged, empty or animated.
        WorkerError: the process could not start, or the extra `media` is not installed.
    """
    formats.of(part)
    if isinstance(part, Image):
        request = Request(limits=limits, picture=formats.picture, size=part.size)
    else:
        request = Request(
            limits=limits, recording=formats.recording, rate=part.rate, channels=part.channels,
            trim=part.trim)
    if len(part.data) > LIMIT_BYTES:
        raise MediaTooLarge(
            f"A picture or recording is over {LIMIT_BYTES >> 20} MiB; give a smaller one.")
    samples = request.rate is not None
    answer = _converted(request, part.data) if samples else process.decode(request, part.data)
    if answer.code is not Code.DONE:
        raise _refusal(answer, request)
    if request.picture is not None:
        return _picture(answer, request.picture, limits)
    assert request.recording is not None
    return _recording(answer, request.recording)


def _converted(request: Request, data: bytes) -> Answer:
    try:
        from cloister.media import recordings
    except ImportError:
        raise process.not_installed("recording") from None
    try:
        return recordings.decode(request, data)
    except Refused as refused:
        return refused.answer
    except ValueError:  # bytes that are no whole number of samples
        return Answer(code=Code.DAMAGED)
    except MemoryError:
        return Answer(code=Code.MEMORY)


def _picture(answer: Answer, format_: PictureFormat, limits: Limits) -> Picture:
    """Return the picture of an answer that nobody vouches for."""
    grid, lines = answer.counts, 1
    if format_.fit is Fit.LINE:
        grid, lines = (0, answer.counts[1]), answer.counts[0]
    if max(answer.counts) > limits.result_bytes or bool(grid[0]) != bool(grid[1]) or (
            grid[0] and format_.tiles is None) or lines > limits.lines:
        raise _broken()
    try:
        return Picture(
            data=answer.data, height=format_.height, width=format_.width, grid=grid, lines=lines)
    except MediaUnreadable:
        raise _broken() from None


def _recording(answer: Answer, format_: RecordingFormat) -> Recording:
    if len(answer.data) > 4 * format_.most or answer.counts != (0, 0):
        raise _broken()
    try:
        return Recording(data=answer.data, rate=format_.rate)
    except MediaUnreadable:
        raise _broken() from None


def _broken() -> MediaUnreadable:
    return MediaUnreadable("A file made its decoder answer wrongly; do not trust it.")


def _refusal(answer: Answer, request: Request) -> CloisterError:
    """Return the error that tells why the file was refused."""
    first, second = answer.counts
    limits, recording = request.limits, request.recording
    what, known, units = (
        ("picture", "PNG, JPEG or WebP picture", "pixels") if recording is None
        else ("recording", "WAV, FLAC, Ogg or MP3 recording", "samples"))
    match answer.code:
        case Code.UNKNOWN:
            return MediaUnreadable(f"A file is no {known}, whatever its name; convert it to one.")
        case Code.EMPTY:
            return MediaUnreadable(f"A {what} has no {units}; give one that has.")
        case Code.ANIMATED:
            return MediaUnreadable(
                f"A picture is animated, of {first} frames; give one frame of it.")
        case Code.RATE:
            return MediaUnreadable(
                f"A recording has {first} samples a second, which none of sound has; check it.")
        case Code.NOT_FINITE:
            return MediaUnreadable("A recording has samples that are no numbers; make it again.")
        case Code.LOUD:
            return MediaUnreadable(
                "A recording has samples far beyond -1 to 1; divide them by the largest one that "
                "their type holds.")
        case Code.PIXELS:
            return MediaTooLarge(
                f"A picture has {first} x {second} pixels, and at most {limits.pixels} are "
                "decoded; give a smaller one.")
        case Code.LINES:
            return MediaTooLarge(
                f"A picture looks like {first} lines of text, and at most {limits.lines} are read "
                "at a time; give a part of it, or one that has text.")
        case Code.LONG if recording is not None:
            return MediaTooLarge(
                f"A recording of {first / recording.rate:.2f} s is longer than the "
                f"{recording.most / recording.rate:.2f} s that this model takes; give a shorter "
                "one.")
        case Code.SAMPLES:
            return MediaTooLarge(
                f"A recording has {first} samples, and at most {limits.samples} are decoded; give "
                "a shorter one.")
        case Code.RESULT:
            return MediaTooLarge(
                f"A {what} would become {first} bytes, and at most {limits.result_bytes} are "
                "taken; give a smaller one.")
        case Code.MEMORY:
            return MediaTooLarge(
                f"Decoding a {what} took over {limits.memory_bytes >> 20} MiB; give a smaller one.")
        case _:
            return MediaUnreadable(f"A {what} is damaged or ends early; make the file again.")
