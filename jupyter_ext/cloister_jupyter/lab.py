"""The prompt lab: one request to several tiers, side by side in a notebook cell.

What is typed and answered travels in custom messages only, which no notebook file keeps; synced
traits hold ids, names and bounds. The page is
`static/lab.js`.

From the page come `open` (tell me all), `run`, `score` (how likely each token is), `branch` (go on
from another token), `stop`, `likeliest` (what else might have stood there), `probe` (try to reach
out), `attach` and `remove` (see `attached`); it is sent `snapshot`, `badge`, `likeliest`, `invalid`
(what is refused) and the events of `runs`. What the other tabs say to each other has the name of
its panel and a dot before it. No handler waits for anything, so that each may run on whatever
thread the kernel reads messages on.
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Any

import msgspec
from traitlets import Dict, Int, List, Unicode

from cloister import family, parts
from cloister.audit.notebook import Trail
from cloister.errors import CloisterError, SettingError, named
from cloister.tiers import Tier
from cloister.vault.namespace import Kind
from cloister_jupyter import results
from cloister_jupyter.answers import shortened
from cloister_jupyter.attached import MOST, Attached, kinds_of
from cloister_jupyter.badge import Badge, badge, kept_by_lab
from cloister_jupyter.channel import Page, check_text, close_earlier, script, style
from cloister_jupyter.column import columns_of
from cloister_jupyter.events import Delta, Ended, Over, Ready, Refused, Resumed
from cloister_jupyter.grid_panel import GridPanel
from cloister_jupyter.history import KeptRun, run_of
from cloister_jupyter.history_panel import HistoryPanel
from cloister_jupyter.request import LIMIT_BYTES, request_of
from cloister_jupyter.results_panel import ResultsPanel
from cloister_jupyter.runs import Runs
from cloister_jupyter.spelling import Spelling
from cloister_jupyter.votes_panel import VotesPanel

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from pathlib import Path

    from cloister.vault.namespace import Namespace
    from cloister.vault.store import Vault
    from cloister_jupyter.cases import Case
    from cloister_jupyter.events import Event
    from cloister_jupyter.panels import Panel
    from cloister_jupyter.results import Written
    from cloister_jupyter.runs import Probed

__all__ = ["PromptLab"]

_PANELS: tuple[type[Panel], ...] = (GridPanel, VotesPanel, HistoryPanel, ResultsPanel)
_TOKENS = 24  # whose alternatives go into one message
_TASKS = ("call", "intent", "redact", "story")  # system prompts that the shipped family knows


class PromptLab(Page):
    """One request to several tiers: what each says, how fast, in how much memory, where they part.

    `tiers` are of the shipped family, None for all of them; `bundles` are paths of others. Each has
    a process of its own, without network and vault, which stays until `close` or the kernel's end.
    What is kept is sealed in the namespace `namespace` of `vault`; without one nothing is.
    `functions` are what checks of a grid's cases may name; see `cloister_jupyter.checks.Judge`.

    Raises:
        SettingError: there is no tier of that name, or nothing to ask.
    """

    _esm = script("files", "compare", "tokens", "answer", *(
        part for panel in _PANELS for part in (*panel.parts, panel.name)), "lab")
    _css = style("lab", "tokens", *(panel.name for panel in _PANELS))
    columns = List(Dict()).tag(sync=True)  # ids and names
    tasks = List(Unicode()).tag(sync=True)
    limit_bytes = Int(LIMIT_BYTES).tag(sync=True)
    takes = List(Unicode()).tag(sync=True)  # image, audio: of one tier at least
    file_bytes = Int(parts.LIMIT_BYTES).tag(sync=True)
    most_files = Int(MOST).tag(sync=True)

    def __init__(
        self, tiers: Sequence[str] | None = None, bundles: Sequence[str | Path] = (), *,
        vault: Vault | None = None, namespace: str = "default",
        functions: Mapping[str, Callable[[str, Case], bool]] | None = None,
    ) -> None:
        close_earlier()
        found = columns_of(tiers, bundles)
        self.bundles = found
        self.functions = dict(functions or {})
        self.space: Namespace | None = None if vault is None else vault.namespace(namespace)
        self._trail: Trail | None = None  # opened when there is what to record
        self._recording = threading.Lock()
        shipped = {family.bundle_path(tier) for tier in Tier}
        self._attached = Attached(lambda message: self.send(message))
        super().__init__(
            takes=kinds_of(column.path for column in found),
            columns=[{"id": column.id, "name": column.name} for column in found],
            tasks=list(_TASKS) if any(column.path in shipped for column in found) else [])
        self._lock = threading.RLock()  # of the events, so that none overtakes a snapshot
        self._events: list[Event] = []  # of the last run
        self._last: KeptRun | None = None
        self._runs = Runs(found, self._tell)
        self._spellings: dict[str, Spelling] = {}  # by columns
        self._probed: Probed | None = None
        self._badge: Badge | None = None  # as it was sent last
        self._panels = {panel.name: panel(self) for panel in _PANELS}
        self.listen()

    def close(self) -> None:
        """End the processes, and the widget."""
        for part in (*getattr(self, "_panels", {}).values(), getattr(self, "_runs", None)):
            if part is not None:
                part.close()
        super().close()

    def record(self, texts: Iterable[str]) -> None:
        """Keep fingerprints of texts, where there is a vault, for `cloister lab check`.

        Raises:
            VaultError: see `Trail`.
        """
        if self.space is None:
            return
        with self._recording:
            self._trail = self._trail or Trail(self.space, Kind.HISTORY)
            self._trail.record(texts)

    def sources(self) -> list[str]:
        """Return where there are results: "run", and the names of tabs."""
        panels = [name for name, panel in self._panels.items() if panel.results()]
        return [*["run"] * (self._last is not None), *panels]

    def results(
        self, source: str = "run", places: Sequence[int] = (),
    ) -> list[dict[str, object]]:
        """Return a row for each answer of the last run, with its texts; for a file, or a frame.

        `source` may name a tab in place of "run"; "history" has the runs at `places`.

        Raises:
            SettingError: nothing was run yet, or there is no such tab or run.
            VaultError: a run in the history cannot be read.
        """
        if source == HistoryPanel.name:
            return [row for run in self._history.chosen(places) for row in run.rows()]
        if source in self._panels:
            return self._panels[source].results()
        if source != "run" or self._last is None:
            raise SettingError("There are no results yet; run something first.")
        return self._last.rows()

    def export(
        self, path: str | Path, *, redact: bool = True, replace: bool = False, bom: bool = False,
    ) -> Written:
        """Write the answers of the last run to a CSV, Parquet or HTML file; see `results.export`.

        Raises:
            SettingError: nothing was run yet; or see `results.export`.
        """
        return results.export(self.results(), path, redact=redact, replace=replace, bom=bom)

    def receive(self, content: Any) -> None:
        """Do what the page asks for, at once; on any thread."""
        run = content.get("run") if isinstance(content, dict) else None
        panel = self._panel(content)
        try:
            check_text(content)
            if panel is not None:
                panel.receive(content)
                return
            match content:
                case {"type": "open"}:
                    self._open()
                case {"type": "stop"}:
                    self._runs.stop(run)
                case {"type": "run"}:
                    self._runs.begin(request_of(content, self._attached))
                case {"type": "attach" | "remove"}:
                    self._attached.receive(content)
                case {"type": "score"}:
                    self._runs.score(str(run))
                case {"type": "branch", "parent": str(parent), "at": int(at), "id": int(id_)}:
                    self._runs.branch(str(run), parent, at, id_)
                case {"type": "likeliest", "column": str(column), "start": int(start)}:
                    self._send_likeliest(str(run), column, start)
                case {"type": "probe"}:
                    self._runs.probe(self._tell_probed)
                case _:
                    raise SettingError("The page sent what is no message; load it anew.")
        except Exception as error:
            self._refuse(panel, content, str(named(error, "The lab")))

    def _panel(self, content: Any) -> Panel | None:
        kind = content.get("type") if isinstance(content, dict) else None
        return self._panels.get(kind.partition(".")[0]) if isinstance(kind, str) else None

    def _refuse(self, panel: Panel | None, content: Any, message: str) -> None:
        if panel is not None:
            panel.send("invalid", message=message)
            return
        told = content if isinstance(content, dict) else {}
        self.send({"type": "invalid", "about": told.get("type"), "run": told.get("run"),
                   "message": message})

    def _open(self) -> None:
        with self._lock:
            request = self._runs.request
            self.send({
                "type": "snapshot",
                "request": None if request is None else {
                    "run": request.run, "columns": request.columns, "prompt": request.prompt,
                    "system": request.system},
                "events": [msgspec.to_builtins(event) for event in self._events]})
            self._badge = None
            self.send_badge()
        for panel in self._panels.values():
            panel.open()

    def _tell(self, event: Event) -> None:
        with self._lock:
            if event.seq == 0:
                self._events.clear()
            last = self._events[-1] if self._events else None
            if isinstance(event, Delta) and isinstance(last, Delta) and (
                    last.column == event.column):
                self._events[-1] = msgspec.structs.replace(event, texts=last.texts + event.texts)
            else:
                self._events.append(event)
            self._record(event)
            self.send(msgspec.to_builtins(event))
            if isinstance(event, Ready | Over):
                self.send_badge()
            if isinstance(event, Over) and self._runs.request is not None and not any(
                    isinstance(each, Resumed) for each in self._events):  # scores, branches
                self._last = run_of(
                    self._runs.request, self._events, {each.id: each.name for each in self.bundles},
                    at_s=time.time(), stopped=event.stopped)
                for panel in self._panels.values():
                    panel.over(self._last)

    def _record(self, event: Event) -> None:
        """Record the request before a tier is asked, and an answer before its end is shown.

        The words of an answer stream to the page before that: where the kernel dies meanwhile, they
        are not found in a file. Where recording fails the run goes on, and the page is told.
        """
        request, texts = self._runs.request, list[str]()
        if event.seq == 0 and request is not None:
            texts = [request.prompt, request.system or ""]
        elif isinstance(event, Ended | Refused):
            texts = ["".join(text for each in self._events if isinstance(each, Delta)
                             and each.column == event.column for text in each.texts)]
        if not any(texts):
            return
        try:
            self.record(texts)
        except Exception as error:
            self._history.problem(error, "cloister lab check will not find all of this run.")

    @property
    def _history(self) -> HistoryPanel:
        panel = self._panels[HistoryPanel.name]
        assert isinstance(panel, HistoryPanel)
        return panel

    def send_badge(self) -> None:
        """Tell the pages what holds for privacy, as far as it is known."""
        names = {column.id: column.name for column in self._runs.columns.values()}
        now = badge(
            {names[id_]: welcome for id_, welcome in self._runs.welcomes.copy().items()},
            kept=None if self.space is None else kept_by_lab("; ".join(filter(None, dict.fromkeys((
                self._history.kept, *(panel.kept for panel in self._panels.values())))))),
            probed=self._probed)
        if now != self._badge:
            self._badge = now
            self.send(msgspec.to_builtins(now))

    def _tell_probed(self, probed: Probed) -> None:
        with self._lock:
            self._probed, self._badge = probed, None
            self.send_badge()

    def _send_likeliest(self, run: str, column: str, start: int) -> None:
        """Send what else might have stood in the place of some tokens."""
        found = self._runs.likeliest(run, column, start, start + _TOKENS)
        whose = column.partition(".")[0]

        def send() -> None:  # on a thread: a tokenizer takes a moment to read
            try:
                spelling = self._spellings.get(whose) or Spelling(
                    self._runs.columns[whose].path)
                self._spellings[whose] = spelling
            except CloisterError as error:
                self._refuse(None, {"type": "likeliest", "run": run}, str(error))
                return
            self.send({"type": "likeliest", "run": run, "column": column, "at": start, "rows": [
                [None if token is None else [
                    [id_, spelling.text(id_), shortened(logprob)] for id_, logprob in token.top]
                 for token in row] + [row[0].id] for row in found]})

        threading.Thread(target=send, daemon=True).start()

    def prompts(self) -> list[str]:
        """Return what was asked last, under any tab."""
        request = self._runs.request
        return list(dict.fromkeys((
            *([] if request is None else [request.prompt]),
            *(prompt for panel in self._panels.values() for prompt in panel.prompts()))))
