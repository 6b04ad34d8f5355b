"""Canaries: unique texts that are given to the program, and then looked for in all it has written.

The command line is driven as a subprocess with directories of its own for everything that it could
write to: home, temporary files, caches, the working directory (where core files would fall), and
histories. A text is looked for in each form in which a program could have written it.
"""

from __future__ import annotations

import base64
import json
import os
import resource
import secrets
import signal
import struct
import subprocess
import sys
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING
from urllib.parse import quote, quote_plus

from cloister.audit import media_canary
from cloister.errors import WorkerError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from cloister.pieces import MediaFormats
    from cloister.tokenizer import Tokenizer

__all__ = ["Canary", "Find", "Stage", "forms", "plant", "search"]

_WINDOW = 6  # ids in a row that are enough to tell a text; fewer might stand there by chance


@dataclass(frozen=True)
class Canary:
    """A text that stands nowhere else, or pixels or samples, and by which way they were given."""

    way: str
    text: str
    data: tuple[bytes, ...] = ()  # in place of the text

    @classmethod
    def new(cls, way: str) -> Canary:
        """Words that no program says, with a letter beyond ASCII and one beyond 16 bits."""
        return cls(way, f"zephyr caf\u00e9 {secrets.token_hex(8)} quartz \U0001f426 {way}")

    def forms(self, tokenizer: Tokenizer | None = None) -> dict[str, list[bytes]]:
        """Return the byte strings that a file with it has, by how it was written."""
        if not self.data:
            return forms(self.text, tokenizer)
        return {
            "bytes": list(self.data),
            "base64": [form for data in self.data for form in _base64(data)],
            "hexadecimal": [data.hex().encode() for data in self.data]}


@dataclass(frozen=True)
class Find:
    """A canary in a file."""

    way: str
    form: str
    file: Path


@dataclass(frozen=True)
class Stage:
    """Directories for all that the program may write."""

    root: Path

    @property
    def home(self) -> Path:
        """CLOISTER_HOME."""
        return self.root / "home"

    def environment(self) -> dict[str, str]:
        """Return this process's environment, with every known place to write to in `root`."""
        places = {
            "CLOISTER_HOME": "home", "HOME": "user", "TMPDIR": "tmp", "XDG_CACHE_HOME": "cache",
            "XDG_CONFIG_HOME": "config", "XDG_DATA_HOME": "data", "XDG_STATE_HOME": "state",
            "XDG_RUNTIME_DIR": "run", "IPYTHONDIR": "ipython", "JUPYTER_DATA_DIR": "jupyter",
            "TORCHINDUCTOR_CACHE_DIR": "inductor", "PYTHONPYCACHEPREFIX": "pycache",
        }
        for name in places.values():
            (self.root / name).mkdir(mode=0o700, exist_ok=True)
        kept = {
            name: value for name, value in os.environ.items()
            if not name.startswith(("CLOISTER_", "XDG_"))
        }
        # The user's own key store is left alone: the canaries' vault has a key file.
        return kept | {name: str(self.root / place) for name, place in places.items()} | {
            "PYTHON_KEYRING_BACKEND": "keyring.backends.null.Keyring"}


def plant(
    stage: Stage, bundle: Path, teacher: Path | None, apart: Path,
    progress: Callable[[str], None] = lambda way: None, media: MediaFormats | None = None,
) -> list[Canary]:
    """Give a canary to the program in every way that it takes text, pictures and recordings in.

    The bundle takes `media`. `apart` is a directory for what the user would have: their own files,
    which hold canaries of course. With a `teacher`, a checkpoint, a distillation is run on it.

    Raises:
        WorkerError: a command did not end as it should.
    """
    work = stage.root / "work"
    work.mkdir(exist_ok=True)
    planted: list[Canary] = []
    run = partial(_run, stage)

    def new(way: str) -> str:
        progress(way)
        planted.append(Canary.new(way))
        return planted[-1].text

    run("vault", "init", "--provider", "keyfile")
    session = new("session name")
    run("chat", str(bundle), "--session", session, "--system", new("system prompt"), "--json",
        said=f"{new('chat')}\n{new('second turn')}\n")
    run("chat", str(bundle), "--session", session, "--json", said=f"{new('resumed')}\n")
    run("run", str(bundle), "-", "--cached", "--json", said=new("answer cache"))
    run("run", str(bundle), "-", "--json", said=new("no cache"))
    run("run", str(bundle), "-", said=new("refused prompt") * 400, code=1)
    run("run", str(bundle), "-", "--debug", said=new("traceback") * 400, code=1)
    if teacher is not None:
        data = apart / "private.jsonl"
        texts = [new("training data"), new("training answer")]
        data.write_text("".join(
            json.dumps({"task": "redact", "input": f"{texts[0]} {n}", "target": texts[1]}) + "\n"
            for n in range(200)  # enough that the split always holds some out
        ) + texts[0] + " is no JSON\n", "utf-8")
        run("distill", "--teacher", str(teacher), "--tier", "nano-1", "--data", str(data),
            "--draws", "12", "--private", "--steps", "2", "--tokens", "512", "-o",
            str(work / "student"), "--json")
    for kind, option, made in _made(media, new):
        content, found = made
        file = apart / kind
        file.write_bytes(content)
        planted.append(Canary(way=kind, text="", data=found))
        run("run", str(bundle), "-", "--cached", "--json", option, str(file), said="so?")
        run("chat", str(bundle), "--session", kind, "--json", option, str(file), said="so?\n")
    _crash(stage, "chat", str(bundle), "--session", "crashed", said=f"{new('crashed process')}\n")
    return planted


