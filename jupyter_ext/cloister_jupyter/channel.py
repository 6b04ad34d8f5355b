"""Widgets whose pages reach them while a cell is busy."""

from __future__ import annotations

import json
import weakref
from pathlib import Path
from typing import Any, NamedTuple

from anywidget import AnyWidget
from traitlets import Bool, Unicode

from cloister.errors import InvalidText

__all__ = ["Page", "check_text", "close_earlier", "script", "style"]

_STATIC = Path(__file__).parent / "static"


def script(*names: str) -> str:
    """Return one module of scripts, after those that all pages share."""
    return "\n".join((_STATIC / f"{name}.js").read_text("utf-8")
                     for name in ("text", "kernel", *names))


def style(*names: str) -> str:
    """Return one style sheet."""
    return "\n".join((_STATIC / f"{name}.css").read_text("utf-8") for name in names)


def check_text(content: Any) -> None:
    """Refuse half of a surrogate pair in what a page sent: no message could say it to a page again.

    Raises:
        InvalidText: it has one.
    """
    try:
        json.dumps(content, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise InvalidText("What was typed holds half a character; type it anew.") from None


class _Cell(NamedTuple):
    """A cell that runs."""

    cell: str  # its id
    run: str

    @classmethod
    def now(cls) -> _Cell | None:
        """Return the one that runs; None where the front end gives cells no ids."""
        from IPython import get_ipython

        kernel = getattr(get_ipython(), "kernel", None)
        parent = {} if kernel is None else kernel.get_parent("shell")
        id_ = parent.get("metadata", {}).get("cellId")
        return cls(id_, parent["header"]["msg_id"]) if id_ else None


_made: dict[str, tuple[str, weakref.WeakSet[Page]]] = {}  # by cells: the last run, and its pages


def close_earlier() -> None:
    """Close the pages that an earlier run of this cell made.

    Nobody sees them any more, and whatever they ask of a model the new one would wait for.
    """
    now = _Cell.now()
    if now is not None and now.cell in _made and _made[now.cell][0] != now.run:
        for page in list(_made.pop(now.cell)[1]):
            page.close()


class Page(AnyWidget):
    """A widget that takes messages of its page from the kernel's control channel, too.

    A busy cell holds up the shell channel, where pages send messages of widgets, unless both ends
    have subshells (JupyterLab 4.4, ipykernel 7). The control channel has a thread of its own from
    ipykernel 6 on.
    """

    widget_id = Unicode().tag(sync=True)
    control = Bool(False).tag(sync=True)  # the kernel takes messages on its control channel

    def listen(self) -> None:
        """Take messages from now on."""
        self.widget_id = self.model_id
        self.on_msg(lambda _widget, content, _buffers: self.receive(content))
        self.control = _Channel.add(self)
        now = _Cell.now()
        if now is not None:
            _made.setdefault(now.cell, (now.run, weakref.WeakSet()))[1].add(self)

    def receive(self, content: Any) -> None:
        """Do what the page asks for, at once; on any thread."""
        raise NotImplementedError


class _Channel:
    """The pages of a kernel by their ids, as a handler of its control channel."""

    MESSAGE = "cloister_widget"

    def __init__(self) -> None:
        self.pages: weakref.WeakValueDictionary[str, Page] = weakref.WeakValueDictionary()

    def __call__(self, _stream: object, _ident: object, message: dict[str, Any]) -> None:
        content = message["content"]
        page = self.pages.get(str(content.get("widget")))
        if page is not None:
            page.receive(content.get("content"))

    @classmethod
    def add(cls, page: Page) -> bool:
        """Take messages for `page`; whether the kernel has such a channel."""
        from IPython import get_ipython

        handlers = getattr(getattr(get_ipython(), "kernel", None), "control_handlers", None)
        if handlers is None:
            return False
        handlers.setdefault(cls.MESSAGE, cls()).pages[page.widget_id] = page
        return True
