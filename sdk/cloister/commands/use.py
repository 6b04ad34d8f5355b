"""Commands that run bundles: one answer, a conversation, tiers side by side."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cloister import display, reference
from cloister.errors import CloisterError, SettingError
from cloister.runtime.client import Worker
from cloister.tiers import Tier

if TYPE_CHECKING:
    from argparse import Namespace
    from collections.abc import Iterator

__all__ = ["chat", "compare", "replay", "run"]

Record = dict[str, Any]


def run(args: Namespace) -> Record:
    """One answer, streamed."""
    with Worker(debug=args.debug) as worker:
        loaded = worker.load(reference.find(args.bundle, args.family))
        if args.cached:
            _open(worker, args)
        text, ids, tokens = "", [], []
        for piece in worker.stream(
            args.prompt, top=args.logprobs, cached=args.cached, **_request(args)
        ):
            text += piece.text
            ids.append(piece.id)
            if args.logprobs:
                tokens.append({"id": piece.id, "text": piece.text, "logprob": piece.logprob,
                               "top": [list(pair) for pair in piece.top]})
            if not args.json:
                print(piece.text, end="", flush=True)  # noqa: T201
        stats = worker.stats
    if not args.json:
        print()  # noqa: T201
        if args.logprobs:
            display.table("Tokens", ("text", "log-probability", "id"), [
                (repr(token["text"]), f"{token['logprob']:.3f}", str(token["id"]))
                for token in tokens
            ])
    if args.replay is not None:
        from cloister.runtime import replay
        from cloister.runtime.sampling import Sampling

        replay.write(
            args.replay, model_id=loaded["model_id"], system=args.system, prompt=args.prompt,
            max_tokens=args.max_tokens, sampling=Sampling(**_sampling(args)), tokens=ids,
        )
        _say(f"{args.replay.name} holds the prompt and the answer in plain text; keep it safe.")
    record = {
        "text": text, "tokens": stats["tokens"], "finish": stats["finish"],
        "ttft_s": stats["ttft_s"], "decode_tokens_per_s": stats["decode_tokens_per_s"],
        "peak_rss_bytes": stats["peak_rss_bytes"], "guard_tier": stats["guard_tier"],
        "prompt_tokens": stats["prompt_tokens"], "restored_tokens": stats["restored_tokens"],
        "load_s": loaded["load_s"],
        "model_id": loaded["model_id"],
    }
    return {**record, "logprobs": tokens} if args.logprobs else record


def chat(args: Namespace) -> Record:
    """A conversation."""
    turns = 0
    with Worker(debug=args.debug) as worker:
        worker.load(reference.find(args.bundle, args.family))
        opened = {} if args.session is None else _open(
            worker, args, session=args.session, system=args.system, kv=args.kv)
        if not args.json:
            _say(_greeting(opened))
        answers = []
        for prompt in _lines(prompts=not args.json):
            if prompt == "/new" and not opened:
                worker.forget()
                continue
            text = ""
            try:
                for piece in worker.stream(prompt, **_request(args)):
                    text += piece.text
                    if not args.json:
                        print(piece.text, end="", flush=True)  # noqa: T201
            except KeyboardInterrupt:
                _say("(stopped)")
            except CloisterError as error:  # the conversation is as before
                _say(str(error))
                continue
            turns += 1
            answers.append(text)
            if not args.json:
                print()  # noqa: T201
    return {"turns": turns, "answers": answers, **opened}


def compare(args: Namespace) -> Record:
    """Tiers side by side."""
    if args.tiers:
        names = args.tiers.split(",")
    else:
        names = [t for t in Tier if reference.bundle_path(t, args.family).is_dir()]
        if not names:
            raise SettingError("The family has no bundle; name some with --tiers.")
    rows = [_answer(name, args) for name in names]
    if not args.json:
        _side_by_side(rows)
    return {"answers": rows}


def replay(args: Namespace) -> Record:
    """Run a replay file again."""
    with display.quiet(args.debug):
        from cloister.runtime.engine import Engine
        from cloister.runtime.replay import replay as again

        tokens = again(Engine(reference.find(args.bundle, args.family)), args.file)
    if not args.json:
        print(f"{tokens} tokens, all the same.")  # noqa: T201
    return {"ok": True, "tokens": tokens}


def _answer(name: str, args: Namespace) -> Record:
    with Worker(debug=args.debug) as worker:  # one process a tier: its own peak memory
        loaded = worker.load(reference.find(name, args.family))
        text = "".join(piece.text for piece in worker.stream(args.prompt, **_request(args)))
        stats = worker.stats
    return {
        "tier": str(name), "text": text, "tokens": stats["tokens"], "finish": stats["finish"],
        "load_s": loaded["load_s"], "ttft_s": stats["ttft_s"],
        "decode_tokens_per_s": stats["decode_tokens_per_s"],
        "peak_rss_bytes": stats["peak_rss_bytes"], "cold": True,
    }


def _side_by_side(rows: list[Record]) -> None:
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


def _open(worker: Worker, args: Namespace, **session: Any) -> Record:
    """Open the vault in the worker, with the passphrase where it takes one."""
    from cloister.commands.vault import asking
    from cloister.settings import Settings
    from cloister.vault.keys import Provider
    from cloister.vault.local import header

    settings = Settings.from_environment()
    known, ask = header(settings), asking()
    secret = None
    if known and known.provider is Provider.PASSPHRASE and settings.passphrase is None and ask:
        secret = ask()
    opened = worker.open(namespace=args.namespace, passphrase=secret, **session)
    if known is None:
        _say(f"A vault was made; {opened['provider']} holds its key: see cloister vault status")
    return {name: value for name, value in opened.items() if name != "event"}


def _greeting(opened: Record) -> str:
    if not opened:
        return "Nothing is kept once you leave. /new begins again, an empty line leaves."
    if not opened["messages"]:
        return "This conversation is kept, sealed. An empty line leaves."
    return (
        f"{opened['messages']} messages were kept; {opened['restored_tokens']} tokens of them need "
        "not be read again. An empty line leaves."
    )


def _request(args: Namespace) -> Record:
    return {"system": args.system, "max_tokens": args.max_tokens, "sampling": _sampling(args)}


def _sampling(args: Namespace) -> Record:
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")
    return {name: getattr(args, name) for name in names}


def _lines(*, prompts: bool) -> Iterator[str]:
    while True:
        try:
            line = input("> " if prompts else "")
        except EOFError:
            return
        if not line:
            return
        yield line


def _say(text: str) -> None:
    from rich.console import Console

    Console(stderr=True).print(text, markup=False, style="dim")
