"""What worker and client say arrives as it was said, and anything else is named."""

from __future__ import annotations

import io
import json
import traceback
from typing import Any

import pytest
from tests.unit.runtime.conftest import MEDIA

from cloister.errors import ProtocolError
from cloister.guard import Attempt
from cloister.message import Message, ToolCall
from cloister.parts import Picture, Recording
from cloister.runtime import protocol
from cloister.runtime.chat import Ask, Sampling, Stats, Token
from cloister.runtime.prompt import Count
from cloister.runtime.protocol import LIMIT_BYTES

SECRET = "a most private word"
TALK = (
    Message(role="system", content="call"), Message(role="user", content=SECRET + " \u4f60\n\0"),
    Message(role="assistant", content="{}", tool_calls=(
        ToolCall(name="f", arguments={"a": [1, 2.5, None, True, {"b": "c"}]}),)),
    Message(role="tool", content="[]", name="f"),
    Message(role="user", content=(
        SECRET, Picture(data=bytes(range(72)), height=4, width=6), "",
        Picture(data=bytes(216), height=4, width=6, grid=(1, 2)),
        Picture(data=bytes(144), height=4, width=6, lines=2),
        Recording(data=b"\0\1\2\3", rate=100))))
ASK = Ask(
    messages=TALK, max_tokens=5, top=3, after=2, forced=(7, 0, 299),
    sampling=Sampling(temperature=0.7, top_k=3, top_p=0.5, min_p=0.1, repetition_penalty=1.3,
                      seed=2**62),
    tools=({"name": "f", "parameters": {"type": "object"}},))
REQUESTS: list[Any] = [
    protocol.Hello(), protocol.Hello(version=9),
    protocol.Load(id=1, bundle="/a/b.cloister"),
    protocol.Load(id=1, bundle="b", threads=2, draft="lookup"),
    protocol.Unlock(id=2), protocol.Unlock(id=2, passphrase="\u00fcber"),
    protocol.Begin(id=3, chat=4), protocol.Begin(
        id=3, chat=4, system="call", messages=TALK, namespace="me", name="work", cached=True,
        kv="int8"),
    protocol.Question(id=5, chat=4, ask=ASK),
    *(protocol.Question(id=5, chat=4, ask=Ask(messages=TALK[1:2], **{constraint: value}))
      for constraint, value in (
          ("schema", {"enum": [1, None, "a"]}), ("grammar", 'start: "a"'),
          ("choices", ["a", "b"]))),
    protocol.Cancel(id=5), protocol.End(id=6, chat=4), protocol.Probe(id=9),
    protocol.Forget(id=7, chat=4), protocol.Record(id=8, texts=(SECRET,), namespace="me"),
    protocol.Count(id=5, chat=4, ask=ASK),
]
EVENTS: list[Any] = [
    protocol.Welcome(version=2, guard_tier=1, guard="seccomp", evidence={"b": "c"},
        memory={"a": "done"}),
    protocol.Loaded(
        id=1, model_id="0" * 64, backend="xnnpack", context=64, media=None, load_s=0.5,
        peak_rss_bytes=1),
    protocol.Unlocked(id=2, provider="keyfile", notice=None, memory={}),
    protocol.Begun(id=3, messages=TALK, restored_tokens=7),
    protocol.Produced(id=5, token=Token(1, SECRET, -0.25, ((1, -0.25), (2, -3.0)), 1)),
    protocol.Answered(
        id=5, stats=Stats(tokens=3, finish="end", ttft_s=0.1, decode_s=0.2), kept=TALK[1:3]),
    protocol.Ended(id=6), protocol.Recorded(id=8),
    protocol.Probed(id=9, attempts=(Attempt(name="a way", refused=True, how="refused"),)),
    protocol.Failed(id=None, kind="SettingError", message="no"),
    protocol.Failed(id=5, kind="EngineBusy", message="no", kept=TALK[1:3]),
    protocol.Loaded(
        id=1, model_id="0" * 64, backend="xnnpack", context=64, media=MEDIA, load_s=0.5,
        peak_rss_bytes=1),
    protocol.Counted(id=5, count=Count(text=3, picture=12, pictures=1)),
]


def kind(record: object) -> str:
    return type(record).__name__


@pytest.mark.parametrize("record", REQUESTS, ids=kind)
def test_every_request_arrives_as_it_was_sent(record: Any) -> None:
    line = protocol.encode(record)
    assert line.count(b"\n") == 1
    got = protocol.decode_request(line)
    assert type(got) is type(record)
    assert protocol.encode(got) == line


@pytest.mark.parametrize("record", EVENTS, ids=kind)
def test_every_event_arrives_as_it_was_sent(record: Any) -> None:
    assert protocol.decode_event(protocol.encode(record)) == record


