"""Runs of the lab in the vault: each an object with a key of its own, to be forgotten alone.

A run has one of `MOST_RUNS` places. Which are taken the vault tells, so there is no list that could
differ from what is there. Of an object, record 0 is what a list shows, and record 1 is all of it.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING

import msgspec

from cloister.errors import CloisterError, SettingError, VaultDamaged, VaultError
from cloister.records import Finite, Record, Whole, build, parse
from cloister.vault.namespace import Kind
from cloister_jupyter.events import Delta, Ended, Ready, Refused

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from typing import TypeVar

    from cloister.vault.namespace import Namespace
    from cloister_jupyter.events import Event
    from cloister_jupyter.request import Request

    _T = TypeVar("_T", bound=Record)

__all__ = ["MOST_RUNS", "History", "KeptAnswer", "KeptRun", "Line", "run_of"]

MOST_RUNS = 1000
RUN_BYTES = 16 << 20
_FORMAT = 1
_WORDS = 80  # characters of a prompt that a list shows


class KeptAnswer(Record, frozen=True):
    """What a tier answered, and what it took; of one that could not, why."""

    tier: str
    text: str
    finish: str = ""  # end, length, context or stop; empty where it was refused or not asked
    error: str = ""
    load_s: Finite | None = None  # None: it was warm
    prompt_tokens: Whole = 0
    tokens: Whole = 0
    ttft_s: Finite = 0.0
    tokens_per_s: Finite | None = None
    peak_rss_bytes: Whole = 0
    bundle_bytes: Whole = 0

    def __repr__(self) -> str:
        return f"KeptAnswer(tier={self.tier!r})"


class KeptRun(Record, frozen=True):
    """A request and its answers, as they are kept. Its repr shows no text."""

    run: str
    at_s: Finite  # since 1970, when it ended
    prompt: str
    system: str | None
    sampling: dict[str, int | float | None]
    max_tokens: Whole | None
    stopped: bool
    answers: tuple[KeptAnswer, ...]
    format: int = _FORMAT

    def __repr__(self) -> str:
        return f"KeptRun(run={self.run!r})"

    def rows(self) -> list[dict[str, object]]:
        """Return a record for each answer, for a file."""
        return [{
            "when": datetime.fromtimestamp(self.at_s, UTC).isoformat(timespec="seconds"),
            "tier": each.tier, "system": self.system, "prompt": self.prompt,
            "answer": each.text, **{
                name: getattr(each, name) for name in each.__struct_fields__[2:]},
            "max_tokens": self.max_tokens, **self.sampling,
        } for each in self.answers]


class Line(Record, frozen=True):
    """What a list shows of a run."""

    run: str
    at_s: Finite
    tiers: tuple[str, ...]
    words: str  # the first of the prompt
    size_bytes: Whole  # of all of it
    format: int = _FORMAT

    def __repr__(self) -> str:
        return f"Line(run={self.run!r})"


def run_of(
    request: Request, events: Iterable[Event], names: Mapping[str, str], *, at_s: float,
    stopped: bool,
) -> KeptRun:
    """Return what is kept of a run, out of what was told of it; `names` are the columns'.

    Branches are not: they are no answers to the request.
    """
    texts, took = dict.fromkeys(request.columns, ""), dict[str, dict[str, object]]()
    for event in events:
        if getattr(event, "column", None) not in texts:
            continue
        if isinstance(event, Delta):
            texts[event.column] += "".join(event.texts)
        elif isinstance(event, Ready):
            took[event.column] = {"load_s": event.load_s}
        elif isinstance(event, Refused):
            took[event.column] = {"error": f"{event.kind}: {event.message}"}
        elif isinstance(event, Ended):
            took.setdefault(event.column, {}).update(
                (name, getattr(event, name)) for name in KeptAnswer.__struct_fields__
                if hasattr(event, name))
    return KeptRun(
        run=request.run, at_s=at_s, prompt=request.message.shown, system=request.system,
        sampling={name: getattr(request.sampling, name)
                  for name in request.sampling.__dataclass_fields__},
        max_tokens=request.max_tokens, stopped=stopped,
        answers=tuple(
            KeptAnswer(tier=names[column], text=text, **took.get(column, {}))  # type: ignore[arg-type]
            for column, text in texts.items()))


class History:
    """The runs that are kept in a namespace.

    Raises (from its methods):
        VaultError: see `Namespace`.
    """

    def __init__(self, space: Namespace) -> None:
        self._space = space

    def keep(self, run: KeptRun) -> None:
        """Keep a run: it is on the disk before this returns.

        Raises:
            SettingError: there are MOST_RUNS, or it is too large; nothing is kept of it.
        """
        body = msgspec.json.encode(run)
        if len(body) > RUN_BYTES:
            raise SettingError(
                f"The run has {len(body):,} bytes and at most {RUN_BYTES:,} are kept; this one is "
                "not.")
        head = Line(
            run=run.run, at_s=run.at_s, tiers=tuple(each.tier for each in run.answers),
            words=run.prompt[:_WORDS], size_bytes=len(body))
        records = [msgspec.json.encode(head), body]
        for place in map(_name, range(MOST_RUNS)):
            # Another lab may take the place meanwhile: nothing is written over.
            if not self._space.has(Kind.HISTORY, place) and self._space.append(
                    Kind.HISTORY, place, records, after=0):
                return
        raise SettingError(
            f"{MOST_RUNS:,} runs are kept and there is room for no more; delete some in History.")

    def lines(self) -> list[tuple[int, Line | str]]:
        """Return the runs by their places, the newest first; of one that cannot be read, why."""
        found: list[tuple[int, Line | str]] = []
        for place in self._places():
            try:
                found.append((place, self._read(place, 0, Line)))
            except VaultError as error:
                found.append((place, str(error)))
        return sorted(found, key=lambda item: (
            -item[1].at_s if isinstance(item[1], Line) else float("inf"), item[0]))

    def open(self, place: int) -> KeptRun:
        """Return a run.

        Raises:
            SettingError: it is there no more.
            VaultDamaged: it is not what was written, or another release wrote it.
        """
        return self._read(place, 1, KeptRun)

    def find(self, words: str) -> list[int]:
        """Return the places of the runs with all of some words, in whatever letters."""
        wanted, found = words.casefold().split(), []
        for place in self._places():
            try:
                run = self.open(place)
            except CloisterError:
                continue
            text = "\n".join((run.prompt, run.system or "", *(
                part for each in run.answers for part in (each.tier, each.text)))).casefold()
            if all(word in text for word in wanted):
                found.append(place)
        return found

    def forget(self, places: Sequence[int], runs: Mapping[int, str]) -> int:
        """Delete runs and their keys, all at the same moment; return how many there were.

        `runs` says which run a list showed at a place: another that has taken it since stays.
        """
        names = []
        for place in places:
            try:
                run = self._read(place, 0, Line).run
            except SettingError:
                continue
            except VaultError:
                run = ""
            if runs.get(place, run) == run:
                names.append((Kind.HISTORY, _name(place)))
        # Of the object that is named first the records are read, which may be damaged: of none.
        self._space.forget(Kind.HISTORY, _name(MOST_RUNS), also=lambda records: names)
        return len(names)

    def _places(self) -> Iterator[int]:
        return (place for place in range(MOST_RUNS) if self._space.has(
            Kind.HISTORY, _name(place)))

    def _read(self, place: int, number: int, kind: type[_T]) -> _T:
        raw = self._space.get(Kind.HISTORY, _name(place), number=number)
        if raw is None:
            raise SettingError("That run is kept no more; list the history anew.")
        record = parse(raw, limit_bytes=2 * RUN_BYTES, refuse=_damaged)
        if record.get("format") != _FORMAT:
            raise VaultDamaged(
                "This run was kept by another release (its format is not "
                f"{_FORMAT}); read it with that one, or delete it.")
        return build(record, kind, refuse=_damaged)


def _name(place: int) -> bytes:
    # No conversation is called so: FF is in no text's UTF-8.
    return b"\xfflab run %d" % place


def _damaged(complaint: str) -> VaultDamaged:
    return VaultDamaged(f"This run is not as it was kept ({complaint}); delete it.")
