"""A part of the lab under a tab of its own, with its messages."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from cloister.vault.namespace import Namespace
    from cloister_jupyter.cases import Case
    from cloister_jupyter.column import Column
    from cloister_jupyter.history import KeptRun

__all__ = ["Lab", "Panel"]


class Lab(Protocol):
    """What a panel uses of the lab that it belongs to."""

    bundles: tuple[Column, ...]
    functions: dict[str, Callable[[str, Case], bool]]  # the user's own checks, by their names
    space: Namespace | None  # None: nothing is kept

    def record(self, texts: Iterable[str]) -> None:
        """Keep fingerprints of texts before they are shown."""

    def send(self, content: dict[str, Any]) -> None:
        """Send a message to the pages."""

    def prompts(self) -> list[str]:
        """Return what the panels asked last."""

    def send_badge(self) -> None:
        """Tell the pages anew what holds for privacy."""

    def sources(self) -> list[str]:
        """Return where there are rows for a file: "run", and the names of panels."""

    def results(
        self, source: str = "run", places: Sequence[int] = (),
    ) -> list[dict[str, object]]:
        """Return the rows of the last run, of runs that the history has, or of a panel."""


class Panel(ABC):
    """What the kernel has for a tab; `static/NAME.js` is what the page has.

    No method may wait for anything: messages come on the kernel's own threads.
    """

    name: ClassVar[str]  # before the dot in the types of its messages
    parts: ClassVar[tuple[str, ...]] = ()  # scripts that `static/NAME.js` needs before it

    def __init__(self, lab: Lab) -> None:
        self.lab = lab

    @abstractmethod
    def receive(self, content: dict[str, Any]) -> None:
        """Do what the page asks for.

        Raises:
            CloisterError: it cannot be done; the page is told by a message `NAME.invalid`.
        """

    @property
    def kept(self) -> str:
        """What this panel keeps of prompts and answers, in words for the badge."""
        return ""

    def prompts(self) -> list[str]:
        """Return the prompts that this panel asked last."""
        return []

    def open(self) -> None:  # noqa: B027  # a panel may have nothing to tell
        """Tell all to a page that opened."""

    def over(self, run: KeptRun) -> None:  # noqa: B027
        """Hear of a run of the lab that is over."""

    def results(self) -> list[dict[str, object]]:
        """Return the rows that this panel has for a file: with their texts, and none without."""
        return []

    def close(self) -> None:  # noqa: B027  # nor to let go of
        """Let go of what it holds; the lab is closed."""

    def send(self, kind: str, **values: object) -> None:
        """Send a message to the pages."""
        self.lab.send({"type": f"{self.name}.{kind}", **values})
