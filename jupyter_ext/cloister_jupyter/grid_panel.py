"""The grid of the lab: a table of cases, asked of several tiers, judged, compared and promoted.

The kernel has the table and the answers; the page asks for the rows that it shows, cut to what fits
a cell, so that ten thousand rows are no burden (see `grid_messages`). What it asks for is done in
order on a thread, and a run has its own. It is told by messages of the same names, by `state` (all,
for a page that opens), `invalid` and `said`, and by those of `grid_run`.
"""

from __future__ import annotations

import base64
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from cloister.errors import DataError, EngineBusy, SettingError
from cloister.records import decode
from cloister_jupyter import grid_view, regression
from cloister_jupyter.cases import Table, blocks, decode_table, read_table
from cloister_jupyter.checks import KINDS, Judge
from cloister_jupyter.grid import fold
from cloister_jupyter.grid_messages import (
    Blank,
    Cases,
    Cell,
    Compare,
    Edit,
    File,
    Forget,
    Insert,
    KeptForm,
    Message,
    Open,
    Promote,
    Read,
    Remove,
    Rows,
    Run,
    Stop,
    Take,
)
from cloister_jupyter.grid_run import Form, GridRun, Means
from cloister_jupyter.kept import Kept, forget, other_release
from cloister_jupyter.later import LaterPanel
from cloister_jupyter.sent import read

if TYPE_CHECKING:

    from cloister_jupyter.grid import Grid, Row
    from cloister_jupyter.panels import Lab

__all__ = ["GridPanel"]

_LIMIT_BYTES = 4 << 20  # of a table from the page: a server ends connections over large messages
_RECORD_BYTES = 64 << 20
_REGRESSION = "regression.jsonl"


