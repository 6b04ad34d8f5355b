"""A conversation goes on where it stopped, whatever happened in between."""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save
from tests.conftest import make_bundle

from cloister.bundle import Bundle
from cloister.errors import (
    ContextExceeded,
    EmptyPrompt,
    IncompatibleProgram,
    NotEnoughMemory,
    ReplayError,
    SettingError,
    SnapshotError,
    VocabularyMismatch,
)
from cloister.runtime import memory
from cloister.runtime import replay as replays
from cloister.runtime.chat import Sampling
from cloister.runtime.engine import Engine
from cloister.runtime.program import FakeProgram
from cloister.runtime.session import Session, Token


class Fakes:
    """Makes engines on fakes, and keeps the last fake."""

    program: FakeProgram

    def load(self, path: Path, layers: int, *, threads: int | None) -> FakeProgram:
        self.program = FakeProgram(300, 64)
        return self.program


@pytest.fixture
def fakes() -> Fakes:
    return Fakes()


@pytest.fixture
def engine(bundle: Bundle, fakes: Fakes) -> Engine:
    return Engine(bundle.path, load=fakes.load, runs_here=lambda backend: True)


def answer(session: Session, prompt: str, n: int = 5, **options: object) -> list[int]:
    return [token.id for token in session.stream(prompt, max_tokens=n, **options)]  # type: ignore[arg-type]


def test_the_prompt_is_read_in_chunks(engine: Engine, fakes: Fakes) -> None:
    session = Session(engine)
    answer(session, "the quick brown fox", 1)
    lengths = [length for _, length in fakes.program.calls]
    assert max(lengths) <= 8
    assert sum(lengths) == session.stats.prompt_tokens


def test_a_second_turn_reads_only_what_is_new(engine: Engine, fakes: Fakes) -> None:
    session = Session(engine)
    answer(session, "the fox", 3)
    fakes.program.calls.clear()
    answer(session, "the dog", 1)
    assert fakes.program.calls[0][0] > 2  # the first turn's prompt was not read again


def test_turns_give_what_one_reading_of_the_whole_gives(bundle: Bundle, fakes: Fakes) -> None:
    def fresh() -> Engine:
        return Engine(bundle.path, load=fakes.load, runs_here=lambda backend: True)

    one = Session(fresh(), system="call")
    answer(one, "the fox", 3)
    second = answer(one, "the dog", 4)

    other = Session(fresh(), system="call")
    other.messages = list(one.messages[:3])  # as if the first turn had been loaded from somewhere
    assert answer(other, "the dog", 4) == second


def test_two_sessions_may_take_turns_on_one_engine(engine: Engine, bundle: Bundle) -> None:
    one, two = Session(engine), Session(engine)
    streams = one.stream("the fox", max_tokens=6), two.stream("lazy dog", max_tokens=6)
    mixed: tuple[list[int], list[int]] = ([], [])
    for _ in range(6):
        for ids, stream in zip(mixed, streams, strict=True):
            ids.append(next(stream).id)
    alone = Session(engine)
    assert answer(alone, "the fox", 6) == mixed[0]
    assert answer(Session(engine), "lazy dog", 6) == mixed[1]


def test_a_stop_from_another_thread_ends_within_one_token(engine: Engine) -> None:
    session, seen = Session(engine), []
    for token in session.stream("the fox"):
        seen.append(token)
        if len(seen) == 3:
            thread = threading.Thread(target=session.stop)
            thread.start()
            thread.join()
    assert len(seen) == 3
    assert session.stats.finish == "stop"
    assert answer(session, "and the dog", 2)  # the session is still good


def test_an_answer_that_is_closed_early_leaves_a_usable_session(engine: Engine) -> None:
    session = Session(engine)
    stream = session.stream("the fox")
    next(stream)
    stream.close()
    assert [message.role for message in session.messages][:1] == ["user"]
    assert answer(session, "the dog", 2)


def test_the_answer_ends_at_the_limit_or_at_a_full_context(engine: Engine) -> None:
    session = Session(engine)
    assert len(answer(session, "the fox", 4)) == 4
    assert session.stats.finish == "length"
    long = Session(engine)
    tokens = list(long.stream("the fox"))
    assert long.stats.finish in ("context", "end")
    assert long.stats.prompt_tokens + len(tokens) <= engine.context


def test_a_prompt_beyond_the_context_is_refused_with_both_numbers(engine: Engine) -> None:
    session = Session(engine)
    with pytest.raises(ContextExceeded, match=r"\d+ tokens .* 64"):
        session.stream("fox " * 100)
    assert session.messages == []


def test_an_empty_prompt_is_refused(engine: Engine) -> None:
    with pytest.raises(EmptyPrompt):
        Session(engine).stream("")


def test_a_limit_below_one_is_refused(engine: Engine) -> None:
    with pytest.raises(SettingError):
        Session(engine).stream("x", max_tokens=0)


