"""What every test stands on: no touch of the user's data, no network."""

from __future__ import annotations

import functools
import os
import signal
import socket
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from cloister.backend import XNNPACK
from cloister.bundle import Bundle, Golden, finish, write_golden, writer
from cloister.manifest import FORMAT, Manifest, ProgramEntry
from cloister.reference.vocabulary import SPECIAL, TEMPLATE
from cloister.tiers import Shape

TEXTS = (
    "the quick brown fox jumps over the lazy dog", "what is the weather in Paris tomorrow",
    '{"name": "GetWeather", "arguments": {"city": "Paris"}}', "na\u00efve caf\u00e9 \u4f60\u597d",
)


# No key store, for this process and for every other that a test starts.
NO_KEY_STORE = {"PYTHON_KEYRING_BACKEND": "keyring.backends.null.Keyring"}


def pytest_configure(config: pytest.Config) -> None:
    """Clear the environment of what belongs to the user, before anything reads it.

    A desktop's key store is found through the session bus, and the bus through two variables.
    """
    patch = pytest.MonkeyPatch()
    config.add_cleanup(patch.undo)
    kept = {"CLOISTER_DATA", "CLOISTER_TEST_CACHE"}
    ours = {name for name in os.environ if name.startswith("CLOISTER_")} - kept
    for name in (*ours, "DBUS_SESSION_BUS_ADDRESS", "XDG_RUNTIME_DIR"):
        patch.delenv(name, raising=False)
    for name, value in NO_KEY_STORE.items():
        patch.setenv(name, value)
    # A shell starts what runs in the background deaf to Ctrl-C, which some tests send.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if "PYTEST_XDIST_WORKER" in os.environ:  # each has a core, and threads of two would wait
        patch.setenv("OMP_NUM_THREADS", "1")
    home = tempfile.TemporaryDirectory()  # of what is made before a test has its own
    config.add_cleanup(home.cleanup)
    patch.setenv("CLOISTER_HOME", home.name)
    begin = subprocess.Popen.__init__

    def begin_without_keys(self: Any, *args: Any, env: Any = None, **options: Any) -> None:
        begin(self, *args, env=None if env is None else {**NO_KEY_STORE, **env}, **options)

    patch.setattr(subprocess.Popen, "__init__", begin_without_keys)


@pytest.fixture(autouse=True)
def _own_home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """User data of the tests lies in a directory of their own."""
    monkeypatch.setenv("CLOISTER_HOME", str(tmp_path_factory.mktemp("home")))


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here may need a network; sockets of the machine itself are left alone."""
    connect = socket.socket.connect

    def refuse(self: socket.socket, address: Any) -> None:
        if self.family in (socket.AF_INET, socket.AF_INET6):
            raise AssertionError("a test tried to reach the network")
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level tokenizer of 300 entries, and the reference family's chat template."""
    directory = tmp_path_factory.mktemp("tokenizer")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(r"\p{N}| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+"), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(TEXTS, trainers.BpeTrainer(
        vocab_size=300, special_tokens=list(SPECIAL), show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    ))
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "chat_template.jinja").write_text(TEMPLATE, "utf-8")
    return directory


SHAPE = Shape(
    vocab_size=300, hidden_size=64, layers=1, heads=2, kv_heads=2, head_size=32,
    feed_forward=64, context=64, tied=False,
)


def make_bundle(path: Path, tokenizer_dir: Path, **changes: Any) -> Bundle:
    """A bundle that is whole, but whose program is no program; for use with `FakeProgram`."""
    values: dict[str, Any] = {
        "format": FORMAT, "name": "tiny", "shape": SHAPE, "context": 64, "prefill_chunk": 8,
        "recipe": "8da4w-g32", "executorch": "1.4.1", "bos": None, "eos": (0,),
        "programs": (ProgramEntry(
            file="program.xnnpack.pte", backend="xnnpack", methods=XNNPACK.methods,
            operator_abi=XNNPACK.operator_abi, weight_bytes=1000, kv_bytes=1000, arena_bytes=1000,
        ),),
        "special_ids": (0, 1, 2, 3), "prompt_format": None,
        "prompt_format_reason": "nobody asked", "modalities": ("text",), "parent": "0" * 64,
        **changes,
    }
    with writer(path) as directory:
        (directory / "program.xnnpack.pte").write_bytes(b"no program" * 100)
        (directory / "receipt.json").write_text('{"weights": {}}')
        write_golden(directory, [Golden(prompt=(1, 40, 41), tokens=(5, 6), margin=0.5)])
        for source in tokenizer_dir.iterdir():
            (directory / source.name).write_bytes(source.read_bytes())
        finish(directory, functools.partial(Manifest, **values))
    return Bundle.open(path)


@pytest.fixture
def bundle(tmp_path: Path, tokenizer_dir: Path) -> Bundle:
    """See `make_bundle`."""
    return make_bundle(tmp_path / "tiny.cloister", tokenizer_dir)
