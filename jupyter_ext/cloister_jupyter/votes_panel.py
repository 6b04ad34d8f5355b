"""The vote's tab: tiers are asked, then their answers shown side by side without their names.

Until the end no message to the page tells which tier an answer is of, or what it took: order, time
and memory would tell, too. Only this process knows.

From the page come `votes.begin`, `votes.resume` (by name), `votes.stop`, `votes.vote`,
`votes.undo`, `votes.reveal`, `votes.leave`, `votes.forget` and `votes.take` (the prompts of the
other tabs); it is sent `votes.kept` (the names of what can be resumed), `votes.taken`,
`votes.state`, `votes.revealed` and `votes.invalid`.
"""

from __future__ import annotations

import secrets
import statistics
import threading
import time
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import msgspec

from cloister.errors import CloisterError, SettingError
from cloister_jupyter.ballot import MOST_PAIRS, Ballot
from cloister_jupyter.cases import Case, Template
from cloister_jupyter.grid import Grid, Plan
from cloister_jupyter.later import LaterPanel
from cloister_jupyter.sent import Sent, read
from cloister_jupyter.votes import Vote
from cloister_jupyter.votes_kept import Form, KeptVotes

if TYPE_CHECKING:
    from collections.abc import Callable

    from cloister_jupyter.panels import Lab

__all__ = ["VotesPanel"]

_PROGRESS_S = 0.25


class _Begin(Sent, frozen=True, tag="votes.begin"):
    """What the page sends to begin."""

    prompts: tuple[str, ...]
    system: str
    columns: tuple[str, ...]  # ids
    max_tokens: Annotated[int, msgspec.Meta(ge=1)]
    name: str  # to keep it under; empty: it is not kept


class _Comparison:
    """A vote: what is asked, and the ballot of it."""

    def __init__(self, form: Form, name: str) -> None:
        self.form, self.name = form, name
        self.plan = Plan(
            prompts=(Template("{prompt}"),), system=form.system or None,
            max_tokens=form.max_tokens, cases=tuple(
                Case(line=line, values={"prompt": prompt})
                for line, prompt in enumerate(form.prompts, start=1)))
        self.ballot = Ballot(form.tiers, len(form.prompts), form.seed)
        self.grid: Grid | None = None
        self.asked, self.asking = 0, True
        self.stopping = threading.Event()

    def stop(self) -> None:
        self.stopping.set()
        if self.grid is not None:
            self.grid.stop()


