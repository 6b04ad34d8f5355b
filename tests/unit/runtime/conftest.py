"""Engines on fakes, and a vault."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from tests.conftest import SHAPE, make_bundle

from cloister.bundle import Bundle
from cloister.manifest import modalities
from cloister.pieces import Fit, MediaFormats, PictureFormat, RecordingFormat, Resample
from cloister.runtime.engine import Engine
from cloister.runtime.program import FakeProgram
from cloister.settings import Settings
from cloister.vault.keys import Keyholder
from cloister.vault.namespace import Namespace
from cloister.vault.store import Vault

VOCABULARY = 300
LETTERS = tuple(range(70, 90))


class Program(FakeProgram):
    """A fake that does something before its next calls: raises, or looks around."""

    def __init__(
        self, context: int, prefer: tuple[int, ...] = (), media: MediaFormats | None = None
    ) -> None:
        super().__init__(VOCABULARY, context, prefer, media)
        self.before: Callable[[], Any] = lambda: None

    def score(self, tokens: torch.Tensor, start: int) -> torch.Tensor:
        self.before()
        return super().score(tokens, start)

    def read(self) -> int:
        """Positions that were read since the last time."""
        count = sum(length for _, length in self.calls)
        self.calls.clear()
        return count


class FakeEngine(Engine):
    """An engine whose program is a fake."""

    program: Program

    def __init__(self, path: Path, prefer: tuple[int, ...] = (), **options: Any) -> None:
        said = Bundle.open(path).manifest
        super().__init__(
            path, load=lambda *_, **__: Program(said.context, prefer, said.media),
            runs_here=lambda backend: True,
            settings=Settings(home=path.with_name("home"), data=None), **options)


@pytest.fixture
def engine(bundle: Bundle) -> FakeEngine:
    return FakeEngine(bundle.path)


@pytest.fixture(scope="session")
def long_bundle(tmp_path_factory: pytest.TempPathFactory, tokenizer_dir: Path) -> Bundle:
    """One whose context holds some turns."""
    path = tmp_path_factory.mktemp("long") / "long.cloister"
    return make_bundle(path, tokenizer_dir, context=512, shape=replace(SHAPE, context=512))


MEDIA = MediaFormats(
    picture=PictureFormat(
        height=4, width=6, tokens=12, fit=Fit.PAD, resample=Resample.BILINEAR, before="<",
        after=">"),
    recording=RecordingFormat(rate=100, samples_per_token=10, multiple=20, most=400))

LINES = msgspec.structs.replace(
    MEDIA, picture=msgspec.structs.replace(MEDIA.picture, fit=Fit.LINE, fewer=True))


def make_media_bundle(path: Path, tokenizer_dir: Path, media: MediaFormats = MEDIA) -> Bundle:
    """One that takes pictures and recordings, whose context holds some."""
    return make_bundle(
        path, tokenizer_dir, context=512, shape=replace(SHAPE, context=512), media=media,
        modalities=modalities(media))


@pytest.fixture(scope="session")
def media_bundle(tmp_path_factory: pytest.TempPathFactory, tokenizer_dir: Path) -> Bundle:
    """See `make_media_bundle`."""
    return make_media_bundle(tmp_path_factory.mktemp("media") / "media.cloister", tokenizer_dir)


@pytest.fixture
def fresh(long_bundle: Bundle) -> Callable[..., FakeEngine]:
    """Makes an engine that has read nothing, as a new process would; it answers in letters."""
    return lambda path=long_bundle.path, prefer=LETTERS: FakeEngine(path, prefer)


@pytest.fixture(scope="session")
def open_vault_(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Vault]:
    directory = tmp_path_factory.mktemp("vault")
    with Vault.create(directory / "vault", Keyholder(keyfile=directory / "key")) as made:
        yield made


@pytest.fixture
def vault(open_vault_: Vault) -> Iterator[Vault]:
    """A vault that holds nothing."""
    yield open_vault_
    for space in open_vault_.namespaces():
        space.shred()


@pytest.fixture
def space(vault: Vault) -> Namespace:
    return vault.namespace()
