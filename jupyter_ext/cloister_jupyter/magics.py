"""`%%cloister` answers the text of a cell under it; `%cloister_status` says what holds and is kept.

The notebook file holds a cell's source and its output, so it holds what was asked and answered:
the widgets do not. IPython's history is given a line in place of such a cell.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import shlex
import threading
import time
from html import escape
from typing import TYPE_CHECKING, NoReturn

from IPython.core.magic import Magics, cell_magic, line_magic, magics_class, no_var_expand
from IPython.display import display

from cloister import family
from cloister.display import bytes_text, show
from cloister.errors import SettingError, WrongPassphrase, named
from cloister.interrupt import uninterrupted
from cloister.runtime.chat import Ask, Sampling
from cloister.runtime.client import Worker
from cloister.tiers import Tier
from cloister_jupyter.background import WARM_S, Idle
from cloister_jupyter.badge import badge
from cloister_jupyter.cases import Case, Template
from cloister_jupyter.chat import Passphrase, column_of
from cloister_jupyter.request import Request

if TYPE_CHECKING:
    from IPython.core.interactiveshell import InteractiveShell

    from cloister.runtime.chat import Stats
    from cloister.runtime.client import WorkerSession
    from cloister_jupyter.badge import Rows

__all__ = ["CloisterMagics", "Status", "load", "unload"]

_BATCH_S = 0.05  # between writes, each of which is a message to the page
_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")
_FINISH = {"end": "ended by itself", "length": "cut at the most tokens",
           "context": "context full", "stop": "stopped"}
# As a cell of its own, within other magics, and as a call; by its own name and each %alias_magic.
_OURS = r"^[ \t]*%%(?:{0})(?!\w)|run_cell_magic\(\s*(?:magic_name\s*=\s*)?['\"](?:{0})['\"]"
_IN_PLACE = "# a cell of %%cloister, which is not kept here"
_FILE = ("notebook file", "holds the source and the output of %%cloister cells, and so what was "
                          "asked and answered; ChatWidget and PromptLab leave neither there")


_OPTIONS: tuple[tuple[str, type, str], ...] = (
    ("tier", str, "tier of the shipped family; nano-1 where neither is given"),
    ("bundle", str, "path of another bundle, in place of a tier"),
    ("system", str, "system prompt"),
    ("max-tokens", int, "most tokens of the answer; 256 where it is not given"),
    ("temperature", float, "0, the default, is greedy"),
    ("top-k", int, "most likely tokens that may come; 0 for all"),
    ("top-p", float, "smallest set with this probability"),
    ("min-p", float, "share of the best token's probability"),
    ("repetition-penalty", float, "1 for none"),
    ("seed", int, "drawn where it is not given"),
    ("session", str, "go on with the conversation sealed in the vault under this name"),
    ("namespace", str, "owner of the session"),
)


class _Parser(argparse.ArgumentParser):
    """Reads the line of `%%cloister`, and refuses what it does not know."""

    def __init__(self) -> None:
        # A prefix of an option would mean another one when options are added.
        super().__init__(prog="%%cloister", add_help=False, allow_abbrev=False)
        for name, kind, words in _OPTIONS:
            self.add_argument(f"--{name}", type=kind, help=words, metavar=name.upper())
        self.add_argument("--fill", action="store_true", help=(
            "put the notebook's variables in place of {name}; {{ and }} stand for braces"))

    def error(self, message: str) -> NoReturn:
        named = re.search(r"argument (--[\w-]+)", message)  # the rest quotes what was typed
        what = f"The option {named[1]} of %%cloister has no value that it can have" if (
            named) else "The line of %%cloister has an option that there is not"
        raise SettingError(f"{what}; `%%cloister?` shows them all.")


class Status:
    """Groups of names and values, as text and as tables."""

    def __init__(self, groups: tuple[tuple[str, Rows], ...]) -> None:
        self.groups = groups

    def __repr__(self) -> str:
        return "\n\n".join("\n".join([title, *(f"  {name}: {value}" for name, value in rows)])
                           for title, rows in self.groups)

    def _repr_html_(self) -> str:
        left = "style='text-align:left;vertical-align:top'"
        return "".join(
            f"<table><caption {left}><b>{escape(title)}</b></caption><tbody>" + "".join(
                f"<tr><th scope='row' {left}>{escape(name)}</th>"
                f"<td {left}>{escape(value)}</td></tr>"
                for name, value in rows) + "</tbody></table>"
            for title, rows in self.groups)


@magics_class
class CloisterMagics(Magics):
    """The magics of a shell, and the processes that they keep warm."""

    def __init__(self, shell: InteractiveShell, *, warm_s: float = WARM_S) -> None:
        super().__init__(shell)
        self._workers: dict[tuple[str, bool], tuple[str, Worker]] = {}  # by path and vault
        self._passphrase = Passphrase()
        self._using = threading.Lock()  # held by a cell, and by what ends the processes
        self._idle = Idle(warm_s, self._cool)
        self._store = shell.history_manager.store_inputs if shell.history_manager else None
        if shell.history_manager:
            shell.history_manager.store_inputs = self._store_inputs

    def close(self) -> None:
        """End the processes, and give IPython's history back."""
        self._idle.cancel()
        for _, worker in self._workers.values():
            worker.close()
        manager = self.shell.history_manager if self.shell is not None else None
        if manager is not None and self._store is not None:
            manager.store_inputs = self._store

    def _store_inputs(
        self, line_num: int, source: str, source_raw: str | None = None
    ) -> None:
        """Keep a cell in IPython's history; in place of one of ours a line that says so."""
        assert self._store is not None
        magics = {} if self.shell is None else self.shell.magics_manager.magics["cell"]
        names = ["cloister", *(name for name, magic in magics.items()
                               if getattr(magic, "magic_name", None) == "cloister")]
        ours = re.compile(_OURS.format("|".join(map(re.escape, names))), re.MULTILINE)
        if ours.search(source) or ours.search(source_raw or ""):
            source = source_raw = _IN_PLACE
        self._store(line_num, source, source_raw)

    @no_var_expand
    @cell_magic
    def cloister(self, line: str, cell: str) -> None:
        """Answer the text of this cell with a model of this machine, as it comes.

        The notebook file keeps the cell and the answer, as it does any other; IPython's history
        does not. With a session what was said is sealed in the vault, too, and `cloister lab check`
        finds it in notebooks. Braces are left as they are without --fill: prompts hold JSON.
        Interrupt the kernel to stop; what came by then stays.
        """
        try:
            try:
                with self._using:
                    self._idle.cancel()
                    self._answer(*self._read(line, cell))
            finally:
                with uninterrupted():  # without it the processes would never end
                    self._idle.begin()
        except KeyboardInterrupt as error:
            _tell(error, "Interrupted; what was answered by then stays above.")
        except Exception as error:
            _tell(named(error, "The cell"))

    cloister.__doc__ = f"{cloister.__doc__}\n{_Parser().format_help()}"

    @line_magic
    def cloister_status(self, line: str) -> Status:
        """Say which tiers there are, what runs, how it is guarded, and what is kept where."""
        if line.strip():
            _tell(SettingError("%cloister_status takes no options; leave them out."))
        welcomes, running = {}, []
        for (_, vault), (name, worker) in self._workers.items():
            if not worker.running:
                continue
            process = worker.ready()
            name += " (vault)" if vault else ""
            welcomes[name] = process.welcome
            loaded = worker.loaded
            running.append((name, f"process {process.pid}" + (
                "" if loaded is None else f", {loaded.context:,} tokens of context, "
                f"{bytes_text(loaded.peak_rss_bytes)} when it was loaded")))
        found = badge(welcomes)
        vault_row = dict(found.groups[0][1])["vault on this machine"].partition(";")[0]
        opened = any(vault for (_, vault), _ in self._workers.items())
        return Status((
            ("Tiers", tuple((tier, _size(tier)) for tier in Tier)),
            ("Running", tuple(running) or (("none", "a process starts with the first cell"),)),
            ("What is kept", (
                _FILE,
                ("IPython's history", "has a line in place of each %%cloister cell from %load_ext "
                                      "on" if self._store else "is off"),
                ("vault on this machine", vault_row),
                ("sessions", "sealed in the vault, with fingerprints by which `cloister lab check` "
                             "finds their texts in notebooks"),
                ("other cells", "their texts have fingerprints, too, since a session opened the "
                                "vault" if opened else "have no fingerprints: no session has "
                                "opened the vault"),
            )), *found.groups[1:]))

    def _read(self, line: str, cell: str) -> tuple[Request, argparse.Namespace]:
        try:
            words = shlex.split(line)
        except ValueError:
            raise SettingError(
                "A quote in the line of %%cloister is not closed; close it.") from None
        args = _Parser().parse_args(words)
        if args.tier is not None and args.bundle is not None:
            raise SettingError("A cell is answered by --tier or --bundle; leave one of them out.")
        if args.tier is not None and args.tier not in list(Tier):
            raise SettingError(f"There is no such tier; tiers are {', '.join(Tier)}.")
        text = cell.strip("\r\n")
        if args.fill:
            text = self._filled(text)
        given = {name: getattr(args, name) for name in _SAMPLING}
        return Request(
            run="", columns=("",), prompt=text, system=args.system,
            max_tokens=256 if args.max_tokens is None else args.max_tokens,
            sampling=Sampling(**{k: v for k, v in given.items() if v is not None})), args

    def _filled(self, text: str) -> str:
        """Return a text with the values of the notebook's variables; texts and numbers only."""
        template, values = Template(text), dict[str, str]()
        space = {} if self.shell is None else self.shell.user_ns
        for name in template.variables:
            value = space.get(name)
            if not isinstance(value, str | int | float):
                raise SettingError(
                    f"The notebook has no text or number called {name}; set it, or double the "
                    "braces to mean them.")
            values[name] = str(value)
        return template.render(Case(line=1, values=values))

    def _answer(self, request: Request, args: argparse.Namespace) -> None:
        column = column_of(args.bundle if args.bundle is not None else args.tier or Tier.NANO_1)
        worker = self._worker(str(column.path), column.name, vault=args.session is not None)
        if args.session is not None:
            try:
                worker.ready(vault=True)
            except WrongPassphrase:
                self._passphrase.clear()  # it is asked for again
                raise
        keeper = next((each for (_, vault), (_, each) in self._workers.items() if vault), None)
        said = list[str]()
        ask = Ask.of(request.prompt, max_tokens=request.max_tokens, sampling=request.sampling)
        owner = "default" if args.namespace is None else args.namespace
        with contextlib.closing(worker.session(
                system=request.system, name=args.session, namespace=owner)) as session:
            if keeper is not None:
                keeper.record(
                    filter(None, (request.prompt, request.system)), namespace=owner)
            try:
                _stream(session, ask, said)
            finally:
                if keeper is not None and said:
                    keeper.record(["".join(said)], namespace=owner)
            _show_figures(column.name, session.stats)

    def _worker(self, path: str, name: str, *, vault: bool) -> Worker:
        """Return the process of a bundle, which stays from cell to cell."""
        if (path, vault) not in self._workers:
            self._workers[path, vault] = name, Worker(
                path, vault=vault, passphrase=self._passphrase)
        return self._workers[path, vault][1]

    def _cool(self) -> None:
        """End the processes, unless a cell uses one: its end will see to them."""
        if self._using.acquire(blocking=False):
            try:
                for _, worker in self._workers.values():
                    worker.close()
            finally:
                self._using.release()


