"""What holds for the privacy of a lab, by evidence: what its processes tried, what is kept where.

Says what does not hold as plainly as what does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from cloister.errors import CloisterError
from cloister.settings import Settings
from cloister.vault.local import header

if TYPE_CHECKING:
    from collections.abc import Mapping

    from cloister.runtime.protocol import Welcome
    from cloister_jupyter.runs import Probed

__all__ = ["Badge", "Rows", "badge", "evidence", "kept_by_lab"]

Rows = tuple[tuple[str, str], ...]
_FILE = ("notebook file", "names of tiers and bundles only, no prompt and no answer")
_SAYS = {
    2: "no network (refused by the operating system)",
    1: "no network for Python code only",
    0: "network not refused",
}


class Badge(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="badge"):
    """A line, and the evidence for it by groups of names and values."""

    tier: int | None  # lowest of the processes; None: none was started yet
    summary: str
    groups: tuple[tuple[str, Rows], ...]


def badge(
    welcomes: Mapping[str, Welcome], settings: Settings | None = None, *,
    kept: tuple[str, Rows] | None = None, probed: Probed | None = None,
) -> Badge:
    """Return what holds, for workers that greeted with `welcomes`, by name.

    `kept` says in a word and by rows what is kept; without it the workers have no vault. `probed`
    is what they found when they last tried to reach out.
    """
    word, rows = kept or ("nothing kept", (
        ("prompts and answers", "nothing: the model processes have no vault, and what was said "
                                "ends with this kernel"),
        _FILE,
        ("vault on this machine", f"{_vault(settings)}; no model process here has opened it"),
    ))
    tier = min((welcome.guard_tier for welcome in welcomes.values()), default=None)
    guard = "network: not known before the first run" if tier is None else (
        f"guard tier {tier}: {_SAYS.get(tier, 'unknown')}")
    alike: dict[Rows, list[str]] = {}
    for name, welcome in welcomes.items():
        alike.setdefault(evidence(welcome), []).append(name)
    return Badge(tier=tier, summary=f"{guard}{_found(probed)} · {word}", groups=(
        *_tried(probed),
        ("What is kept", rows),
        ("What is not guarded", (
            ("this page, the Jupyter server and the notebook's kernel",
             "prompts and answers pass through their memory, and between them over this machine's "
             "own connections; code in cells may use the network"),
        )),
        *((f"Model process{'es' * (len(names) > 1)} of {', '.join(names)}", rows)
          for rows, names in alike.items()),
    ))


def _found(probed: Probed | None) -> str:
    if probed is None or not probed.attempts:
        return ""
    through = {each.name for tried in probed.attempts.values() for each in tried
               if not each.refused}
    return f" · NOT refused just now: {', '.join(sorted(through))}" if through else (
        " · tried to reach out, refused")


def _tried(probed: Probed | None) -> tuple[tuple[str, Rows], ...]:
    if probed is None:
        return ()
    alike: dict[Rows, list[str]] = {}
    for name, attempts in probed.attempts.items():
        alike.setdefault(tuple((each.name, each.how) for each in attempts), []).append(name)
    return (
        *((f"Tried to reach out at {probed.at}, from the process{'es' * (len(names) > 1)} of "
           f"{', '.join(names)}", rows) for rows, names in alike.items()),
        *((f"Could not try at {probed.at}", (("error", words),)) for words in probed.failed))


def kept_by_lab(words: str, settings: Settings | None = None) -> tuple[str, Rows]:
    """Return what a lab with a vault keeps of prompts and answers, which `words` say."""
    return f"kept: {words.partition(' in ')[0]}", (
        ("prompts and answers", words),
        _FILE,
        ("vault on this machine",
         f"{_vault(settings)}; this lab writes to one, its processes do not"))


def evidence(welcome: Welcome) -> Rows:
    """Return what a process said of how it guards itself, by names and values."""
    return (
        ("guard tier", f"{welcome.guard_tier}: {welcome.guard}"), *welcome.evidence.items(),
        *((f"memory: {what}", how) for what, how in welcome.memory.items()))


def _vault(settings: Settings | None) -> str:
    try:
        known = header(settings or Settings.from_environment())
    except CloisterError as error:
        return f"cannot be read ({type(error).__name__})"
    return "none" if known is None else f"there is one, its key held by: {known.provider}"
