"""A replay file proves that the same tokens come again, and is refused where it cannot."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from tests.unit.runtime.conftest import FakeEngine

from cloister.errors import NotEnoughDisk, OutputExists, OutputUnwritable, ReplayError
from cloister.runtime import replay as replays
from cloister.runtime.chat import Sampling
from cloister.runtime.replay import Replay
from cloister.runtime.session import Session


def exchange(engine: FakeEngine, **changes: object) -> Replay:
    sampling = Sampling(temperature=1.0, seed=4)
    tokens = Session(engine, system="call").stream("the fox", max_tokens=5, sampling=sampling)
    values = {
        "model_id": engine.model_id, "system": "call", "prompt": "the fox", "max_tokens": 5,
        "sampling": sampling, "tokens": tuple(token.id for token in tokens), **changes,
    }
    return Replay(**values)  # type: ignore[arg-type]


def again(engine: FakeEngine, path: Path) -> int:
    return replays.replay(
        path, engine.model_id, lambda system: Session(engine, system=system))


def test_a_replay_gives_the_same_tokens_and_is_readable_by_its_owner_only(
    engine: FakeEngine, tmp_path: Path
) -> None:
    path = tmp_path / "replay.json"
    replays.write(path, exchange(engine))
    assert path.stat().st_mode & 0o777 == 0o600
    assert again(engine, path) == 5
    assert replays.read(str(path)) == exchange(engine)
    assert "fox" not in repr(exchange(engine))


@pytest.mark.parametrize(("changes", "match"), [
    ({"tokens": (1, 2, 3, 4, 5)}, "position 0"),
    ({"max_tokens": 4}, "position 4"),
    ({"max_tokens": 6}, "position 5"),
    ({"model_id": "0" * 64}, "another bundle"),
    ({"sampling": Sampling(temperature=1.0)}, "without a seed"),
])
def test_a_replay_that_differs_is_refused_without_quoting_it(
    engine: FakeEngine, tmp_path: Path, changes: dict[str, object], match: str
) -> None:
    replays.write(tmp_path / "replay.json", exchange(engine, **changes))
    with pytest.raises(ReplayError, match=match) as caught:
        again(engine, tmp_path / "replay.json")
    assert "fox" not in str(caught.value)


@pytest.mark.parametrize(
    "text", ["", "[]", '{"format": 2}', '{"format": 1}', "\x00", "[" * 200_000],
    ids=["empty", "list", "format 2", "no fields", "nul", "deep"],
)
def test_a_malformed_replay_is_refused(engine: FakeEngine, tmp_path: Path, text: str) -> None:
    path = tmp_path / "replay.json"
    path.write_text(text)
    with pytest.raises(ReplayError, match="no replay file"):
        again(engine, path)


@pytest.mark.parametrize("changes", [
    {"max_tokens": "5"}, {"max_tokens": 1.5}, {"system": 5}, {"prompt": 5}, {"tokens": 5},
    {"sampling": []}, {"sampling": {"seed": 1.5}}, {"sampling": {"top_k": "x"}},
    {"sampling": {"heat": 1}}, {"sampling": {"temperature": -1.0}}, {"more": 1}, {"format": 2},
])
def test_a_replay_with_a_field_of_another_type_is_refused(
    engine: FakeEngine, tmp_path: Path, changes: dict[str, object]
) -> None:
    path = tmp_path / "replay.json"
    replays.write(path, exchange(engine))
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(ReplayError, match="no replay file"):
        again(engine, path)


def test_a_replay_that_is_not_there_is_refused(engine: FakeEngine, tmp_path: Path) -> None:
    with pytest.raises(ReplayError, match="no replay file"):
        again(engine, tmp_path / "missing.json")


def test_a_replay_that_cannot_be_written_is_refused_and_leaves_nothing(
    engine: FakeEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(OutputUnwritable):
        replays.write(tmp_path / "missing" / "replay.json", exchange(engine))

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(NotEnoughDisk):
            replays.write(tmp_path / "full.json", exchange(engine))
    assert list(tmp_path.glob("*full*")) == []
    replays.write(tmp_path / "full.json", exchange(engine))
    with pytest.raises(OutputExists):
        replays.write(tmp_path / "full.json", exchange(engine))


def test_a_replay_takes_the_place_of_nothing(engine: FakeEngine, tmp_path: Path) -> None:
    (tmp_path / "link.json").symlink_to(tmp_path / "elsewhere.json")
    with pytest.raises(OutputExists):
        replays.write(tmp_path / "link.json", exchange(engine))
    assert not (tmp_path / "elsewhere.json").exists()