def _stream(session: WorkerSession, ask: Ask, said: list[str]) -> None:
    """Write an answer under the cell as it comes, and note it in `said`.

    Interrupts come while a token is waited for: one that came while text was written, which may
    take its time, would have it written again, or never.
    """
    answer = session.answer(ask)
    shown, last_s = 0, time.monotonic()
    with uninterrupted() as interrupts:
        try:
            for token in interrupts.interruptible(answer):
                said.append(token.text)
                if time.monotonic() - last_s > _BATCH_S:
                    show("".join(said[shown:]), end="")
                    shown, last_s = len(said), time.monotonic()
        finally:
            show("".join(said[shown:]))


def _show_figures(name: str, stats: Stats) -> None:
    speed = stats.decode_tokens_per_s
    display({"text/plain": " · ".join([  # type: ignore[no-untyped-call]
        name, _FINISH.get(stats.finish, stats.finish), f"{stats.tokens} tokens",
        *([] if speed is None else [f"{speed:,.0f} tokens/s"]),
        *([f"{stats.accepted_tokens} of {stats.drafted_tokens} guessed right"]
          if stats.drafted_tokens else []),
        f"first after {1000 * stats.ttft_s:.0f} ms"])}, raw=True)


def _size(tier: Tier) -> str:
    path = family.bundle_path(tier)
    if not path.is_dir():
        return "not installed"
    return bytes_text(sum(each.stat().st_size for each in path.rglob("*") if each.is_file()))


def _tell(error: BaseException, sentence: str = "") -> NoReturn:
    """Fail the cell by an error that IPython shows as one sentence, without a traceback."""
    words = f"{type(error).__name__}: {sentence or error}"
    error._render_traceback_ = lambda: [words]  # type: ignore[attr-defined]
    raise error from None


def load(shell: InteractiveShell) -> None:
    """Add the magics to a shell."""
    shell.register_magics(CloisterMagics(shell))


def unload(shell: InteractiveShell) -> None:
    """End what the magics keep; the shell forgets its history's guard."""
    magics = shell.magics_manager.registry.get(CloisterMagics.__name__)
    if magics is not None:
        magics.close()