@pytest.mark.parametrize("top", [-1, 301])
def test_alternatives_out_of_range_are_refused_and_nothing_changes(
    engine: Engine, fakes: Fakes, top: int
) -> None:
    session = Session(engine)
    with pytest.raises(SettingError, match="300"):
        session.stream("the fox", top=top)
    assert session.messages == []
    assert fakes.program.calls == []


ALTERNATING = """{% for m in messages %}
{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('alternate') }}{% endif %}
{{ m.content }}{% endfor %}"""


@pytest.mark.parametrize("how", ["ended at once", "stopped before it began", "broken"])
def test_a_prompt_without_an_answer_does_not_block_a_template_that_wants_turns(
    tmp_path: Path, tokenizer_dir: Path, how: str
) -> None:
    shutil.copytree(tokenizer_dir, tmp_path / "tokenizer")
    (tmp_path / "tokenizer/chat_template.jinja").write_text(ALTERNATING)
    bundle = make_bundle(tmp_path / "turns.cloister", tmp_path / "tokenizer")
    program = FakeProgram(300, 64, prefer=(0,) if how == "ended at once" else ())  # 0 ends
    engine = Engine(
        bundle.path, load=lambda path, layers, *, threads: program, runs_here=lambda backend: True
    )
    session = Session(engine)
    stream = session.stream("the fox", max_tokens=3)
    if how == "stopped before it began":
        session.stop()
    with pytest.MonkeyPatch.context() as patch:
        if how == "broken":
            patch.setattr(program, "forward", lambda tokens, start: torch.full((1, 300), torch.nan))
            with pytest.raises(IncompatibleProgram):
                list(stream)
        else:
            list(stream)
    assert session.messages == []
    session.stream("the dog")  # is not refused


def test_a_seed_gives_the_same_tokens_again(engine: Engine) -> None:
    sampling = Sampling(temperature=1.0, seed=9)
    first = answer(Session(engine), "the fox", 8, sampling=sampling)
    assert first == answer(Session(engine), "the fox", 8, sampling=sampling)
    assert first != answer(Session(engine), "the fox", 8, sampling=Sampling(temperature=1., seed=8))


def test_nothing_shows_text_in_its_repr(engine: Engine) -> None:
    session = Session(engine, system="secret")
    token = next(iter(session.stream("secret fox")))
    for thing in (session, engine, token, Token(1, "secret", -1.0)):
        assert "secret" not in repr(thing)
        assert "fox" not in repr(thing)


def test_a_snapshot_continues_in_another_engine_to_the_bit(bundle: Bundle, fakes: Fakes) -> None:
    def fresh() -> Engine:
        return Engine(bundle.path, load=fakes.load, runs_here=lambda backend: True)

    ids = [7, 8, 9, 10]
    one = fresh()
    one.logits(ids[:3])
    snapshot, wanted = one.snapshot(), one.logits(ids)
    two = fresh()
    two.restore(snapshot)
    got = two.logits(ids)
    assert wanted is not None
    assert got is not None
    assert torch.equal(got, wanted)
    assert fakes.program.calls == [(3, 1)]  # nothing was read again


def test_a_snapshot_of_another_model_or_a_damaged_one_is_refused(
    engine: Engine, tmp_path: Path, tokenizer_dir: Path, fakes: Fakes
) -> None:
    engine.logits([1, 2, 3])
    snapshot = engine.snapshot()
    other = Engine(
        make_bundle(tmp_path / "other.cloister", tokenizer_dir, recipe="8da8w").path,
        load=fakes.load, runs_here=lambda backend: True,
    )
    with pytest.raises(SnapshotError):
        other.restore(snapshot)
    tensors = load(snapshot)
    rows = torch.zeros(1, 64, 1, 1)
    forged = (
        {**tensors, "ids": torch.tensor([[1, 2, 3]])},
        {"layers.0.attn.k_cache": rows, "ids": torch.zeros(70, dtype=torch.int64)},  # context: 64
        {**tensors, "ids": torch.tensor([1.0, 2.0, 3.0])},
        {"ids": torch.tensor([1, 2, 3])},
        {**tensors, "layers.0.attn.k_cache": rows},
    )
    damages = [save(each, {"model_id": engine.model_id}) for each in forged]
    for damaged in (b"", snapshot[:-8], b"x" * 100, snapshot[:200], save(tensors), *damages):
        with pytest.raises(SnapshotError):
            engine.restore(damaged)


def test_too_little_memory_is_refused_with_both_numbers(bundle: Bundle, fakes: Fakes) -> None:
    with pytest.raises(NotEnoughMemory, match=r"GB and 0\.00 GB"):
        Engine(bundle.path, load=fakes.load, runs_here=lambda backend: True, available_bytes=2999)
    Engine(bundle.path, load=fakes.load, runs_here=lambda backend: True, available_bytes=3000)


