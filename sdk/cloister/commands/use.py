"""Commands that run bundles: one answer, a conversation, tiers side by side."""

from __future__ import annotations

import contextlib
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cloister import display, reference
from cloister.backend import CLOISTER
from cloister.bundle import Bundle
from cloister.commands.options import Asking, Options, Record, part
from cloister.errors import CloisterError, InvalidText, OutputExists, SettingError
from cloister.runtime.client import Worker
from cloister.runtime.draft import AUTO, LOOKUP, OFF
from cloister.tiers import Tier

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from cloister.parts import Audio, Image
    from cloister.runtime.chat import Stats

__all__ = ["Chat", "Compare", "Replay", "Run", "chat", "compare", "replay", "run"]


@dataclass(frozen=True, kw_only=True)
class Run(Asking):
    """One answer."""

    bundle: str
    prompt: str = field(repr=False)
    logprobs: int
    replay: Path | None
    cached: bool
    namespace: str


@dataclass(frozen=True, kw_only=True)
class Chat(Asking):
    """A conversation."""

    bundle: str
    session: str | None = field(repr=False)
    kv: str
    namespace: str


@dataclass(frozen=True, kw_only=True)
class Compare(Asking):
    """Tiers side by side."""

    prompt: str = field(repr=False)
    tiers: str | None


@dataclass(frozen=True, kw_only=True)
class Replay(Options):
    """A replay file, run again."""

    bundle: str
    file: Path
    family: Path | None


_FILES = "/image FILE and /audio FILE go with the next question, an empty line leaves."


def run(options: Run) -> Record:
    """One answer, streamed."""
    asked, parts = options.asked, options.parts
    _check_replay(options)
    with _worker(options.bundle, options) as worker:
        chat = worker.session(
            system=options.system, namespace=options.namespace, cached=options.cached)
        _tell(worker, options.bundle, options)
        text, tokens = "", []
        for token in chat.stream(
            _question(parts, options.prompt), top=options.logprobs, **asked
        ):
            text += token.text
            tokens.append(token)
            if not options.json:
                display.show(token.text, end="")
        stats, loaded, guard_tier = chat.stats, worker.loaded, worker.guard_tier
    assert loaded is not None
    if not options.json:
        display.show("")
        if options.logprobs:
            display.table("Tokens", ("text", "log-probability", "id"), [
                (repr(token.text), f"{token.logprob:.3f}", str(token.id)) for token in tokens
            ])
    if options.replay is not None:
        from cloister.runtime import replay as replays

        replays.write(options.replay, replays.Replay(
            model_id=loaded.model_id, system=options.system, prompt=options.prompt,
            max_tokens=options.max_tokens, sampling=options.sampling,
            tokens=tuple(token.id for token in tokens)))
        display.note(
            f"{options.replay.name} holds the prompt and the answer in plain text; keep it safe.")
    record = {
        "text": text, **_measured(stats), "guard_tier": guard_tier,
        "prompt_tokens": stats.prompt_tokens, "picture_tokens": stats.picture_tokens,
        "recording_tokens": stats.recording_tokens, "encode_s": stats.encode_s,
        "restored_tokens": stats.restored_tokens,
        "load_s": loaded.load_s, "model_id": loaded.model_id,
    }
    if options.logprobs:
        record["logprobs"] = [
            {"id": token.id, "text": token.text, "logprob": token.logprob, "top": list(token.top)}
            for token in tokens
        ]
    return record


def chat(options: Chat) -> Record:
    """A conversation."""
    asked, answers = options.asked, list[str | None]()
    if ("image", "-") in options.media or ("audio", "-") in options.media:
        raise SettingError("A chat's standard input is its questions; name a file.")
    parts = options.parts  # of the next question
    with _worker(options.bundle, options) as worker:
        def begin() -> Any:
            return worker.session(
                system=options.system, namespace=options.namespace, name=options.session,
                kv=options.kv)

        session = begin()
        _tell(worker, options.bundle, options)
        before = sum(message.role != "system" for message in session.messages)
        opened: Record = {}
        if worker.unlocked is not None:
            opened = {"provider": worker.unlocked.provider, "memory": worker.unlocked.memory,
                      "messages": before, "restored_tokens": session.restored_tokens}
        if not options.json:
            display.note(_greeting(opened))
        for prompt in _lines(prompts=not options.json):
            if prompt == "/new" and options.session is None:
                session.close()
                session, parts = begin(), []
                continue
            text = ""
            try:
                if added := _added(prompt, trim=options.trim):
                    parts.append(added)
                    continue
                question, parts = [*parts, prompt], []
                for token in session.stream(question, **asked):
                    text += token.text
                    if not options.json:
                        display.show(token.text, end="")
            except KeyboardInterrupt:
                display.note("(stopped)")
            except CloisterError as error:  # the conversation goes on
                display.note(str(error))
                answers.append(None)
                continue
            answers.append(text)
            if not options.json:
                display.show("")
        session.close()
    failed = answers.count(None)  # their places in `answers` are null
    return {"turns": len(answers) - failed, "failed": failed, "answers": answers, **opened}


