"""Results as one HTML page: nothing is loaded, nothing runs, and every text is shown as text."""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["document", "visible"]

# A page that somebody passes on must not tell anybody that it was opened, whatever it shows.
_POLICY = ("default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'")
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u202a-\u202e\u2060-\u2069\ufeff]")
_LONG = 40  # characters from which a column is one of texts
_STYLE = Path(__file__).parent / "static" / "page.css"


def document(title: str, rows: Sequence[Mapping[str, object]]) -> str:
    """Return a page with a table of rows of the same columns; what never varies stands above it."""
    names = list(rows[0])
    same = [name for name in names if len(rows) > 1 and len({
        (type(row[name]), row[name]) for row in rows}) == 1]
    varying = [name for name in names if name not in same]
    kinds = {name: _kind([row[name] for row in rows]) for name in names}
    facts = "".join(f"<dt>{_shown(name)}</dt>{_cell('dd', rows[0][name], kinds[name])}\n"
                    for name in same if rows[0][name] not in (None, ""))
    heading = "".join(f'<th scope="col">{_shown(name)}</th>' for name in varying)
    body = "\n".join("<tr>" + "".join(
        _cell("td", row[name], kinds[name]) for name in varying) + "</tr>" for row in rows)
    count = f"{len(rows):,} row{'s' * (len(rows) != 1)}"
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<meta name="referrer" content="no-referrer">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{_shown(title)}</title>
<style>
{_STYLE.read_text("utf-8")}</style>
</head>
<body>
<main>
<h1>{_shown(title)}</h1>
{f"<dl>{chr(10)}{facts}</dl>" if facts else ""}
<div class="rows" role="region" aria-label="Rows" tabindex="0">
<table>
<caption>{count}</caption>
<thead><tr>{heading}</tr></thead>
<tbody>
{body}
</tbody>
</table>
</div>
</main>
</body>
</html>
"""


def visible(text: str) -> str:
    """Return a text whose control and invisible characters are seen.

    Otherwise they could rearrange the page, or hide what stands beside them.
    """
    return _CONTROL.sub(lambda found: _name(ord(found[0])), text)


def _name(code: int) -> str:
    if code < 0x20:
        return chr(0x2400 + code)
    return "\u2421" if code == 0x7f else f"\u27e8U+{code:04X}\u27e9"


def _kind(values: Sequence[object]) -> str:
    if all(isinstance(each, int | float) or each is None for each in values):
        return "number"
    return "text" if any(len(str(each)) > _LONG or "\n" in str(each) for each in values) else ""


def _cell(tag: str, value: object, kind: str) -> str:
    shown = "" if value is None else (
        f"{value:.6g}" if isinstance(value, float) else _shown(str(value)))
    # The frame is the page's, the direction that of the text itself.
    return f"<{tag}{f' class={kind}' if kind else ''} dir=auto>{shown}</{tag}>"


def _shown(text: str) -> str:
    return html.escape(visible(text))
