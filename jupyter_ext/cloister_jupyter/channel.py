"""Widgets whose pages reach them while a cell is busy."""

from __future__ import annotations

import json
import weakref
from pathlib import Path
from typing import Any

from anywidget import AnyWidget
from traitlets import Bool, Unicode

from cloister.errors import InvalidText

__all__ = ["Page", "check_text", "script", "style"]

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