def test_memory_for_scoring_is_asked_for_once(bundle: Bundle, fakes: Fakes) -> None:
    engine = Engine(
        bundle.path, load=fakes.load, runs_here=lambda backend: True, available_bytes=3000
    )
    list(engine.score([1, 2, 3]))
    engine._available = 10  # as after the second method took its share
    assert sum(len(rows) for rows in engine.score([1, 2, 3])) == 3


def test_scoring_is_refused_where_a_second_copy_does_not_fit(bundle: Bundle, fakes: Fakes) -> None:
    engine = Engine(
        bundle.path, load=fakes.load, runs_here=lambda backend: True, available_bytes=3000
    )
    engine._available = 10
    with pytest.raises(NotEnoughMemory):
        list(engine.score([1, 2, 3]))


def test_nothing_to_read_is_refused(engine: Engine) -> None:
    with pytest.raises(EmptyPrompt):
        engine.logits([])


@pytest.mark.parametrize("threads", [0, -1, 2**40])
def test_an_impossible_number_of_threads_is_refused(bundle: Bundle, threads: int) -> None:
    with pytest.raises(SettingError, match="from 1 to 1024"):
        Engine(bundle.path, threads=threads)


def test_what_is_available_is_at_most_what_the_machine_has() -> None:
    import psutil

    assert 0 < memory.available_bytes() <= psutil.virtual_memory().total


def test_a_tokenizer_of_another_vocabulary_is_refused(
    tmp_path: Path, tokenizer_dir: Path, fakes: Fakes
) -> None:
    from dataclasses import replace

    from tests.conftest import SHAPE

    bundle = make_bundle(
        tmp_path / "small.cloister", tokenizer_dir, shape=replace(SHAPE, vocab_size=200)
    )
    with pytest.raises(VocabularyMismatch, match=r"300.*200"):
        Engine(bundle.path, load=fakes.load, runs_here=lambda backend: True)


def write_replay(path: Path, engine: Engine, **changes: object) -> None:
    sampling = Sampling(temperature=1.0, seed=4)
    ids = answer(Session(engine), "the fox", 5, sampling=sampling)
    values = {
        "model_id": engine.model_id, "system": None, "prompt": "the fox", "max_tokens": 5,
        "sampling": sampling, "tokens": ids, **changes,
    }
    replays.write(path, **values)  # type: ignore[arg-type]


def test_a_replay_gives_the_same_tokens_and_is_readable_by_its_owner_only(
    engine: Engine, tmp_path: Path
) -> None:
    path = tmp_path / "replay.json"
    write_replay(path, engine)
    assert path.stat().st_mode & 0o777 == 0o600
    assert replays.replay(engine, path) == 5


@pytest.mark.parametrize(("changes", "match"), [
    ({"tokens": [1, 2, 3, 4, 5]}, "position 0"),
    ({"model_id": "0" * 64}, "another model"),
    ({"sampling": Sampling(temperature=1.0)}, "without a seed"),
])
def test_a_replay_that_differs_is_refused_without_quoting_it(
    engine: Engine, tmp_path: Path, changes: dict[str, object], match: str
) -> None:
    write_replay(tmp_path / "replay.json", engine, **changes)
    with pytest.raises(ReplayError, match=match) as caught:
        replays.replay(engine, tmp_path / "replay.json")
    assert "fox" not in str(caught.value)


@pytest.mark.parametrize(
    "text", ["", "[]", '{"format": 2}', '{"format": 1}', "\x00", "[" * 200_000],
    ids=["empty", "list", "format 2", "no fields", "nul", "deep"],
)
def test_a_malformed_replay_is_refused(engine: Engine, tmp_path: Path, text: str) -> None:
    path = tmp_path / "replay.json"
    path.write_text(text)
    with pytest.raises(ReplayError, match="no replay file"):
        replays.replay(engine, path)


@pytest.mark.parametrize("changes", [
    {"max_tokens": "5"}, {"max_tokens": 1.5}, {"system": 5}, {"prompt": 5}, {"tokens": 5},
    {"sampling": []}, {"sampling": {"seed": 1.5}}, {"sampling": {"top_k": "x"}},
    {"sampling": {"heat": 1}},
])
def test_a_replay_with_a_field_of_another_type_is_refused(
    engine: Engine, tmp_path: Path, changes: dict[str, object]
) -> None:
    path = tmp_path / "replay.json"
    write_replay(path, engine)
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(ReplayError, match="no replay file"):
        replays.replay(engine, path)


def test_a_replay_that_cannot_be_written_is_refused_and_leaves_nothing(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ReplayError, match="cannot be written"):
        write_replay(tmp_path / "missing" / "replay.json", engine)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(json, "dump", full)
    with pytest.raises(ReplayError, match="No space left"):
        write_replay(tmp_path / "full.json", engine)
    assert not (tmp_path / "full.json").exists()