def test_every_record_is_tried() -> None:
    tried = {kind(record) for record in [*REQUESTS, *EVENTS]}
    assert tried == {each.__name__ for each in (
        *protocol.Request.__args__, *protocol.Event.__args__)}


def changed(record: Any, **changes: object) -> bytes:
    return json.dumps({**json.loads(protocol.encode(record)), **changes}).encode() + b"\n"


@pytest.mark.parametrize("line", [
    b"", b"\n", b"{}\n", b"[]\n", b"null\n", b"\xff\xfe\n", b'{"type": "load", "id"\n',
    b'{"id": 1}\n', b'{"type": "shred", "id": 1}\n', b'{"type": 5}\n', b"[" * 100_000,
    b'{"type": "cancel", "id": "1"}\n', b'{"type": "cancel"}\n',
    b'{"type": "cancel", "id": 1.5}\n', changed(protocol.Cancel(id=1), secret=SECRET),
    changed(protocol.Load(id=1, bundle="b"), bundle=5),
    changed(protocol.Begin(id=1, chat=2), messages=[{"role": "user"}]),
    changed(REQUESTS[8], ask={"messages": []}),
    changed(REQUESTS[8], ask={"messages": [{"role": "user", "content": SECRET}], "max_tokens": 0}),
    changed(REQUESTS[8], ask={"messages": [{"role": "user", "content": SECRET}],
                              "sampling": {"temprature": 1.0}}),
    changed(REQUESTS[8], ask={"messages": [{"role": "user", "content": SECRET, SECRET: 1}]}),
    changed(REQUESTS[8], ask={"messages": [{"role": "user", "content": SECRET}],
                              "sampling": {"temperature": -1.0}}),
    changed(REQUESTS[8], ask={"messages": [{"role": "user", "content": SECRET}], "schema": {},
                              "choices": [SECRET]}),
    protocol.encode(EVENTS[0]),
], ids=range(24))
def test_a_request_that_is_none_is_refused_without_quoting_it(line: bytes) -> None:
    with pytest.raises(ProtocolError) as caught:
        protocol.decode_request(line)
    assert SECRET not in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize("line", [
    b"{}\n", b"traceback\n", protocol.encode(REQUESTS[0]), changed(EVENTS[4], secret=SECRET),
    changed(EVENTS[4], token=SECRET), changed(EVENTS[5], kept=[SECRET]),
], ids=range(6))
def test_an_event_that_is_none_is_refused_without_quoting_it(line: bytes) -> None:
    with pytest.raises(ProtocolError) as caught:
        protocol.decode_event(line)
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize("record", [
    protocol.Question(id=1, chat=2, ask=Ask(messages=TALK[1:2], schema={"enum": [object()]})),
    protocol.Question(id=1, chat=2, ask=Ask(messages=TALK[1:2], schema={"enum": ["\ud800"]})),
    protocol.Begin(id=1, chat=2, system=SECRET + "\ud800"),
    protocol.Load(id=1, bundle="\udcff"),
], ids=range(4))
def test_what_json_has_not_is_refused_before_it_is_sent(record: Any) -> None:
    with pytest.raises(ProtocolError, match="cannot be sent") as caught:
        protocol.encode(record)
    assert SECRET not in str(caught.value)


def test_a_line_over_the_limit_is_refused_before_it_is_sent() -> None:
    with pytest.raises(ProtocolError, match=r"[\d,]+ bytes is over the 67,108,864"):
        protocol.encode(protocol.Begin(id=1, chat=2, system="x" * LIMIT_BYTES))
    room = LIMIT_BYTES - len(protocol.encode(protocol.Begin(id=1, chat=2, system="")))
    line = protocol.encode(protocol.Begin(id=1, chat=2, system="x" * room))
    assert len(line) == LIMIT_BYTES
    assert protocol.read_line(io.BytesIO(line)) == line


def test_a_line_over_the_limit_is_passed_over_when_it_is_read() -> None:
    after = protocol.encode(protocol.Cancel(id=1))
    for length in (LIMIT_BYTES, 3 * LIMIT_BYTES + 5):
        stream = io.BytesIO(b"x" * length + b"\n" + after)
        with pytest.raises(ProtocolError, match="over the 67,108,864"):
            protocol.read_line(stream)
        assert protocol.read_line(stream) == after
        assert protocol.read_line(stream) is None


def test_a_line_whose_writer_died_is_none() -> None:
    assert protocol.read_line(io.BytesIO(b'{"type": "canc')) is None
    assert protocol.read_line(io.BytesIO(b"")) is None
