"""A bundle's receipt as a table. Holds measured numbers only, nothing that anyone typed.

Nothing is loaded from anywhere: one HTML fragment without script, style sheet or link, so that a
saved notebook shows it as it was.
"""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

from cloister.bundle import Bundle

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["Receipt"]


class Receipt:
    """The receipt of the bundle in `path`: its size, and its program's loss against its checkpoint.

    Raises:
        BundleError: see `cloister.bundle.Bundle.open`.
    """

    def __init__(self, path: str | Path) -> None:
        self._bundle = Bundle.open(path)

    def rows(self) -> list[tuple[str, str]]:
        """Return names and values, in order."""
        bundle, manifest = self._bundle, self._bundle.manifest
        lost = bundle.receipt().get("program_against_checkpoint")
        rows = [
            ("tier", manifest.name),
            ("weights", f"{manifest.shape.parameters:,}, embedding and head apart"),
            ("recipe", manifest.recipe),
            ("context", f"{manifest.context:,} tokens"),
            ("bundle", f"{manifest.size_bytes:,} bytes"),
            ("model id", bundle.model_id(manifest.programs[0])),
        ]
        if isinstance(lost, dict):
            rows += [
                ("checked on", f"{lost['n']:,} tokens"),
                ("mean KL divergence", f"{lost['mean_kld']:.2g} nats a token"),
                ("same most likely token", f"{lost['top1']:.2%}"),
            ]
        return rows

    def __repr__(self) -> str:
        return "\n".join(f"{name}: {value}" for name, value in self.rows())

    def _repr_html_(self) -> str:
        body = "".join(
            f"<tr><th scope='row' style='text-align:left'>{escape(name)}</th>"
            f"<td style='text-align:right'>{escape(value)}</td></tr>"
            for name, value in self.rows()
        )
        caption = escape(self._bundle.path.name)
        return f"<table><caption>{caption}</caption><tbody>{body}</tbody></table>"