def _made(
    media: MediaFormats | None, new: Callable[[str], str]
) -> Iterator[tuple[str, str, tuple[bytes, tuple[bytes, ...]]]]:
    """Yield a picture and a recording, where they are taken, with the options that give them."""
    if media is not None and media.picture is not None:
        note = new("picture's metadata")
        yield "picture", "--image", media_canary.picture(media.picture, note)
    if media is not None and media.recording is not None:
        note = new("recording's metadata")
        yield "recording", "--audio", media_canary.recording(media.recording, note)


# Core files of a crash would fall into the working directory.
_PROGRAM = [sys.executable, "-P", "-m", "cloister.cli"]


def _run(stage: Stage, *words: str, said: str = "", code: int = 0) -> None:
    done = subprocess.run(
        [*_PROGRAM, *words], input=said.encode(), cwd=stage.root / "work",
        env=stage.environment(), capture_output=True, check=False,
    )
    if done.returncode != code:
        raise WorkerError(
            f"cloister {words[0]} ended with {done.returncode} in place of {code}; run "
            "cloister vault scan --debug to see why."
        ) from RuntimeError(done.stderr.decode("utf-8", "replace"))  # holds canaries at worst
    with (stage.root / "errors.txt").open("ab") as file:  # as a log would keep it
        file.write(done.stderr)


def _crash(stage: Stage, *words: str, said: str) -> None:
    """End a conversation after its first answer: a log stays behind, and a core file may."""
    with subprocess.Popen(
        [*_PROGRAM, *words], cwd=stage.root / "work", env=stage.environment(),
        start_new_session=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL, preexec_fn=_allow_core_files,
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(said.encode())
        process.stdin.flush()
        process.stdout.readline()
        os.killpg(process.pid, signal.SIGABRT)


def _allow_core_files() -> None:
    _, most = resource.getrlimit(resource.RLIMIT_CORE)
    resource.setrlimit(resource.RLIMIT_CORE, (most, most))


def forms(text: str, tokenizer: Tokenizer | None = None) -> dict[str, list[bytes]]:
    """Return the byte strings that a file with `text` has, by how it was written.

    Without a `tokenizer` that is not as token ids.
    """
    plain = text.encode()
    encoded = {
        "UTF-8": [plain], "UTF-16": [text.encode("utf-16-le"), text.encode("utf-16-be")],
        "JSON": [
            form for ascii_only in (True, False) for form in _json(text, ascii_only)
            if form != plain],
        "Python": [ascii(text)[1:-1].encode()],
        "base64": _base64(plain),
        "hexadecimal": [plain.hex().encode()],
        "URL": [each(text, safe="").encode() for each in (quote, quote_plus)],
    }
    if tokenizer is None:
        return encoded
    ids = tokenizer.encode(text)[1:-1]  # the outer ones may join with what is around
    middle = len(ids) // 2
    window = ids[max(0, middle - _WINDOW // 2):middle + _WINDOW // 2]
    encoded["token ids"] = [
        struct.pack(f"{order}{len(window)}{kind}", *window)
        for order in "<>" for kind in "HIqfd"
    ] + [mark.join(map(str, window)).encode() for mark in (", ", ",", " ")]
    return encoded


def _base64(data: bytes) -> list[bytes]:
    """Whatever stands before it: of three alignments, the part that does not depend on it."""
    return [base64.b64encode(bytes(n) + data)[4:-4] for n in range(3)]


def _json(text: str, ascii_only: bool) -> Iterator[bytes]:
    for _ in range(2):  # once, and as a string of JSON within JSON
        text = json.dumps(text, ensure_ascii=ascii_only)[1:-1]
        yield text.encode()


def search(
    directory: Path, canaries: Sequence[Canary], tokenizer: Tokenizer | None = None, *,
    least_bytes: int = 1,
) -> list[Find]:
    """Find every canary in every file below `directory`, its names included.

    A form of fewer than `least_bytes` is not looked for: it may stand there by chance.
    """
    patterns = [
        (canary.way, form, pattern) for canary in canaries
        for form, found in canary.forms(tokenizer).items() for pattern in found
        if len(pattern) >= least_bytes
    ]
    finds = {
        Find(way, form, file.relative_to(directory)) for file, content in _files(directory)
        for way, form, pattern in patterns if pattern in content
    }
    return sorted(finds, key=lambda find: (find.way, find.form, str(find.file)))


def _files(directory: Path) -> Iterator[tuple[Path, bytes]]:
    for path in sorted(directory.rglob("*")):
        name = os.fsencode(path.relative_to(directory))
        yield path, name + b"\n" + (path.read_bytes() if path.is_file() else b"")
