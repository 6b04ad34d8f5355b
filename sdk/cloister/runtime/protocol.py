"""What a worker and its client say to each other: one JSON object a line, typed and bounded.

The client speaks first, with `Hello`, and is answered with `Welcome`. Every later request has an id
of its own, and is answered by events of that id: any number of `Produced`, then one of the others.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, TypeVar

import msgspec

from cloister.errors import CloisterError, ProtocolError
from cloister.guard import Attempt  # noqa: TC001  # msgspec reads the annotations
from cloister.message import Message  # noqa: TC001
from cloister.pieces import MediaFormats  # noqa: TC001
from cloister.runtime.chat import Ask, Stats, Token  # noqa: TC001
from cloister.runtime.draft import AUTO
from cloister.runtime.prompt import Count as Tokens  # noqa: TC001

if TYPE_CHECKING:
    from typing import IO

__all__ = [
    "LIMIT_BYTES", "VERSION", "Answered", "Begin", "Begun", "Cancel", "Count", "Counted", "End",
    "Ended", "Event", "Failed", "Forget", "Hello", "Load", "Loaded", "Probe", "Probed", "Produced",
    "Question", "Record", "Recorded", "Request", "Unlock", "Unlocked", "Welcome", "check",
    "decode_event", "decode_request", "encode", "id_of", "read_line",
]

_T = TypeVar("_T")
VERSION = 5
LIMIT_BYTES = 64 << 20  # of a line: three pictures of 17 tiles of 512 x 512 in base64
_MALFORMED = "A message between worker and client is malformed; update both ends."


class _Wire(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="type",
    tag=str.lower,
):
    def __repr__(self) -> str:  # without passphrases and texts
        return f"{type(self).__name__}(id={getattr(self, 'id', None)})"


class Hello(_Wire, frozen=True):
    """The client's first word."""

    version: int = VERSION
    vault: bool = True  # one may be opened, for which a key store may be asked


class Load(_Wire, frozen=True):
    """Load a bundle in place of the one that is loaded; its conversations end."""

    id: int
    bundle: str
    threads: int | None = None
    draft: str = AUTO  # see `Engine`


class Unlock(_Wire, frozen=True):
    """Open the vault, which is made where there is none."""

    id: int
    passphrase: str | None = None


class Begin(_Wire, frozen=True):
    """Begin a conversation, or go on with the one that is kept under `name`."""

    id: int
    chat: int  # its number from now on, chosen by the client
    system: str | None = None
    messages: tuple[Message, ...] = ()
    namespace: str = "default"
    name: str | None = None
    cached: bool = False
    kv: str = "float32"


class Question(_Wire, frozen=True):
    """Answer `ask` in a conversation."""

    id: int
    chat: int
    ask: Ask


class Count(_Wire, frozen=True):
    """Count the tokens of a question in a conversation, and do not answer it."""

    id: int
    chat: int
    ask: Ask


class Cancel(_Wire, frozen=True):
    """End the request `id` as soon as possible, begun or not; it is answered all the same."""

    id: int


class End(_Wire, frozen=True):
    """Let go of a conversation."""

    id: int
    chat: int


class Forget(_Wire, frozen=True):
    """Delete what was said in a conversation, and is kept of it; answered with `Begun`."""

    id: int
    chat: int


class Record(_Wire, frozen=True):
    """Keep fingerprints of texts, by which they are found in notebooks (`cloister lab check`)."""

    id: int
    texts: tuple[str, ...]
    namespace: str = "default"


class Probe(_Wire, frozen=True):
    """Try now to reach out of the process."""

    id: int


class Welcome(_Wire, frozen=True):
    """The worker's first word: how it guards itself, before it has read anything else."""

    version: int
    guard_tier: int
    guard: str  # why it is that tier
    evidence: dict[str, str]  # what was tried, and how it went
    memory: dict[str, str]  # how each attempt to keep it out of dumps went


class Loaded(_Wire, frozen=True):
    """A bundle is loaded."""

    id: int
    model_id: str
    backend: str
    context: int  # tokens
    media: MediaFormats | None  # what it takes besides text
    load_s: float
    peak_rss_bytes: int


class Unlocked(_Wire, frozen=True):
    """The vault is open."""

    id: int
    provider: str
    notice: str | None  # of a vault that was made now: who holds its key, and what that means
    memory: dict[str, str]


class Begun(_Wire, frozen=True):
    """A conversation goes on after `messages`."""

    id: int
    messages: tuple[Message, ...]
    restored_tokens: int


class Counted(_Wire, frozen=True):
    """The tokens of a question."""

    id: int
    count: Tokens


class Produced(_Wire, frozen=True):
    """The next token of an answer."""

    id: int
    token: Token


