"""A conversation with one tier in a notebook cell; sealed in the vault where it has a name.

What is said travels in custom messages only, which no notebook file keeps; the synced traits hold
the tier's name and bounds. The page is `static/chat.js`.

From the page come `open` (tell me all), `ask`, `stop`, `forget`, `reopen` (take up what is kept),
`probe` (try to reach out), `attach` and `remove` (see `attached`); it is sent `badge`, `invalid`
and `unattached` (what is refused) and the events of `talk`. No handler waits for anything.
"""

from __future__ import annotations

from getpass import getpass
from typing import TYPE_CHECKING, Any

import msgspec
from traitlets import Bool, Int, List, Unicode

from cloister import parts
from cloister.errors import EngineBusy, SettingError, named
from cloister.tiers import Tier
from cloister_jupyter.attached import MOST, Attached, kinds_of
from cloister_jupyter.badge import badge
from cloister_jupyter.channel import Page, close_earlier, script, style
from cloister_jupyter.column import Column, columns_of
from cloister_jupyter.request import LIMIT_BYTES, request_of
from cloister_jupyter.talk import Event, Ready, Snapshot, Talk

if TYPE_CHECKING:
    from pathlib import Path

    from cloister_jupyter.badge import Rows

__all__ = ["ChatWidget", "Passphrase", "column_of"]


class Passphrase:
    """The vault's passphrase, asked for in the cell and remembered while this lives.

    A process that begins anew needs it again, when no cell is there to ask in.
    """

    def __init__(self) -> None:
        self._text: str | None = None

    def __repr__(self) -> str:
        return f"Passphrase({'asked' if self.asked else 'not asked'})"

    def __call__(self) -> str:
        """Return it; ask where it was not asked for.

        Raises:
            SettingError: nobody can be asked.
        """
        if self._text is None:
            try:
                self._text = getpass("Passphrase of the vault: ")
            except (NotImplementedError, EOFError):  # IPython's, where a front end takes no input
                raise SettingError(
                    "The vault has a passphrase, and it cannot be asked for here; set "
                    "CLOISTER_PASSPHRASE.") from None
        return self._text

    def clear(self) -> None:
        """Ask again the next time."""
        self._text = None

    @property
    def asked(self) -> bool:
        """Whether it is remembered."""
        return self._text is not None


class ChatWidget(Page):
    """A conversation with `model`, a tier's name or a bundle's path, in a notebook cell.

    With a `session` the conversation is kept in the vault under that name, of the owner
    `namespace`, and gone on with where it is there; the model's process opens the vault, and this
    kernel sees no key of it. A passphrase is asked for in the cell. Without a name nothing is kept.

    Raises:
        SettingError: there is no tier of that name.
        BundleError, VaultError: the conversation cannot be taken up.
    """

    _esm = script("files", "chat")
    _css = style("lab", "chat")
    tier = Unicode().tag(sync=True)
    kept = Bool(False).tag(sync=True)
    limit_bytes = Int(LIMIT_BYTES).tag(sync=True)
    takes = List(Unicode()).tag(sync=True)  # image, audio
    file_bytes = Int(parts.LIMIT_BYTES).tag(sync=True)
    most_files = Int(MOST).tag(sync=True)

    def __init__(
        self, model: str | Path, *, session: str | None = None, namespace: str = "default",
        system: str | None = None,
    ) -> None:
        close_earlier()
        column = column_of(model)
        self._passphrase = Passphrase()
        self._talk = Talk(
            column, self._tell, session=session, namespace=namespace, system=system,
            passphrase=self._passphrase)
        if session is not None:  # refused in the cell, where it can be corrected
            self._talk.open()
        self._attached = Attached(lambda message: self.send(message))
        super().__init__(
            tier=column.name, kept=session is not None, takes=kinds_of([column.path]))
        self.listen()

    def close(self) -> None:
        """Keep what is unfinished, end the process, and the widget."""
        talk = getattr(self, "_talk", None)
        if talk is not None:
            talk.close()
        super().close()

    def receive(self, content: Any) -> None:
        """Do what the page asks for, at once; on any thread."""
        turn = content.get("run") if isinstance(content, dict) else None
        try:
            match content:
                case {"type": "open"}:
                    self._talk.snapshot()
                case {"type": "stop"}:
                    self._talk.stop(turn)
                case {"type": "ask"}:
                    self._talk.ask(request_of(content, self._attached), content.get("after"))
                case {"type": "attach" | "remove"}:
                    self._attached.receive(content)
                case {"type": "forget" | "reopen" | "probe" as kind, "run": str(name)}:
                    getattr(self._talk, kind)(name)
                case _:
                    raise SettingError("The page sent what is no message; load it anew.")
        except Exception as error:
            self.send({"type": "invalid", "turn": turn, "message": str(named(error, "The chat")),
                       "busy": isinstance(error, EngineBusy)})

    def _tell(self, event: Event) -> None:
        self.send(msgspec.to_builtins(event))
        if isinstance(event, Ready | Snapshot):
            talk = self._talk
            welcomes = {} if talk.welcome is None else {talk.column.name: talk.welcome}
            self.send(msgspec.to_builtins(badge(
                welcomes, kept=("sealed in the vault", self._kept()) if talk.kept else None,
                probed=talk.probed)))

    def _kept(self) -> Rows:
        remembered = " and stays in this kernel's memory until the widget is closed"
        return (
            ("this conversation", "sealed in the vault on this machine's disk, with its name and "
                                  "what the model had read (keys and values)"),
            ("the vault's key", f"held by: {self._talk.provider or 'not known yet'}; the model's "
                                "process opens it, this kernel does not"),
            ("passphrase", "was asked for in the cell" + remembered if self._passphrase.asked
                           else "was not asked for here"),
            ("what was replaced", "an answer made again and what stood behind an edited message "
                                  "are deleted with their key once the new answer is there"),
            ("fingerprints", "of every text, for `cloister lab check`; they stay when the "
                             "conversation is forgotten"),
            ("notebook file", "the tier's name and the cell's source, which has the session's "
                              "name; no message"),
        )


def column_of(model: str | Path) -> Column:
    """Return the tier of that name, or the bundle in that path.

    Raises:
        SettingError: it is neither.
    """
    if isinstance(model, str) and model in list(Tier):
        (column,) = columns_of([model])
        return column
    if isinstance(model, str) and not model.endswith(".cloister") and "/" not in model:
        raise SettingError(
            f"No tier is named {model!r}; tiers are {', '.join(Tier)}, and another bundle is named "
            "by its path, which ends in .cloister or has a slash.")
    (column,) = columns_of([], [model])
    return column
