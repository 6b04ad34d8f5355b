"""The lab's history: runs that are sealed in the vault, listed, searched, opened and deleted.

From the page come `history.keep` (the switch), `history.list`, `history.find`, `history.open` and
`history.forget`; it is sent `history.state`, `history.lines`, `history.found`, `history.opened`,
`history.problem` and `history.invalid`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from cloister.errors import SettingError, named
from cloister_jupyter.history import History, KeptRun, Line
from cloister_jupyter.later import LaterPanel
from cloister_jupyter.sent import Sent, read

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cloister_jupyter.panels import Lab

__all__ = ["HistoryPanel"]

_NO_VAULT = (
    "Nothing is kept: this lab was made without a vault. Make one with "
    "PromptLab(vault=cloister.open_vault(create=True)) to keep its runs, sealed.")


class _Keep(Sent, frozen=True, tag="history.keep"):
    on: bool


class _List(Sent, frozen=True, tag="history.list"):
    pass


class _Find(Sent, frozen=True, tag="history.find"):
    words: str


class _Open(Sent, frozen=True, tag="history.open"):
    place: int


class _Forget(Sent, frozen=True, tag="history.forget"):
    """Places, and which run was shown there; none where it could not be read."""

    runs: list[tuple[int, str | None]]


class HistoryPanel(LaterPanel):
    """Keeps each run of its lab while the switch is on, and shows what is kept."""

    name = "history"

    def __init__(self, lab: Lab) -> None:
        super().__init__(lab)
        self.history = None if lab.space is None else History(lab.space)
        self.keeping = self.history is not None
        """Whether runs are kept: who gives a vault wants that, and may switch it off."""

    @property
    def kept(self) -> str:
        """What is kept of prompts and answers of runs, in words for the badge."""
        if self.lab.space is None:
            return "nothing: this lab was made without a vault, what was said ends with this kernel"
        where = f"namespace {self.lab.space.name} of the vault"
        if self.keeping:
            return f"each run, sealed in {where}, and fingerprints of its words"
        return (f"fingerprints of words only, sealed in {where}: Keep history is off (runs that "
                "were kept before stay until they are deleted)")

    def receive(self, content: dict[str, Any]) -> None:
        """Do what the page asks for, on this panel's thread."""
        asked = read(content, _Keep | _List | _Find | _Open | _Forget)
        if self.history is None:
            raise SettingError(_NO_VAULT)
        match asked:
            case _Keep(on=on):
                self.keeping = on
                self.open()
                self.lab.send_badge()
            case _List():
                self.later(self._list)
            case _Find(words=words):
                self.later(self._find, self.history, words)
            case _Open(place=place):
                self.later(self._open, self.history, place)
            case _Forget(runs=runs):
                self.later(self._forget, self.history, runs)

    def open(self) -> None:
        """Tell whether runs are kept."""
        self.send("state", keeping=self.keeping, why="" if self.history else _NO_VAULT)

    def over(self, run: KeptRun) -> None:
        """Keep a run that is over, where that is wanted."""
        if self.history is not None and self.keeping:
            self.later(self._keep, self.history, run)

    def problem(self, error: Exception, what: str) -> None:
        """Tell of what could not be kept, where the run itself goes on."""
        self.send("problem", message=f"{what} {named(error, 'The lab')}")

    def chosen(self, places: Sequence[int]) -> list[KeptRun]:
        """Return runs that are kept.

        Raises:
            SettingError: there is no vault, or one is there no more.
            VaultError: one cannot be read.
        """
        if self.history is None:
            raise SettingError(_NO_VAULT)
        return [self.history.open(place) for place in places]

    def _keep(self, history: History, run: KeptRun) -> None:
        try:
            history.keep(run)
        except Exception as error:
            self.problem(error, "This run is not in the history.")
        else:
            self.send("kept", run=run.run)

    def _list(self) -> None:
        assert self.history is not None
        lines = self.history.lines()
        self.send("lines", lines=[
            {"place": place, **msgspec.structs.asdict(line)} if isinstance(line, Line)
            else {"place": place, "run": None, "why": line} for place, line in lines])

    def _find(self, history: History, words: str) -> None:
        self.send("found", words=words, places=history.find(words))

    def _open(self, history: History, place: int) -> None:
        self.send("opened", place=place, **msgspec.to_builtins(history.open(place)))

    def _forget(self, history: History, runs: list[tuple[int, str | None]]) -> None:
        count = history.forget([place for place, _ in runs], {
            place: run for place, run in runs if run is not None})
        self.send("forgotten", count=count)
        self._list()