class Answered(_Wire, frozen=True):
    """An answer is over; `kept` is what the conversation has now behind what was gone on from."""

    id: int
    stats: Stats
    kept: tuple[Message, ...]


class Ended(_Wire, frozen=True):
    """A conversation was let go of."""

    id: int


class Recorded(_Wire, frozen=True):
    """Texts have their fingerprints in the vault."""

    id: int


class Probed(_Wire, frozen=True):
    """What was tried, and how each attempt went."""

    id: int
    attempts: tuple[Attempt, ...]


class Failed(_Wire, frozen=True):
    """A request failed with an error of ours; what was answered before is kept all the same."""

    id: int | None  # None where it could not be read
    kind: str
    message: str
    kept: tuple[Message, ...] = ()
    stats: Stats | None = None  # of an answer


Request = (Hello | Load | Unlock | Begin | Question | Count | Cancel | End | Forget | Record
           | Probe)
Event = (Welcome | Loaded | Unlocked | Begun | Counted | Produced | Answered | Ended | Recorded
         | Probed | Failed)

_ID = re.compile(rb'\{"type":"[a-z]+","id":(\d{1,18})[,}]')
_ENCODER = msgspec.json.Encoder()
_REQUESTS: msgspec.json.Decoder[Request] = msgspec.json.Decoder(Request)
_EVENTS: msgspec.json.Decoder[Event] = msgspec.json.Decoder(Event)


def encode(record: Request | Event) -> bytes:
    """Return the line of a record.

    Raises:
        ProtocolError: it is over LIMIT_BYTES, or holds what JSON has not.
    """
    try:
        line = _ENCODER.encode(record) + b"\n"
    except (TypeError, ValueError, OverflowError, RecursionError):
        raise ProtocolError(
            "A request holds a value that cannot be sent to a worker; use texts, numbers, lists "
            "and objects."
        ) from None
    if len(line) > LIMIT_BYTES:
        raise ProtocolError(
            f"A message of {len(line):,} bytes is over the {LIMIT_BYTES:,} that a worker takes; "
            "shorten it."
        )
    return line


def read_line(stream: IO[bytes]) -> bytes | None:
    """Read the next line; None at the end of the stream.

    Raises:
        ProtocolError: it is over LIMIT_BYTES; the rest of it is passed over.
    """
    line = stream.readline(LIMIT_BYTES)
    if not line:
        return None
    if line.endswith(b"\n"):
        return line
    while (rest := stream.readline(LIMIT_BYTES)) and not rest.endswith(b"\n"):
        pass
    if len(line) < LIMIT_BYTES:  # the other end died within a line
        return None
    raise ProtocolError(f"A message is over the {LIMIT_BYTES:,} bytes that a worker takes.")


def decode_request(line: bytes) -> Request:
    """Read what a client sent.

    Raises:
        ProtocolError: it is malformed, or none of the requests.
    """
    request = _decode(_REQUESTS, line)
    try:  # the records forbid unknown fields; the plain dataclasses in them cannot
        known = _all_known(msgspec.json.decode(line), msgspec.to_builtins(request))
    except RecursionError:
        known = False
    if not known:
        raise ProtocolError(_MALFORMED)
    return request


def id_of(line: bytes) -> int | None:
    """Read the id of a request that cannot be read otherwise, so that it is answered."""
    found = _ID.match(line)
    return int(found[1]) if found else None


def check(request: Request) -> bytes:
    """Return the line of a request that a worker will understand.

    Raises:
        ProtocolError: see `encode`; or a value is of another type than it has to be.
    """
    line = encode(request)
    try:
        decode_request(line)
    except ProtocolError:
        raise ProtocolError(
            "A request holds a value of another type than it has to be, or nested too deeply; "
            "correct it."
        ) from None
    return line


def decode_event(line: bytes) -> Event:
    """Read what a worker sent.

    Raises:
        ProtocolError: it is malformed, or none of the events.
    """
    return _decode(_EVENTS, line)


def _decode(decoder: msgspec.json.Decoder[_T], line: bytes) -> _T:
    try:
        return decoder.decode(line)
    except (msgspec.MsgspecError, CloisterError, UnicodeDecodeError, RecursionError):
        raise ProtocolError(_MALFORMED) from None  # its own words might quote the line


def _all_known(sent: object, read: object) -> bool:
    """Whether every field of what was sent is in what was read of it."""
    if isinstance(sent, dict):
        return isinstance(read, dict) and all(
            key in read and _all_known(value, read[key]) for key, value in sent.items())
    if isinstance(sent, list) and isinstance(read, list | tuple):
        return all(map(_all_known, sent, read))
    return True
