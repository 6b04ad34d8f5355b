"""Bombs, and mutated files of each format, decoded one by one as `cloister.media` does.

    python tests/campaigns/media.py [--count 1000] [--seed N] [--only KIND]

Each file must be read, or refused by name, within the limits of time and memory; what is not is
printed with its number, by which `mutated` makes it again, and the exit code is 1. A whole run of
all kinds writes its table into `media.md` beside this file. The memory is the peak of the processes
that decode, as the system counts it; the one that starts them is kept smaller than they are.
`tests/unit/media/test_campaign.py` runs a few of each.
"""

from __future__ import annotations

import argparse
import io
import json
import platform
import random
import resource
import shlex
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from collections import Counter
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from cloister.errors import CloisterError, MediaTooLarge, MediaUnreadable
from cloister.media import read
from cloister.parts import Audio, Image
from cloister.pieces import (
    Fit,
    MediaFormats,
    PictureFormat,
    RecordingFormat,
    Resample,
    Tiles,
)

HERE = Path(__file__)
PICTURES = ("PNG", "PNG of 16 bits", "JPEG", "WebP")
RECORDINGS = ("WAV", "FLAC", "Ogg", "MP3")
KINDS = (*PICTURES, *RECORDINGS)
FORMATS = MediaFormats(
    picture=PictureFormat(
        height=64, width=64, tokens=1, fit=Fit.TILES, resample=Resample.LANCZOS,
        tiles=Tiles(longest_edge=256, before="", row_end="", whole="")),
    recording=RecordingFormat(rate=16000, samples_per_token=1, multiple=1, most=160_000))
HEAD = ("files", "tried", "read", "damaged, or of no known format", "too large or too long",
        "decoder failed", "not refused by name", "slowest, s", "peak memory, MiB")
Row = tuple[str, ...]


def originals(kind: str) -> list[bytes]:
    """Sound files of a kind, in the ways that it can be written."""
    import numpy as np
    import soundfile
    from PIL import Image as Pillow

    rng = np.random.default_rng(0)
    grey = np.cumsum(rng.integers(-3, 4, (96, 128)), axis=1)
    picture = Pillow.fromarray(np.stack([grey, grey.T[:96, :96].repeat(2, 1)[:, :128], -grey],
                                        axis=-1).astype(np.uint8))
    samples = np.sin(np.arange(16000) ** 1.3 / 900)[:, None] * rng.uniform(0.2, 0.5, (1, 2))

    def saved(image: Any, form: str, **options: Any) -> bytes:
        file = io.BytesIO()
        image.save(file, form, **options)
        return file.getvalue()

    def sound(form: str, subtype: str | None = None, channels: int = 1) -> bytes:
        file = io.BytesIO()
        soundfile.write(file, samples[:, :channels], 16000, format=form, subtype=subtype)
        return file.getvalue()

    exif = Pillow.Exif()
    exif[0x0112], exif[0x010E] = 6, "a description"
    wide = np.cumsum(rng.integers(-300, 301, (64, 64)), axis=1).astype("<u2")
    made = {
        "PNG": lambda: [
            saved(picture, "PNG", exif=exif), saved(picture.quantize(16), "PNG", transparency=3),
            saved(picture.convert("RGBA"), "PNG"), saved(picture.convert("LA"), "PNG"),
            saved(picture.convert("1"), "PNG"), saved(picture, "PNG", save_all=True,
                                                      append_images=[picture.rotate(90)])],
        "PNG of 16 bits": lambda: [
            saved(Pillow.frombytes("I;16", (64, 64), wide.tobytes()), "PNG"),
            _wide_colours(wide)],
        "JPEG": lambda: [
            saved(picture, "JPEG", exif=exif), saved(picture, "JPEG", progressive=True),
            saved(picture.convert("CMYK"), "JPEG"), saved(picture.convert("L"), "JPEG"),
            saved(picture, "MPO", save_all=True, append_images=[picture])],
        "WebP": lambda: [
            saved(picture, "WEBP", exif=exif), saved(picture, "WEBP", lossless=True),
            saved(picture.convert("RGBA"), "WEBP"),
            saved(picture, "WEBP", save_all=True, append_images=[picture.rotate(90)])],
        "WAV": lambda: [
            sound("WAV"), sound("WAV", "FLOAT", 2), sound("WAV", "ULAW"), sound("WAV", "MS_ADPCM"),
            sound("WAVEX", "PCM_24", 2), sound("RF64")],
        "FLAC": lambda: [sound("FLAC"), sound("FLAC", "PCM_24", 2)],
        "Ogg": lambda: [sound("OGG", "VORBIS"), sound("OGG", "OPUS", 2)],
        "MP3": lambda: [sound("MP3"), sound("MP3", channels=2)],
    }
    return made[kind]()


