"""A notebook file searched for texts that passed through the lab, and for personal data.

The lab does not keep its texts for this. It keeps fingerprints: HMACs, under a key of the vault, of
every `GRAM` words in a row. Who has them and not the key learns how many there are. A text of fewer
words is found only where it stands alone, in a line, in quotes or as a value, and one of a single
word not at all, unless it is a token such as a key or a number: eight signs and a digit.

Personal data is what has a form: mail addresses, phone, card and account numbers, but for those
that are reserved for examples. Names, postal addresses and dates have none; the tier `redact` finds
those.

A finding says where and what kind, and quotes nothing.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import html
import json
import re
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import unquote

from cloister.audit.reserved import is_reserved
from cloister.corpus import normalized
from cloister.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path

__all__ = ["GRAM", "Finding", "Fingerprints", "Report", "Space", "Trail", "check", "personal",
           "personal_values"]

# Of 300 texts of other people's, 187,000 words, none has six words in a row of 9,500 stories and
# requests; twelve have five, and ninety-one have four.
GRAM = 6  # words
LIMIT_BYTES = 256 << 20  # of a notebook
TEXT = "text from the lab"
_DIGEST_BYTES = 8
_TOKEN_SIGNS = 8
_ALONE_SIGNS = 200
_NAME = b"\xfflab fingerprints"  # FF is in no text's UTF-8: no conversation is called so
_DEPTH = 2  # of encodings in each other
# Scripts that have no spaces between words: there each sign counts as one.
_WORD = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
    "\U00020000-\U0003ffff]|[^\\s\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff"
    "\uf900-\ufaff\U00020000-\U0003ffff]+")
_LETTER = re.compile(r"\w")
_INVISIBLE = re.compile(
    "[\u00ad\u200b-\u200f\u202a-\u202e\u2060-\u2064\ufeff]|\x1b\\[[0-9;]*[A-Za-z]")
_ALONE = [re.compile(marks) for marks in (
    "[\r\n]", '"', "['`]", "[<>]", "[\r\n\"]", "[\r\n'`]")]


class Space(Protocol):
    """Where fingerprints are kept; a `cloister.vault.namespace.Namespace` is one."""

    @property
    def vault(self) -> Any:
        """Its vault, whose keys give one for fingerprints."""

    def append(self, kind: Any, name: bytes, contents: Iterable[bytes]) -> object:
        """Write records of an object."""

    def records(self, kind: Any, name: bytes) -> list[bytes]:
        """Return the records of an object."""

    def forget(self, kind: Any, name: bytes) -> bool:
        """Delete an object."""


class Fingerprints:
    """Fingerprints under a key: the same words give the same ones."""

    def __init__(self, key: bytes) -> None:
        self._key = key

    def of(self, text: str) -> set[bytes]:
        """Return those that a text is found by; none of one that is too short."""
        words = _words(text)
        return self._digests(_grams(words) | _alone(words))

    def within(self, texts: Iterable[str]) -> set[bytes]:
        """Return all that texts in a file may have of others: those of their parts, too."""
        said, parts = set[str](), set[str]()
        for text in texts:
            said |= _grams(_words(text))
            for marks in _ALONE:
                parts.update(part for part in marks.split(text) if len(part) <= _ALONE_SIGNS)
        return self._digests(said.union(*(_alone(_words(part)) for part in parts)))

    def _digests(self, said: Iterable[str]) -> set[bytes]:
        return {hmac.digest(self._key, each.encode("utf-8", "replace"), "sha256")[:_DIGEST_BYTES]
                for each in said}


def _grams(words: list[str]) -> set[str]:
    """Return what tells a text wherever it stands: words in a row, and tokens."""
    tokens = {f"token {word}" for word in set(words)
              if len(word) >= _TOKEN_SIGNS and any(map(str.isdigit, word))}
    return tokens | {
        f"gram {' '.join(words[start:start + GRAM])}" for start in range(len(words) - GRAM + 1)}


def _alone(words: list[str]) -> set[str]:
    """Return what tells a text that is too short to be told by its words, where it is alone."""
    return {f"alone {' '.join(words)}"} if 1 < len(words) < GRAM else set()


class Trail:
    """The fingerprints of what passed through the lab, sealed in a namespace of the vault.

    They stay when a conversation is forgotten, since its text may lie in a file all the same. They
    go with the namespace's history when that is shredded.

    Raises:
        VaultError: see `Namespace`.
    """

    def __init__(self, space: Space, kind: object) -> None:
        """Take up what is kept as an object of `kind`: `Kind.HISTORY`."""
        self._space, self._kind = space, kind
        self.fingerprints = Fingerprints(space.vault.keys.tag("lab fingerprints"))
        self.known = {
            record[start:start + _DIGEST_BYTES] for record in space.records(kind, _NAME)
            for start in range(0, len(record), _DIGEST_BYTES)}

    def __repr__(self) -> str:
        return f"Trail({len(self.known)} fingerprints)"

    def record(self, texts: Iterable[str]) -> None:
        """Keep the fingerprints of texts, before they are shown anywhere."""
        new = set[bytes]().union(*map(self.fingerprints.of, texts)) - self.known
        if new:  # sorted: their order would tell that of the words
            self._space.append(self._kind, _NAME, [b"".join(sorted(new))])
            self.known |= new

    def forget(self) -> bool:
        """Delete all of them; False where there are none."""
        self.known.clear()
        return self._space.forget(self._kind, _NAME)


@dataclass(frozen=True, kw_only=True, order=True)
class Finding:
    """What lies in a file, and where; never what it says."""

    file: str
    cell: int  # from 1; 0 is the notebook's own
    place: str  # source, outputs, metadata, attachments, widget state
    kind: str  # TEXT, email, phone, card or account
    count: int  # of different ones; of texts: fingerprints


@dataclass(frozen=True, kw_only=True)
class Report:
    """What was searched, and found."""

    files: tuple[str, ...]
    findings: tuple[Finding, ...]
    reserved: int = 0  # addresses and numbers that are for examples, and so no findings

    def to_dict(self) -> dict[str, object]:
        """JSON-ready."""
        return {"files": list(self.files), "reserved": self.reserved,
                "findings": [asdict(each) for each in self.findings]}


def check(path: Path, trails: Iterable[Trail]) -> Report:
    """Search a notebook, and its checkpoint where there is one.

    Raises:
        DataError: it cannot be read, or is no notebook. A checkpoint that is none is searched as a
            text.
    """
    trails = list(trails)
    checkpoint = path.parent / ".ipynb_checkpoints" / f"{path.stem}-checkpoint{path.suffix}"
    reserved = set[str]()
    files, findings = [path.name], _search(path.name, _pieces(_parsed(path)), trails, reserved)
    if checkpoint.exists():
        name = f"{checkpoint.parent.name}/{checkpoint.name}"
        raw = _read(checkpoint)
        try:
            pieces = list(_pieces(_notebook(raw, checkpoint.name)))
        except DataError:  # half of it was written
            pieces = [(0, "text", raw.decode("utf-8", "replace"))]
        files.append(name)
        findings += _search(name, pieces, trails, reserved)
    return Report(
        files=tuple(files), findings=tuple(sorted(findings)), reserved=len(reserved))


def personal(text: str) -> dict[str, set[str]]:
    """Return what has the form of personal data in a text, by its kind, without its spelling."""
    return {kind: set(map(_spelt, values)) for kind, values in personal_values(text).items()}


def personal_values(text: str) -> dict[str, set[str]]:
    """Return what has the form of personal data in a text, by its kind, as it stands there."""
    found: dict[str, set[str]] = {}
    for kind, pattern, right in _PERSONAL:
        values = {match[0] for match in pattern.finditer(text) if right(match[0])}
        if values:
            found[kind] = values
        for value in values:  # a card is no phone as well
            text = text.replace(value, "\n")
    return found


def _spelt(value: str) -> str:
    return re.sub(r"[\s().-]", "", value.casefold())


def _parsed(path: Path) -> dict[str, Any]:
    return _notebook(_read(path), path.name)


def _read(path: Path) -> bytes:
    try:
        if (size := path.stat().st_size) > LIMIT_BYTES:
            raise DataError(f"{path.name} has {size:,} bytes and at most {LIMIT_BYTES:,} are "
                            "searched; clear its outputs first.")
        return path.read_bytes()
    except OSError as error:
        raise DataError(
            f"{path.name} cannot be read ({error.strerror}); check the path.") from None


def _notebook(raw: bytes, name: str) -> dict[str, Any]:
    try:
        value = json.loads(raw.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict) or not isinstance(_cells(value), list):
        raise DataError(f"{name} is no notebook; name a file that Jupyter saved.")
    return value


def _cells(notebook: dict[str, Any]) -> object:
    """Return the cells; of format 3, those of its worksheets."""
    sheets = notebook.get("worksheets")
    if not isinstance(sheets, list):
        return notebook.get("cells")
    return [cell for sheet in sheets if isinstance(sheet, dict)
            for cell in (sheet.get("cells") or [])]


def _pieces(notebook: dict[str, Any]) -> Iterator[tuple[int, str, object]]:
    """Yield every part of a notebook with its cell and place."""
    cells = _cells(notebook)
    assert isinstance(cells, list)
    for number, cell in enumerate(cells, start=1):
        parts = cell if isinstance(cell, dict) else {"source": cell}
        for name, part in parts.items():
            yield number, _PLACES.get(name, "metadata"), part
    for name, part in notebook.items():
        if name == "metadata" and isinstance(part, dict):
            yield 0, "widget state", part.get("widgets")
            yield 0, "metadata", {key: value for key, value in part.items() if key != "widgets"}
        elif name not in ("cells", "worksheets"):
            yield 0, "metadata", {name: part}


_PLACES = {
    "source": "source", "input": "source", "outputs": "outputs", "attachments": "attachments"}


def _search(
    file: str, pieces: Iterable[tuple[int, str, object]], trails: list[Trail], reserved: set[str],
) -> list[Finding]:
    """Return what is found; what is for examples goes to `reserved`."""
    places: dict[tuple[int, str], set[str]] = {}
    for cell, place, part in pieces:
        places.setdefault((cell, place), set()).update(_texts(part))
    findings = []
    for (cell, place), texts in places.items():
        readings = _readings(texts)
        hits: dict[str, set[str]] = {}
        if trails:  # of one vault, and so under one key
            same = trails[0].fingerprints.within(readings).intersection(
                set[bytes]().union(*(trail.known for trail in trails)))
            hits[TEXT] = {digest.hex() for digest in same}
        for text in readings:
            for kind, values in personal_values(text).items():
                examples = {value for value in values if is_reserved(kind, value)}
                reserved.update(map(_spelt, examples))
                hits.setdefault(kind, set()).update(map(_spelt, values - examples))
        findings += [
            Finding(file=file, cell=cell, place=place, kind=kind, count=len(values))
            for kind, values in hits.items() if values]
    return findings


def _texts(value: object) -> Iterator[str]:
    """Yield every text in a part of a notebook, and what parts of a text make together.

    A text may be a list of its lines, or lie in pieces in the outputs of a stream.
    """
    left = [value]
    while left:
        node = left.pop()
        if isinstance(node, str):
            yield node
        elif isinstance(node, int | float) and not isinstance(node, bool):
            yield str(node)
        elif isinstance(node, dict):
            yield from node
            left += [part for name, part in node.items() if not _is_picture(name)]
        elif isinstance(node, list):
            lines = [part for part in node if isinstance(part, str)]
            yield "".join(lines)
            if not all(line.endswith("\n") for line in lines[:-1]):
                yield "\n".join(lines)
            left += [part for part in node if not isinstance(part, str)]
            for name in {name for part in node if isinstance(part, dict) for name in part}:
                yield "".join(
                    _joined(part[name]) for part in node if isinstance(part, dict) and name in part)


def _joined(value: object) -> str:
    if isinstance(value, list):
        return "".join(part for part in value if isinstance(part, str))
    return value if isinstance(value, str) else ""


def _is_picture(name: str) -> bool:
    return name.startswith(("image/", "audio/", "video/")) and name != "image/svg+xml"


def _readings(texts: Iterable[str]) -> set[str]:
    """Return texts, and what they are when they are read as one of the forms that files have."""
    found = new = {_INVISIBLE.sub("", text) for text in texts}
    for _ in range(_DEPTH):
        others = set[str]()
        for text in new:
            others.update(decode(text) for form, decode in _FORMS if form.search(text))
            others.update(_decoded(run) for run in _RUN.findall(text))
        new = {_INVISIBLE.sub("", text) for text in others} - found - {""}
        found = found | new
    return found


def _unescaped(text: str) -> str:
    """Read the escapes of JSON and Python."""
    def sign(match: re.Match[str]) -> str:
        if match[1]:
            number = int(match[1][1:], 16)
            return chr(number) if number < 0x110000 else ""
        return {"n": "\n", "t": "\t", "r": "\r"}.get(match[2], match[2])

    read = re.sub(r"\\(?:(u[0-9a-fA-F]{4}|x[0-9a-fA-F]{2}|U[0-9a-fA-F]{8})|(.))", sign, text)
    # JSON spells a sign beyond 16 bits as two.
    return read.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _decoded(run: str) -> str:
    """Return the text that a run of base64 or hexadecimal stands for; none for other bytes."""
    try:
        if re.fullmatch(r"(?:[0-9a-fA-F]{2})+", run):
            raw = bytes.fromhex(run)
        else:
            whole = run.rstrip("=").translate(str.maketrans("-_", "+/"))
            raw = base64.b64decode(whole[:len(whole) - (len(whole) % 4 == 1)] + "==")
        return raw.decode("utf-16-le" if raw[1::2].count(0) > len(raw) // 4 else "utf-8")
    except (binascii.Error, UnicodeDecodeError):
        return ""


_RUN = re.compile(r"[A-Za-z0-9+/_-]{24,}={0,2}")
_TAG = re.compile(r"<[/!]?[A-Za-z][^<>]*>")
_FORMS: tuple[tuple[re.Pattern[str], Callable[[str], str]], ...] = (
    (re.compile(r"&#?\w+;"), html.unescape), (re.compile(r"\\"), _unescaped),
    (re.compile("%[0-9a-fA-F]{2}"), unquote),
    (_TAG, lambda text: html.unescape(_TAG.sub("", text))),
    (_TAG, lambda text: html.unescape(_TAG.sub(" ", text))),
)


def _words(text: str) -> list[str]:
    if text.isascii():  # the same, many times sooner
        return re.findall(r"\w+", text.lower())
    # What is all punctuation comes back as it was.
    return [word for word in _WORD.findall(normalized(text)) if _LETTER.search(word)]


def _luhn(text: str) -> bool:
    """Check the last digit of a card's number (ISO/IEC 7812-1)."""
    digits = [int(sign) for sign in text if sign.isdigit()]
    doubled = [sum(divmod(2 * digit, 10)) for digit in digits[-2::-2]]
    return len(digits) >= 13 and (sum(digits[::-2]) + sum(doubled)) % 10 == 0


