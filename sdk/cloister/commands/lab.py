"""`cloister lab`: JupyterLab with the lab in it, and what the lab leaves in notebooks."""

from __future__ import annotations

import shlex
from contextlib import ExitStack
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Self

from cloister import display
from cloister.audit import notebook
from cloister.commands.options import Options, Record
from cloister.commands.start import start
from cloister.commands.vault import asking
from cloister.settings import Settings
from cloister.vault import local
from cloister.vault.namespace import Kind

if TYPE_CHECKING:
    from argparse import Namespace

    from cloister.audit.notebook import Report
    from cloister.vault.store import Vault

__all__ = ["Lab", "checked", "lab"]


@dataclass(frozen=True, kw_only=True)
class Lab(Options):
    """What to do for the lab; each action has some of these."""

    action: str
    notebook: Path | None = None
    directory: Path | None = None
    port: int | None = None
    browser: bool = True
    jupyter: tuple[str, ...] = ()  # more arguments

    @classmethod
    def of(cls, parsed: Namespace) -> Self:
        """Take the options out of parsed arguments, those that the action has."""
        names = {field.name for field in fields(cls)}
        return cls(**{name: value for name, value in vars(parsed).items() if name in names})


def lab(args: Lab) -> Record:
    """Run one of the lab's commands; its record is not `ok` where something was found."""
    if args.notebook is None:
        start(args.directory or Path(), port=args.port, browser=args.browser, more=args.jupyter)
    with ExitStack() as stack:
        vault = None
        # Without a vault the lab has kept nothing, and nothing is made for a search.
        if local.header(Settings.from_environment()) is not None:
            vault = stack.enter_context(local.open_vault(asking()))
        report, record = checked(args.notebook, vault)
    if not args.json:
        _show(report, record["cures"], record["fingerprints"])
    return record


def checked(path: Path, vault: Vault | None) -> tuple[Report, Record]:
    """Search a notebook for what the vault has fingerprints of, and for personal data."""
    trails = [] if vault is None else [
        notebook.Trail(space, Kind.HISTORY) for space in vault.namespaces()]
    report = notebook.check(path, trails)
    return report, {
        "ok": not report.findings, "notebook": path.name, "fingerprints": (
            None if vault is None else sum(len(trail.known) for trail in trails)),
        **report.to_dict(), "cures": _cures(path, report)}


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
    if report.reserved:
        sought += f", without {report.reserved} that are reserved for examples"
    if not report.findings:
        display.show(f"Nothing found in {' and '.join(report.files)}; {sought}.")
        return
    display.table(f"Found; {sought}", ("file", "cell", "place", "kind", "count"), [(
        each.file, str(each.cell) if each.cell else "-", each.place, each.kind, str(each.count),
    ) for each in report.findings])
    for cure in cures:
        display.show(cure)
