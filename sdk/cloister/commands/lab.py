"""`cloister lab`: what the prompt lab leaves in notebooks."""

from __future__ import annotations

import shlex
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cloister import display
from cloister.audit import notebook
from cloister.commands.options import Options, Record
from cloister.commands.vault import asking
from cloister.settings import Settings
from cloister.vault import local
from cloister.vault.namespace import Kind

if TYPE_CHECKING:
    from pathlib import Path

    from cloister.audit.notebook import Report

__all__ = ["Lab", "lab"]


@dataclass(frozen=True, kw_only=True)
class Lab(Options):
    """What to do for the lab."""

    action: str
    notebook: Path


def lab(args: Lab) -> Record:
    """Run one of the lab's commands; its record is not `ok` where something was found."""
    with ExitStack() as stack:
        trails = []
        # Without a vault the lab has kept nothing, and nothing is made for a search.
        known = local.header(Settings.from_environment()) is not None
        if known:
            vault = stack.enter_context(local.open_vault(asking()))
            trails = [notebook.Trail(space, Kind.HISTORY) for space in vault.namespaces()]
        report = notebook.check(args.notebook, trails)
        fingerprints = sum(len(trail.known) for trail in trails)
    cures = _cures(args.notebook, report)
    if not args.json:
        _show(report, cures, fingerprints if known else None)
    return {
        "ok": not report.findings, "notebook": args.notebook.name,
        "fingerprints": fingerprints if known else None, **report.to_dict(), "cures": cures}


def _cures(path: Path, report: Report) -> list[str]:
    """Return what takes away what was found, a sentence each."""
    # As nbstripout 0.9 does: of metadata it takes the widgets, and what it is told to.
    own = {each.place for each in report.findings if each.file == path.name}
    name, cures = shlex.quote(path.name), []
    if own & {"outputs", "widget state"}:
        cures.append(f"Strip outputs and widget state with `nbstripout {name}`, and at every "
                     "commit with `nbstripout --install`.")
    if "metadata" in own:
        cures.append("Strip a field of metadata with `nbstripout --extra-keys "
                     f"'metadata.FIELD cell.metadata.FIELD' {name}`.")
    if own & {"source", "attachments"}:
        cures.append("Delete what stands in source and attachments by hand: nbstripout leaves it.")
    if any(each.file != path.name for each in report.findings):
        cures.append("Delete the checkpoint, or save the notebook again when it is clean.")
    return cures


def _show(report: Report, cures: list[str], fingerprints: int | None) -> None:
    sought = "no vault is here, so only forms of personal data were looked for" if (
        fingerprints is None) else f"{fingerprints:,} fingerprints were looked for"
    if not report.findings:
        display.show(f"Nothing found in {' and '.join(report.files)}; {sought}.")
        return
    display.table(f"Found; {sought}", ("file", "cell", "place", "kind", "count"), [(
        each.file, str(each.cell) if each.cell else "-", each.place, each.kind, str(each.count),
    ) for each in report.findings])
    for cure in cures:
        display.show(cure)