def _account(text: str) -> bool:
    """Tell whether a number has its country's length, or its check digits (ISO 13616-1)."""
    number = re.sub(r"\s", "", text).upper()
    if _ACCOUNT_SIGNS.get(number[:2]) == len(number):
        return True
    return int("".join(str(int(sign, 36)) for sign in number[4:] + number[:4])) % 97 == 1


_ACCOUNT_SIGNS = {
    "AT": 20, "BE": 16, "CH": 21, "DE": 22, "DK": 18, "ES": 24, "FI": 18, "FR": 27, "GB": 22,
    "IE": 22, "IT": 27, "LU": 20, "NL": 18, "NO": 15, "PL": 28, "PT": 25, "SE": 24}
_PHONES = (
    r"\+\d{1,3}(?:[ .()-]{0,2}\d){7,12}", r"\(\d{2,4}\)[ -]?\d{3}[ -]?\d{4}",
    r"\d{3}([-. ])\d{3}\1\d{4}", r"0\d{1,4}(?:[ -]\d{2,8}){1,4}", r"0\d{9,10}",
)
_PERSONAL: tuple[tuple[str, re.Pattern[str], Callable[[str], bool]], ...] = (
    ("email", re.compile(
        r"(?<![\w.+-])(?!git@)[\w.+-]{1,64}@(?:[\w-]{1,63}\.){1,8}[A-Za-z]{2,24}(?![\w-])"),
     lambda text: True),
    ("account", re.compile(
        r"(?<!\w)[A-Z]{2}\d{2} ?[A-Z0-9]{4}(?: ?(?=[A-Z]{0,3}\d)[A-Z0-9]{4}){1,6}"
        r"(?: ?\d[A-Z0-9]{0,2})?(?!\w)", re.IGNORECASE),
     _account),
    ("card", re.compile(r"(?<![\w.+-])(?:[3-6]|2[2-7])(?:[ -]?\d){11,18}(?![\w-])"),
     _luhn),
    ("phone", re.compile(
        rf"(?<![\w.+-])(?<!\d )(?:{'|'.join(_PHONES)})(?![\w-]|[. ]\d)"),
     lambda text: 8 <= sum(map(str.isdigit, text)) <= 15),
)