class VotesPanel(LaterPanel):
    """Blind comparison of tiers; see the module."""

    name: ClassVar[str] = "votes"

    def __init__(self, lab: Lab) -> None:
        super().__init__(lab)
        self._lock = threading.RLock()  # of the comparison, and of the order of messages
        self._shown: _Comparison | None = None
        self._names = list[str]()  # of what is kept
        self._kept = None if lab.space is None else KeptVotes(lab.space)

    def open(self) -> None:
        """Tell all to a page that opened."""
        self.later(self._tell_kept)
        with self._lock:
            self._tell()

    @property
    def kept(self) -> str:
        """What is kept of votes, in words for the badge."""
        count = len(self._names)
        return f"{count} named vote{'s' * (count > 1)} with prompts and answers" if count else ""

    def results(self) -> list[dict[str, object]]:
        """Return the votes with their texts; none before the names are shown."""
        shown = self._shown
        if shown is None or not shown.ballot.revealed:
            return []
        return [{
            "asked": shown.form.prompts[each.pair.item], "left": each.pair.left,
            "right": each.pair.right, "vote": str(each.vote),
            **dict(zip(("left answer", "right answer"), shown.ballot.answers(each.pair),
                       strict=True)),
        } for each in shown.ballot.votes]

    def close(self) -> None:
        """Stop asking."""
        with self._lock:
            if self._shown is not None:
                self._shown.stop()
        super().close()

    def receive(self, content: dict[str, Any]) -> None:
        """Do what the page asks for; see `Panel.receive`."""
        with self._lock:
            match content:
                case {"type": "votes.begin"}:
                    self._begin(content)
                case {"type": "votes.resume", "name": str(name)} if self._kept is not None:
                    self._leave()
                    self.later(self._resume, name)
                case {"type": "votes.forget", "name": str(name)} if self._kept is not None:
                    self._leave()
                    self.later(self._forget, name)
                case {"type": "votes.take"}:
                    self.later(self._take)
                case {"type": "votes.leave"}:
                    self._leave()
                case {"type": "votes.stop"}:
                    if self._shown is not None:
                        self._shown.stop()
                case {"type": "votes.vote", "number": int(number), "vote": str(vote)} if (
                        vote in list(Vote)):
                    self._change(lambda ballot: ballot.vote(number, Vote(vote)))
                case {"type": "votes.undo"}:
                    self._change(lambda ballot: ballot.undo())
                case {"type": "votes.reveal"}:
                    self._change(lambda ballot: ballot.reveal())
                case _:
                    raise SettingError("The page sent what is no message; load it anew.")

    def _take(self) -> None:
        prompts = self.lab.prompts()
        if len(prompts) > MOST_PAIRS:
            raise SettingError(
                f"The other tabs asked {len(prompts):,} prompts, too many to vote on; type some.")
        self.send("taken", prompts=prompts)

    def _begin(self, content: dict[str, Any]) -> None:
        ask = read(content, _Begin)
        names = {column.id: column.name for column in self.lab.bundles}
        if not ask.prompts:
            raise SettingError("There is no prompt; type one a line first.")
        if not set(ask.columns) <= set(names):
            raise SettingError("The vote names a tier that this lab has not; choose another.")
        if ask.name and self._kept is None:
            raise SettingError("A vote is kept in a vault only; give the lab one, vault=.")
        form = Form(
            prompts=ask.prompts, system=ask.system, max_tokens=ask.max_tokens,
            tiers=tuple(names[id_] for id_ in ask.columns), seed=secrets.randbits(62))
        comparison = _Comparison(form, ask.name)
        self._leave()
        self._show(comparison)
        self.later(self._ask, comparison, True)

    def _resume(self, name: str) -> None:
        assert self._kept is not None
        form, marks = self._kept.read(name)
        if not set(form.tiers) <= {column.name for column in self.lab.bundles}:
            raise SettingError(
                "This vote is on a tier that the lab has not; make a lab with all of them.")
        comparison = _Comparison(form, name)
        comparison.ballot.replay(marks)
        with self._lock:
            self._show(comparison)
        self._ask(comparison, False)

    def _forget(self, name: str) -> None:
        assert self._kept is not None
        self._kept.forget(name)
        self._tell_kept()

    def _show(self, comparison: _Comparison) -> None:
        self._shown = comparison
        self._tell()

    def _leave(self) -> None:
        if self._shown is not None:
            self._shown.stop()
            self._shown = None
        self._tell()

    def _ask(self, comparison: _Comparison, new: bool) -> None:
        """Ask the tiers, each in its turn, in an order that nobody outside knows."""
        answers = None
        if comparison.name and self._kept is not None:
            try:
                if new:
                    self._kept.begin(comparison.name, comparison.form)
                answers = self._kept.answers(comparison.name)
            except CloisterError:
                with self._lock:
                    self._leave()
                raise
            self._tell_kept()
        paths = {column.name: column.path for column in self.lab.bundles}
        order = secrets.SystemRandom().sample(comparison.form.tiers, len(comparison.form.tiers))
        comparison.grid = Grid(
            comparison.plan, {name: paths[name] for name in order}, kept=answers,
            record=self.lab.record)
        told_s = 0.0
        try:
            for _ in () if comparison.stopping.is_set() else comparison.grid.run():
                comparison.asked += 1
                if comparison.stopping.is_set():
                    comparison.grid.stop()
                if time.monotonic() > told_s + _PROGRESS_S:
                    told_s = time.monotonic()
                    self._tell_of(comparison)
        finally:
            comparison.ballot.fill({
                (name, place[1]): answer.text for name, said in comparison.grid.answers.items()
                for place, answer in said.items() if not answer.error})
            comparison.asking = False
            self._tell_of(comparison)

    def _change(self, do: Callable[[Ballot], Any]) -> None:
        shown = self._shown
        if shown is None or shown.asking:
            raise SettingError("There is nothing to vote on yet; wait for the answers.")
        mark = do(shown.ballot)
        if shown.name and self._kept is not None:
            self.later(self._kept.append, shown.name, mark)
        self._tell()

    def _tell_kept(self) -> None:
        before = self.kept
        self._names = [] if self._kept is None else self._kept.names()
        self.send("kept", vault=self._kept is not None, names=self._names)
        if self.kept != before:
            self.lab.send_badge()

    def _tell_of(self, comparison: _Comparison) -> None:
        with self._lock:
            if comparison is self._shown:
                self._tell()

    def _tell(self) -> None:
        """Send what is shown; before the names are, nothing that tells them."""
        shown = self._shown
        if shown is None:
            self.send("state", state="none")
            return
        ballot, pair = shown.ballot, shown.ballot.next
        state: dict[str, Any] = {
            "asked": shown.asked, "total": len(shown.form.prompts) * len(shown.form.tiers),
            "tiers": len(shown.form.tiers), "voted": len(ballot.votes)}
        if shown.asking:
            self.send("state", state="asking", **state)
            return
        state |= {"pairs": len(ballot.pairs), "same": ballot.same, "lacking": ballot.lacking}
        if ballot.revealed:
            self.send("revealed", **state, **_revealed(shown))
            return
        if pair is not None:
            left, right = ballot.answers(pair)
            state |= {"prompt": shown.form.prompts[pair.item], "left": left, "right": right}
        self.send("state", state="over" if pair is None else "voting",
                  standing=ballot.standing(), **state)


def _revealed(shown: _Comparison) -> dict[str, Any]:
    assert shown.grid is not None
    took = {}
    for name in shown.form.tiers:
        said = [each for each in shown.grid.answers[name].values() if not each.error]
        speeds = [each.decode_tokens_per_s for each in said
                  if each.decode_tokens_per_s is not None]
        if said:
            took[name] = {
                "ttft_s": statistics.median(each.ttft_s for each in said),
                "tokens_per_s": statistics.median(speeds) if speeds else None,
                "peak_rss_bytes": max(each.peak_rss_bytes for each in said)}
    return {
        "outcome": shown.ballot.outcome(), "reasons": dict(shown.grid.reasons), "took": took,
        "votes": [
            {"prompt": shown.form.prompts[each.pair.item], "left": each.pair.left,
             "right": each.pair.right, "vote": str(each.vote)} for each in shown.ballot.votes]}