class GridPanel(LaterPanel):
    """The kernel's end of the grid."""

    name = "grid"
    parts = ("table", "grid_result")

    def __init__(self, lab: Lab) -> None:
        super().__init__(lab)
        self._names = {column.id: column.name for column in lab.bundles}
        self._paths = {column.name: column.path for column in lab.bundles}
        self._table, self._form, self._called = Table(), Form(), "grid"
        self._run: GridRun | None = None
        self._memory: dict[str, Kept] = {}  # without a vault
        self._keeps: set[str] = set()  # names of what this lab keeps in the vault
        self._order: tuple[object, list[tuple[int, int]]] = (None, [])
        self._lock = threading.Lock()  # of the beginning of a run

    def open(self) -> None:
        """Tell a page that opened of the table, the form and the run."""
        self.later(self._send_state)

    @property
    def kept(self) -> str:
        """What is kept of the grids of this lab, in words for the badge."""
        count = len(self._keeps)
        return f"{count} named grid{'s' * (count > 1)} with cases and answers" if count else ""

    def prompts(self) -> list[str]:
        """Return what the last run asks, templates filled with its cases."""
        grid = None if self._run is None else self._run.grid
        return [] if grid is None else list(map(grid.plan.prompt, grid.plan.places()))

    def close(self) -> None:
        """End the run, and its processes with it."""
        if self._run is not None:
            self._run.stop()
            self._run.wait(10)
        super().close()

    def results(self) -> list[dict[str, object]]:
        """Return a row for each answer so far."""
        run = self._run
        return [] if run is None or run.grid is None else run.grid.table()

    def receive(self, content: dict[str, Any]) -> None:
        """Do what the page asks for: a stop at once, the rest in order on a thread."""
        message = read(content, Message)
        if isinstance(message, Stop):
            if self._run is not None and message.run in (None, self._run.run):
                self._run.stop()
            return
        self.later(self._answer, message)

    def _answer(self, message: Message) -> None:
        match message:
            case Read(text=text):
                self._take_table(Table(read_table(_bounded(text))))
            case File(base64=coded):
                self._take_table(Table(decode_table(_decoded(coded))))
            case Blank(templates=text):
                names = dict.fromkeys(
                    name for each in blocks(text) for name in each.variables)
                if not names:
                    raise DataError("The templates have no variable; write one such as {city}.")
                self._take_table(Table(variables=tuple(names)))
            case Cases() | Cell() | Edit() | Insert() | Remove():
                self._edit(message)
            case Run():
                self._begin(message)
            case Take(name=name):
                self._take_up(name)
            case Forget(name=name):
                self._forget(name)
            case Rows():
                self._send_rows(message)
            case Open(prompt=prompt, case=case):
                self.send("row", **grid_view.full(self._grid, self._row(prompt, case)))
            case Compare(before=before, after=after):
                self._compare(before, after)
            case Promote():
                self._promote(message)

    # ---- the table

    def _take_table(self, table: Table) -> None:
        self.lab.record(
            text for case in table.cases
            for text in (*case.values.values(), case.expected, case.check) if text)
        self._table = table
        self._send_table()

    def _send_table(self) -> None:
        self.send("table", columns=self._table.columns, count=len(self._table.cases))

    def _edit(self, message: Cases | Cell | Edit | Insert | Remove) -> None:
        table, columns = self._table, range(len(self._table.columns))
        if isinstance(message, Cases):
            end = min(message.begin + message.count, len(table.cases))
            self.send("cases", view=message.view, begin=message.begin, rows=[
                {"line": table.cases[row].line, "cells": [
                    grid_view.cut(table.cell(row, column)) for column in columns]}
                for row in range(message.begin, end)])
            return
        bound = len(table.cases) + isinstance(message, Insert)
        if message.row >= bound or (
                isinstance(message, Cell | Edit) and message.column not in columns):
            raise SettingError("The table has no such cell; load the page anew.")
        if isinstance(message, Cell):
            self.send("cell", row=message.row, column=message.column,
                      text=table.cell(message.row, message.column))
        elif isinstance(message, Edit):
            self.lab.record([message.text])
            table.edit(message.row, message.column, message.text)
            self.send("edited", row=message.row)
        else:
            (table.insert if isinstance(message, Insert) else table.remove)(message.row)
            self._send_table()

    # ---- the run

    def _begin(self, message: Run) -> None:
        with self._lock:
            if self._run is not None and self._run.running:
                raise EngineBusy("A grid is being asked; stop it first.")
            tiers = {(name := self._named(id_)): self._paths[name] for id_ in message.columns}
            if not tiers:
                raise SettingError("No tier is chosen; choose at least one.")
            self._form, self._called = message.form, message.name
            cases, columns = tuple(self._table.cases), self._table.columns[:-2]
            shown = KeptForm(form=message.form, columns=columns, table=self._table.to_json())

            def kept() -> Kept:
                found = self._kept(message.name)
                found.put_form(msgspec.json.encode(shown))
                if self.lab.space is not None:
                    self._keeps.add(message.name)
                    self.lab.send_badge()
                return found

            self._run = GridRun(message.run, message.form, cases, Means(
                tiers=tiers, functions=self.lab.functions, kept=kept, record=self.lab.record),
                self.send)
            self._run.begin()

    def _kept(self, name: str) -> Kept:
        if self.lab.space is not None:
            return Kept(self.lab.space, name)
        return self._memory.setdefault(name, Kept(None, name))

    def _take_up(self, name: str) -> None:
        if self.lab.space is None:
            raise SettingError("This lab keeps nothing; give it a vault: PromptLab(vault=...).")
        form = Kept(self.lab.space, name).form()
        if form is None:
            raise SettingError("No grid is kept under that name; correct it.")
        found = decode(form, KeptForm, limit_bytes=_RECORD_BYTES, refuse=other_release)
        self._form, self._called = found.form, name
        self._table = Table(read_table(found.table) if found.table else (), found.columns)
        self._send_state()

    def _forget(self, name: str) -> None:
        if self._run is not None and self._run.running:  # its answers would be kept on
            raise EngineBusy("A grid is being asked; stop it first.")
        memory = self._memory.pop(name, ())
        some = bool(memory) if self.lab.space is None else forget(self.lab.space, name)
        self._keeps.discard(name)
        self.lab.send_badge()
        self.send("said", message=(
            "What was kept of this grid is forgotten." if some
            else "Nothing is kept under that name."))

    def _send_state(self) -> None:
        run = self._run
        self.send(
            "state", form=msgspec.to_builtins(self._form), name=self._called, kinds=list(KINDS),
            functions=list(self.lab.functions), vault=self.lab.space is not None,
            path=_REGRESSION, limit_bytes=_LIMIT_BYTES,
            run=None if run is None or run.grid is None else {
                "run": run.run, "running": run.running,
                "columns": list(run.grid.tiers),
                "variables": run.variables, "result": run.result()})
        self._send_table()

    # ---- the result

    @property
    def _grid(self) -> Grid:
        return self._asked[1]

    @property
    def _asked(self) -> tuple[GridRun, Grid]:
        if self._run is None or self._run.grid is None:
            raise SettingError("Nothing was asked yet; run the grid first.")
        return self._run, self._run.grid

    def _named(self, id_: str) -> str:
        if id_ not in self._names:
            raise SettingError("The lab has no such tier; choose another.")
        return self._names[id_]

    def _row(self, prompt: int, case: int) -> Row:
        plan = self._grid.plan
        if prompt >= len(plan.prompts) or case >= len(plan.cases):
            raise SettingError("The grid has no such row; load the page anew.")
        return self._grid.row(prompt, case)

    def _places(self, message: Rows) -> list[tuple[int, int]]:
        """Return the prompts and cases of the rows to show; asked for again and again."""
        run, grid = self._asked
        key = (run.run, run.heard, message.differing, message.failing)
        if self._order[0] != key:
            self._order = (key, [
                (row.prompt, row.case) for row in grid.rows(
                    differing=message.differing, failing=message.failing)]
                if message.differing or message.failing else [
                    (prompt, case) for prompt in range(len(grid.plan.prompts))
                    for case in range(len(grid.plan.cases))])
        return self._order[1]

    def _send_rows(self, message: Rows) -> None:
        places, (run, grid) = self._places(message), self._asked
        self.send("rows", view=message.view, begin=message.begin, total=len(places), rows=[
            grid_view.short(grid, grid.row(*place), run.variables)
            for place in places[message.begin:message.begin + message.count]])

    def _compare(self, before: str, after: str) -> None:
        run, grid = self._asked
        if before == after or not {before, after} <= grid.tiers.keys():
            raise SettingError("Two tiers of the grid are compared; choose another one.")
        self.send("compared", **grid_view.comparison(
            grid, before, after, task=run.form.system, paths=self._paths))

    def _promote(self, message: Promote) -> None:
        (run, grid), row = self._asked, self._row(message.prompt, message.case)
        plan = grid.plan
        case = plan.cases[message.case]
        if message.tier is not None:
            said = fold(row.answers.get(message.tier, ()))
            if message.said >= len(said):
                raise SettingError("The tier has no such answer; open the row again.")
            answer = said[message.said][0]
        else:
            check = Judge(default=run.form.default_check()).check_of(case)
            if case.expected is None or (check is not None and check.kind != "exact"):
                raise DataError(
                    "The check of this case compares with a part of an answer, and the file wants "
                    "it whole; promote a tier's answer that is right.")
            answer = case.expected
        if not message.path.strip():
            raise SettingError("There is no path to write to; give one that ends with .jsonl.")
        try:
            path = Path(message.path.strip()).expanduser()
            new = regression.promote(
                path, prompt=plan.prompt((message.prompt, message.case, None)), answer=answer,
                system=plan.system)
        except (OSError, RuntimeError, ValueError):  # too long, of no such user, with a NUL
            raise SettingError("No file can have that path; give another.") from None
        self.send("said", message=(
            f"{path.name} {'has the case now' if new else 'has just this case already'}; cloister "
            "eval --data and cloister export --gate-data read it."))


def _bounded(text: str) -> str:
    if (size := len(text.encode("utf-8", "surrogatepass"))) > _LIMIT_BYTES:
        raise _too_large(size)
    return text


def _decoded(coded: str) -> bytes:
    try:
        raw = base64.b64decode(coded, validate=True)
    except ValueError:
        raise SettingError("The file did not come whole; choose it again.") from None
    if len(raw) > _LIMIT_BYTES:
        raise _too_large(len(raw))
    return raw


def _too_large(size: int) -> DataError:
    return DataError(
        f"The table has {size:,} bytes and the page takes {_LIMIT_BYTES:,}; split it, or use "
        "cloister_jupyter.cases.load_table in a cell.")