def _wide_colours(wide: Any) -> bytes:
    """A PNG of three channels of 16 bits, which Pillow cannot write."""
    rows = b"".join(b"\0" + row.astype(">u2").repeat(3).tobytes() for row in wide)
    chunks = ((b"IHDR", struct.pack(">IIBBBBB", 64, 64, 16, 2, 0, 0, 0)),
              (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(name, data) for name, data in chunks)


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def mutated(files: list[bytes], rng: random.Random) -> bytes:
    """Change one of `files` in up to four ways; a PNG gets its checksums anew half of the time."""
    data = bytearray(rng.choice(files))
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        # Headers are short, and decide most.
        reach = min(len(data), 64 if rng.random() < 0.4 else len(data))
        place, length = rng.randrange(max(1, reach)), rng.choice((1, 2, 4, 8, 64, 1024))
        match rng.randrange(7):
            case 0:
                data[place:place + 1] = bytes([rng.randrange(256)])
            case 1:
                data[place:place + length] = rng.randbytes(length)
            case 2:
                data[place:place + length] = length * rng.choice((b"\0", b"\xff", b"\x7f"))
            case 3:
                del data[place:place + length]
            case 4:
                data[place:place] = data[place:place + length]
            case 5:
                other = rng.choice(files)
                data[place:place + length] = other[place:place + length]
            case 6:
                del data[max(place, len(data) // 4):]
    return _with_checksums(bytes(data)) if rng.random() < 0.5 else bytes(data)


def _with_checksums(data: bytes) -> bytes:
    if not data.startswith(b"\x89PNG\r\n\x1a\n"):
        return data
    made, place = data[:8], 8
    while place + 12 <= len(data):
        length = min(int.from_bytes(data[place:place + 4], "big"), len(data) - place - 12)
        made += _chunk(data[place + 4:place + 8], data[place + 8:place + 8 + length])
        place += 12 + length
    return made + data[place:]


def tried(part: Image | Audio) -> str:
    """Read it, and return the name of the column that counts it."""
    try:
        read(part, FORMATS)
    except MediaTooLarge:
        return HEAD[4]
    except MediaUnreadable as error:
        return HEAD[5] if "its decoder" in str(error) else HEAD[3]
    except CloisterError as error:
        return f"{HEAD[6]}: {type(error).__name__}"
    return HEAD[2]


def attempt(kind: str, folder: Path, count: int, seed: int) -> dict[str, Any]:
    """Try the files of `folder`, mutated `count` times, or as they are where that is 0."""
    files = [path.read_bytes() for path in sorted(folder.iterdir())]
    found, slowest, bad = Counter[str](), 0.0, list[str]()
    for number in range(count or len(files)):
        data = mutated(files, random.Random(f"{seed} {kind} {number}")) if count else files[number]
        began = time.perf_counter()
        outcome = tried((Image if kind in PICTURES else Audio)(data=data))
        slowest = max(slowest, time.perf_counter() - began)
        found[outcome] += 1
        if outcome not in HEAD[2:5]:
            bad.append(f"number {number}: {outcome}")
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss << 10
    return {"found": found, "slowest_s": slowest, "peak_bytes": peak, "bad": bad}


def apart(kind: str, files: list[bytes], count: int, seed: int) -> dict[str, Any]:
    """Try them in a small process of its own, whose children's peak is the decoders'."""
    with tempfile.TemporaryDirectory() as folder:
        for number, data in enumerate(files):
            Path(folder, f"{number:03}").write_bytes(data)
        done = subprocess.run(
            [sys.executable, str(HERE), "--apart", folder, "--only", kind, "--count", str(count),
             "--seed", str(seed)], stdout=subprocess.PIPE, check=True)
    return dict(json.loads(done.stdout))


def bombs() -> dict[str, tuple[str, bytes]]:
    """Small files that are large when they are decoded, by their names, each with its kind."""
    import numpy as np
    import soundfile
    from PIL import Image as Pillow

    picture, sound = io.BytesIO(), io.BytesIO()
    Pillow.new("1", (12800, 12800)).save(picture, "PNG")
    with soundfile.SoundFile(sound, "w", 16000, 1, format="FLAC") as out:
        for _ in range(3 * 60):
            out.write(np.zeros(60 * 16000, np.float32))
    return {f"164 megapixels, PNG of {len(picture.getvalue()) / 1000:.0f} kB": (
                "PNG", picture.getvalue()),
            f"3 hours, FLAC of {len(sound.getvalue()) / 1000:.0f} kB": ("FLAC", sound.getvalue())}


def row(name: str, result: dict[str, Any]) -> Row:
    found = Counter(result["found"])
    refused = sum(count for outcome, count in found.items() if outcome.startswith(HEAD[6]))
    counts = [found.total(), *(found[column] for column in HEAD[2:6]), refused]
    return (name, *map(str, counts), f"{result['slowest_s']:.2f}",
            f"{result['peak_bytes'] / 2**20:.0f}")


def markdown(rows: list[Row]) -> str:
    lines = "\n".join("| " + " | ".join(cells) + " |" for cells in (
        HEAD, ("---", *("---:",) * (len(HEAD) - 1)), *rows))
    versions = ", ".join(f"{name} {version(name)}" for name in ("pillow", "soundfile", "soxr"))
    command = shlex.join(["python", "tests/campaigns/media.py", *sys.argv[1:]])
    return (f"# Bombs and mutated files\n\n`{command}`, {datetime.now(UTC):%d %B %Y}, "
            f"Python {platform.python_version()}, {versions}, on {platform.system()} "
            f"{platform.machine()}, {processor()}, a busy machine\n\n{lines}\n")


def processor() -> str:
    for line in Path("/proc/cpuinfo").read_text("utf-8").splitlines():
        if line.startswith("model name"):
            return line.split(": ")[1]
    return platform.processor()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=KINDS)
    parser.add_argument("--apart", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.apart:
        print(json.dumps(attempt(given.only, given.apart, given.count, given.seed)))
        return 0
    rows, bad = list[Row](), list[str]()
    for name, (kind, data) in ({} if given.only else bombs()).items():
        rows.append(row(name, apart(kind, [data], 0, 0)))
        print(*rows[-1], sep=" | ", flush=True)
    for kind in [given.only] if given.only else KINDS:
        result = apart(kind, originals(kind), given.count, given.seed)
        rows.append(row(f"{kind}, mutated", result))
        bad += [f"{kind}, {each}" for each in result["bad"]]
        print(*rows[-1], sep=" | ", flush=True)
    if not given.only:
        HERE.with_suffix(".md").write_text(markdown(rows), "utf-8")
    print(*bad, sep="\n", end="\n" if bad else "")
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
