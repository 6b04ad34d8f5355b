"""A panel whose work waits for a disk or a model: it is done in order, on a thread of its own."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from cloister.errors import named
from cloister_jupyter.panels import Panel

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Future

    from cloister_jupyter.panels import Lab

__all__ = ["LaterPanel"]


class LaterPanel(Panel):
    """A panel that does things later; what fails then is told by a message `NAME.invalid`."""

    def __init__(self, lab: Lab) -> None:
        super().__init__(lab)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=f"cloister {self.name}")

    def later(self, do: Callable[..., object], *args: object) -> Future[None]:
        """Do something after what is to be done already."""
        return self._thread.submit(self._do, do, *args)

    def _do(self, do: Callable[..., object], *args: object) -> None:
        try:
            do(*args)
        except Exception as error:
            self.send("invalid", message=str(named(error, "The lab")))

    def close(self) -> None:
        """End the thread when it has done what is begun."""
        self._thread.shutdown(wait=False, cancel_futures=True)