def compare(options: Compare) -> Record:
    """Tiers side by side."""
    asked, parts = options.asked, options.parts
    names: list[str] = options.tiers.split(",") if options.tiers else [
        tier for tier in Tier if reference.bundle_path(tier, options.family).is_dir()]
    if not names:
        raise SettingError("The family has no bundle; name some with --tiers.")
    rows = []
    for name in names:
        with _worker(name, options) as worker:  # one process a tier: its own peak memory
            session = worker.session(system=options.system)
            text = session.ask(_question(parts, options.prompt), **asked).text
            assert worker.loaded is not None
            rows.append({
                "tier": str(name), "text": text, **_measured(session.stats),
                "load_s": worker.loaded.load_s, "cold": True,
            })
    if not options.json:
        display.table(
            "Side by side, each in a new process, one at a time",
            ("tier", "answer", "tokens/s", "first token", "ready in", "peak memory"),
            [(
                row["tier"], row["text"],
                f"{row['decode_tokens_per_s']:,.0f}" if row["decode_tokens_per_s"] else "-",
                f"{1000 * row['ttft_s']:.0f} ms", f"{row['load_s']:.2f} s",
                display.bytes_text(row["peak_rss_bytes"]),
            ) for row in rows], texts=2,
        )
    return {"answers": rows}


def replay(options: Replay) -> Record:
    """Run a replay file again."""
    from cloister.runtime import replay as replays

    replays.read(options.file)  # before a model is loaded
    with _worker(options.bundle, options) as worker:
        assert worker.loaded is not None
        tokens = replays.replay(
            options.file, worker.loaded.model_id, lambda system: worker.session(system=system))
    if not options.json:
        display.show(f"{tokens} tokens, all the same.")
    return {"ok": True, "tokens": tokens}


def _check_replay(options: Run) -> None:
    """Raise unless what is asked for can be written to a replay file, and replayed."""
    if options.replay is None:
        return
    if options.media:
        raise SettingError("A replay file holds text only; leave --replay out.")
    if options.schema is not None or options.tools is not None:
        raise SettingError("A replay file holds no schema or tools; leave --replay out.")
    if options.temperature > 0 and options.seed is None:
        raise SettingError("What is drawn without a seed cannot be replayed; add --seed.")
    if options.replay.exists():
        raise OutputExists(f"Output {options.replay.name} exists already; name another.")


def _worker(bundle: str, options: Run | Chat | Compare | Replay) -> Worker:
    from cloister.commands.vault import asking

    keeps = (isinstance(options, Run) and options.cached) or (
        isinstance(options, Chat) and options.session is not None)
    draft = options.draft if isinstance(options, Asking) else AUTO
    if draft not in (AUTO, LOOKUP, OFF):
        draft = str(reference.find(draft, options.family))
    return Worker(
        reference.find(bundle, options.family), draft=draft, passphrase=asking(), vault=keeps,
        debug=options.debug)


def _measured(stats: Stats) -> Record:
    return {
        "tokens": stats.tokens, "finish": stats.finish, "ttft_s": stats.ttft_s,
        "decode_tokens_per_s": stats.decode_tokens_per_s, "drafted_tokens": stats.drafted_tokens,
        "accepted_tokens": stats.accepted_tokens, "peak_rss_bytes": stats.peak_rss_bytes,
    }


def _tell(worker: Worker, bundle: str, options: Run | Chat) -> None:
    """Say what the user should know of a new vault, and of a program that is not the first."""
    first = Bundle.open(reference.find(bundle, options.family)).manifest.programs[0]
    if worker.loaded is not None and worker.loaded.backend != first.backend == CLOISTER.name:
        known = first.operator_abi == CLOISTER.operator_abi
        display.note(
            f"Cloister's own operators {'do not run' if known else 'are others'} here, and the "
            f"program for {worker.loaded.backend} answers; "
            + ("`cloister kernels build` says why." if known else "export the bundle again."))
    if worker.unlocked is not None and worker.unlocked.notice is not None:
        display.note(worker.unlocked.notice)


def _greeting(opened: Record) -> str:
    if not opened:
        return f"Nothing is kept once you leave. /new begins again, {_FILES}"
    if not opened["messages"]:
        return f"This conversation is kept, sealed. {_FILES.capitalize()}"
    return (
        f"{opened['messages']} messages were kept; {opened['restored_tokens']} tokens of them need "
        f"not be read again. {_FILES.capitalize()}"
    )


def _added(line: str, *, trim: bool) -> Image | Audio | None:
    """Read the file that a line adds to the next question, if it does."""
    found = re.fullmatch(r"/(image|audio) +(.+)", line)
    return None if found is None else part(
        found[1], str(Path(found[2]).expanduser()), trim=trim)


def _question(parts: Sequence[Image | Audio], prompt: str) -> list[str | Image | Audio]:
    """Return pictures and recordings with the prompt behind them, which may be left out then."""
    return [*parts, prompt] if prompt or not parts else [*parts]


def _lines(*, prompts: bool) -> Iterator[str]:
    """Questions as they are typed, or piped; only at a terminal does an empty line end them."""
    if sys.stdin.isatty():
        with contextlib.suppress(EOFError):
            while line := input("> " if prompts else ""):
                yield line
        return
    encoding = "utf-8-sig"  # of the first line
    for raw in sys.stdin.buffer:
        try:
            line = raw.decode(encoding).rstrip("\r\n")
        except UnicodeError:
            raise InvalidText("A question is not valid UTF-8; convert it first.") from None
        encoding = "utf-8"
        if line:
            yield line
