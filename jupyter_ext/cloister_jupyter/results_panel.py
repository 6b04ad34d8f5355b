"""The lab's export: results looked through for personal data, marked in a preview, and written.

From the page come `results.sources` (what is there to write), `results.look` (propose what is to be
replaced), `results.page`, `results.switch`, `results.add`, `results.write` and `results.stop`; it
is sent `results.sources`, `results.progress`, `results.stopped`, `results.values`, `results.texts`,
`results.written` and `results.invalid`.
"""

from __future__ import annotations

import threading
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cloister.errors import SettingError
from cloister_jupyter.later import LaterPanel
from cloister_jupyter.proposals import MISSES, propose
from cloister_jupyter.redaction import Redaction, Value
from cloister_jupyter.results import export, plain_rows, texts_of
from cloister_jupyter.sent import Sent, read

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from cloister_jupyter.panels import Lab
    from cloister_jupyter.results import Row

__all__ = ["ResultsPanel"]

PAGE = 25  # texts that are shown at once
_TELL = 10  # pieces between two messages of progress
_MOST_SELECTED = 1000  # characters of what a user marks


class _Look(Sent, frozen=True, tag="results.look"):
    """Where the rows are: the name of a source, and of the history which runs."""

    source: str
    places: tuple[int, ...] = ()


class _Sources(Sent, frozen=True, tag="results.sources"):
    pass


class _Page(Sent, frozen=True, tag="results.page"):
    number: int


class _Switch(Sent, frozen=True, tag="results.switch"):
    value: int
    on: bool


class _Add(Sent, frozen=True, tag="results.add"):
    text: str


class _Write(Sent, frozen=True, tag="results.write"):
    source: str
    path: str
    redact: bool
    replace: bool
    bom: bool
    places: tuple[int, ...] = ()


class _Stop(Sent, frozen=True, tag="results.stop"):
    pass


class ResultsPanel(LaterPanel):
    """Looks through results with a user, and writes them."""

    name = "results"

    def __init__(self, lab: Lab) -> None:
        super().__init__(lab)
        self._stopping = threading.Event()
        self._rows: list[Row] = []  # that were looked through
        self._texts: dict[str, str] = {}  # in them, and where each stands first
        self._redaction: Redaction | None = None
        self._counts: Counter[int] = Counter()  # places of each value
        self._page = 0

    def receive(self, content: dict[str, Any]) -> None:
        """Do what the page asks for, on this panel's thread."""
        asked = read(content, _Sources | _Look | _Page | _Switch | _Add | _Write | _Stop)
        if isinstance(asked, _Stop):
            self._stopping.set()
            return
        if isinstance(asked, _Look):
            self._stopping.clear()
        self.later(self._do_asked, asked)

    def close(self) -> None:
        """Let go of the texts."""
        self._stopping.set()
        super().close()

    def _do_asked(self, asked: _Sources | _Look | _Page | _Switch | _Add | _Write) -> None:
        match asked:
            case _Sources():
                self.send("sources", sources=self.lab.sources())
            case _Look():
                self._look(asked)
            case _Page(number=number):
                self._send_texts(number)
            case _Switch(value=number, on=on):
                self._looked().switch(number, on=on)
                self._send_preview()
            case _Add(text=text):
                self._add(text)
            case _Write():
                self._write(asked)

    def _looked(self) -> Redaction:
        if self._redaction is None:
            raise SettingError("Nothing was looked through yet; look for personal data first.")
        return self._redaction

    def _look(self, asked: _Look) -> None:
        self._redaction = None
        rows = plain_rows(self.lab.results(asked.source, asked.places))
        texts: dict[str, str] = {}
        for number, row in enumerate(rows, start=1):
            for name, cell in row.items():
                if isinstance(cell, str) and cell not in texts:
                    texts[cell] = f"{name}, row {number}"
        self._texts = {text: texts[text] for text in texts_of(rows)}
        redaction = propose(
            list(self._texts), progress=self._progress, stopping=self._stopping)
        if redaction is None:
            self.send("stopped")
            return
        self._rows, self._redaction, self._page = rows, redaction, 0
        self._counts = Counter(hit.value for text in self._texts for hit in redaction.find(text))
        self._send_preview()

    def _progress(self, stage: str, done: int = 0, total: int = 0, note: str = "") -> None:
        if done % _TELL == 0:
            self.send("progress", stage=stage, done=done, total=total, note=note)

    def _add(self, text: str) -> None:
        if len(text) > _MOST_SELECTED:
            raise SettingError(
                f"At most {_MOST_SELECTED:,} characters are replaced as one; choose less.")
        redaction, value = self._looked(), Value(text=text.strip(), label="TEXT", by="you")
        number, alone = redaction.add(value), Redaction([value])
        self._counts[number] = sum(len(alone.find(each)) for each in self._texts)
        self._send_preview()

    def _send_preview(self) -> None:
        redaction = self._looked()
        self.send("values", misses=MISSES, values=[{
            "value": number, "text": value.text, "label": redaction.placeholder(number),
            "by": value.by, "on": number not in redaction.off, "count": self._counts[number],
        } for number, value in enumerate(redaction.values)
            if self._counts[number] or not value.capital])  # a part may stand nowhere alone
        self._send_texts(self._page)

    def _send_texts(self, number: int) -> None:
        redaction, texts = self._looked(), list(self._texts)
        pages = max(1, -(-len(texts) // PAGE))
        self._page = min(max(0, number), pages - 1)
        shown = texts[self._page * PAGE:(self._page + 1) * PAGE]
        self.send("texts", number=self._page, pages=pages, total=len(texts),
                  unsure=len(redaction.unsure), texts=[{
                      "where": self._texts[text], "unsure": text in redaction.unsure,
                      "parts": _parts(redaction, text)} for text in shown])

    def _write(self, asked: _Write) -> None:
        if not asked.path.strip():
            raise SettingError("The file has no name; give it one.")
        redaction: Redaction | bool = self._looked() if asked.redact else False
        rows: Sequence[Mapping[str, object]] = self._rows if asked.redact else (
            self.lab.results(asked.source, asked.places))
        written = export(rows, Path(asked.path.strip()), redact=redaction, replace=asked.replace,
                         bom=asked.bom, title="Results of the prompt lab")
        self.send("written", path=str(written.path.absolute()), rows=written.rows,
                  size_bytes=written.size_bytes, searched=written.searched,
                  replaced=sum(written.replaced.values()))


def _parts(redaction: Redaction, text: str) -> list[tuple[str, int | None]]:
    """Return a text in parts, each with the value that it is, or none.

    Places would not do: the page counts characters beyond 16 bits as two.
    """
    parts: list[tuple[str, int | None]] = []
    end = 0
    for hit in redaction.find(text):
        parts += [(text[end:hit.start], None), (text[hit.start:hit.end], hit.value)]
        end = hit.end
    return [(part, value) for part, value in (*parts, (text[end:], None)) if part]
