"""The command line: arguments in, one of `cloister.commands` called, errors as one sentence."""

from __future__ import annotations

import argparse
import contextlib
import errno
import json
import os
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from cloister import guard
from cloister.backend import BACKENDS, FURTHER, KV
from cloister.commands.start import explained
from cloister.embed import platforms as embedding
from cloister.errors import CloisterError, InvalidText, SettingError, place_of
from cloister.formats import Split
from cloister.settings import share_processor, under_torchrun
from cloister.tiers import Scale, Tier

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["main"]

_PROMPT = "text, or - for standard input; none where a picture or recording says it all"
_CLOSED = 128 + 13  # as the shell says of a program that SIGPIPE ended


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command: 0, 1 with one sentence on a named error, 2 on wrong usage."""
    parser = _parser()
    words, jupyter = _for_jupyter(list(sys.argv[1:] if arguments is None else arguments))
    parsed = parser.parse_args(words)
    parsed.jupyter = jupyter
    if parsed.command == "import" and parsed.output is None and not parsed.list:
        parser.error("import needs -o OUT")
    if arguments is None:  # a whole process
        share_processor()
        if not parsed.debug:  # whose crash must leave no text
            guard.keep_out_of_dumps()
        # Processes of torchrun talk to each other over the network, a page to its server.
        if not (under_torchrun() or getattr(parsed, "action", "") == "start"):
            guard.enforce(files=True)
        for name in ("stdin", "stdout", "stderr"):
            if getattr(sys, name) is None:  # closed by who started us
                mode = "r" if name == "stdin" else "w"
                setattr(sys, name, Path(os.devnull).open(mode))  # noqa: SIM115  # to the end
        for stream in (sys.stdout, sys.stderr):  # a locale without our characters is no error
            with contextlib.suppress(AttributeError):
                stream.reconfigure(errors="replace")  # type: ignore[union-attr]
    try:
        status = _run(parsed)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader has seen enough
        _drop_output()
        return _CLOSED
    except OSError as error:
        if parsed.debug:
            raise
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        _fail(parsed, error, "The disk is full where the output goes; make room." if full else (
            f"The system refused something ({error.strerror}); --debug shows what."))
        _drop_output()
        return 1
    except Exception as error:
        if parsed.debug:
            raise
        _fail(parsed, error,
              f"An unexpected error ({place_of(error)}); --debug shows more, report it.")
        return 1
    return status


def _run(parsed: argparse.Namespace) -> int:
    try:
        if hasattr(parsed, "prompt"):
            if parsed.prompt is None and not parsed.media:
                raise SettingError("Nothing is asked; give a PROMPT, --image FILE or --audio FILE.")
            _check_input(parsed)
            parsed.prompt = _prompt(parsed.prompt or "")
        from cloister import commands

        result = commands.run(parsed)
        if parsed.json and result is not None:
            # null for what is no number: Python's NaN and Infinity are no JSON.
            finite = json.loads(json.dumps(result), parse_constant=lambda _: None)
            print(json.dumps(finite))  # noqa: T201
        return 1 if result is not None and result.get("ok") is False else 0
    except CloisterError as error:
        if parsed.debug:
            raise
        _fail(parsed, error, str(error))
        return 1
    except KeyboardInterrupt as error:
        _fail(parsed, error, "stopped.")
        return 130


def _fail(parsed: argparse.Namespace, error: BaseException, sentence: str) -> None:
    if parsed.json:
        with contextlib.suppress(OSError):  # where the output is what failed
            print(json.dumps({"error": type(error).__name__, "message": sentence}),  # noqa: T201
                  flush=True)
    _say(sentence)


def _say(sentence: str) -> None:
    with contextlib.suppress(OSError):
        print(f"cloister: {sentence}", file=sys.stderr)  # noqa: T201


def _drop_output() -> None:
    """Send what is still buffered nowhere: the interpreter would fail once more as it ends."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _check_input(parsed: argparse.Namespace) -> None:
    """Raise unless one thing at most is read from the standard input."""
    given = [parsed.prompt, *(file for _, file in getattr(parsed, "media", ()))]
    if given.count("-") > 1:
        raise SettingError("Standard input is one prompt, picture or recording; give one -.")


def _prompt(text: str) -> str:
    """The prompt; `-` is the standard input, which process lists and histories do not show."""
    try:
        if text == "-":
            return sys.stdin.buffer.read().decode("utf-8-sig").replace("\r\n", "\n").rstrip("\r\n")
        # Undecodable bytes of an argument arrive as surrogates.
        return text.encode("utf-8", "surrogateescape").decode("utf-8")
    except UnicodeError:
        raise InvalidText("The prompt is not valid UTF-8; convert it first.") from None


def _parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", action="store_true", help="one JSON object on standard output")
    common.add_argument("--debug", action="store_true", help="show tracebacks and library messages")
    parser = argparse.ArgumentParser(
        prog="cloister", description="Private language models on the device.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, text: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=text, description=text, parents=[common])

    demo = add(
        "demo", "the whole way on the shipped family: distil, quantize, export, run, compare")
    demo.add_argument("--model", type=Path, metavar="HF_DIR|FILE.gguf|NAME",
                      help="a model that others made, as import takes it, in place of the family")
    demo.add_argument("-o", "--output", type=Path, help="keep the bundle that is made here")
    demo.add_argument("--force", action="store_true", help="replace the bundle that is there")

    tiers = add("tiers", "the ladder: parameters, sizes, memory, and what fits this machine")
    tiers.add_argument("--size", choices=list(Scale), default=Scale.FULL, type=Scale)
    tiers.add_argument("--context", type=int, help="tokens (default: the shape's)")

    importer = add("import", "read a model that others made into a checkpoint")
    which = importer.add_mutually_exclusive_group(required=True)
    which.add_argument("source", type=Path, nargs="?", metavar="HF_DIR|FILE.gguf|NAME",
                       help="a Hugging Face directory, a GGUF file, or a name out of --list")
    which.add_argument("--list", action="store_true",
                       help="the models that this machine has already; nothing is written")
    _output(importer, required=False)
    importer.add_argument("--name", help="of the model (default: its directory's or file's)")
    importer.add_argument("--context", type=int, help="shorten the context to this many tokens")
    importer.add_argument("--ignore", action="append", default=[], metavar="FIELD",
                          help="let this field of the configuration pass, which Cloister does not "
                               "know and which changes nothing that is computed; repeatable")
    importer.add_argument("--keep-quantization", action="store_true",
                          help="keep a GGUF file's own blocks, for export --backend cloister")

    distill = add("distill", "teach a smaller student what a teacher knows")
    distill.add_argument("--teacher", type=Path, required=True, metavar="CKPT")
    distill.add_argument("--tier", choices=list(Tier), type=Tier, required=True,
                         help="the student's shape, with the teacher's vocabulary")
    distill.add_argument("--size", choices=list(Scale), default=Scale.REFERENCE, type=Scale,
                         help="scale of the ladder (default: %(default)s)")
    distill.add_argument("--from-scratch", action="store_true",
                         help="begin from noise, not from the pruned teacher")
    distill.add_argument("--hard", type=float, default=0.5,
                         help="share of the loss on the labels (default: %(default)s)")
    distill.add_argument("--divergence", choices=("forward_kl", "reverse_kl", "js"),
                         default="forward_kl", help="(default: %(default)s)")
    distill.add_argument("--temperature", type=float, default=1.0)
    distill.add_argument("--draws", type=int, metavar="N",
                         help="let the teacher read once, and keep N draws a token")
    distill.add_argument("--private", action="store_true",
                         help="seal them in the vault: they tell what the data says")
    _namespace(distill)
    distill.add_argument("--own-answers", type=float, default=0.0, metavar="SHARE",
                         help="share of the steps, the last ones, on the student's own answers, "
                              "by the Jensen-Shannon divergence (GKD)")
    distill.add_argument("--unlabelled", type=Path, metavar="PATH",
                         help="more requests, which the teacher answers; their own are not read")
    distill.add_argument("--samples", type=_positive, default=512, metavar="N",
                         help="conversations that a teacher begins, for --data self (%(default)s)")
    _training(distill, rate=4e-3, own="; or self: what the teacher asks and answers itself")
    _output(distill)

    quantize = add("quantize", "quantize a checkpoint, and report every tensor")
    quantize.add_argument("source", type=Path, metavar="CKPT")
    quantize.add_argument("--recipe", default="8da4w-g32", help="(default: %(default)s)")
    quantize.add_argument("--calibrate", nargs="?", const="self", metavar="PATH",
                          help="round for what the layers read: of texts that the model samples, "
                               "or of data at PATH")
    quantize.add_argument("--sense-recipe", default="8da8w", metavar="RECIPE",
                          help="of what reads pictures and recordings (default: %(default)s)")
    quantize.add_argument("--media", type=Path, metavar="PATH",
                          help="round that for the pictures and recordings of data at PATH")
    quantize.add_argument("--qat", action="store_true",
                          help="train for it, from there if calibrated, taught by the checkpoint "
                               "as it is: on --data, or on texts that it samples")
    _training(quantize, rate=2e-4, required=False)
    _output(quantize)

    export = add("export", "make a bundle of a quantized checkpoint, checked against it")
    export.add_argument("source", type=Path, metavar="CKPT")
    export.add_argument("--backend", default="xnnpack",
                        help=f"{' or '.join(BACKENDS)} (default: %(default)s)")
    export.add_argument("--also", action="append", default=[], choices=[*FURTHER, "xnnpack"],
                        help="a further program, which is never run here, or beside cloister's "
                             "that of xnnpack; repeatable")
    export.add_argument("--kv", choices=list(KV),
                        help="what keys and values are kept in (default: the backend's first, "
                             "float32 for xnnpack, float16 for cloister, which has all three)")
    export.add_argument("--recipe", help="quantize CKPT by it first, each matrix by itself")
    export.add_argument("--chunk", type=int, default=128, help="most tokens a call (default: 128)")
    export.add_argument("--gate", metavar="BOUNDS",
                        help="write nothing worse, for instance: mean_kld<=0.02,top1>=0.95")
    export.add_argument("--gate-data", type=Path, metavar="PATH", help="what the gate measures on")
    _split(export, splits="test, else validate")
    export.add_argument("--gate-against", type=Path, metavar="CKPT",
                        help="what the gate measures divergence from")
    _output(export)

    embed = add("embed", "write what an app pastes to run a bundle: its files and the glue")
    embed.add_argument("bundle", metavar="BUNDLE|TIER")
    embed.add_argument("--for", dest="platform", required=True, choices=list(embedding.PLATFORMS))
    _output(embed)

    verify = add("verify", "prove a bundle: hashes, golden prompts, receipt")
    verify.add_argument("bundle", metavar="BUNDLE")

    run = add("run", "one answer, streamed")
    run.add_argument("bundle", metavar="BUNDLE|TIER")
    run.add_argument("prompt", metavar="PROMPT", nargs="?", help=_PROMPT)
    run.add_argument("--logprobs", type=int, default=0, metavar="N",
                     help="show each token's log-probability, and the N likeliest")
    run.add_argument("--replay", type=Path, metavar="FILE",
                     help="also write prompt and answer to FILE, in plain text, to replay")
    run.add_argument("--cached", action="store_true",
                     help="answer out of the vault if it was asked before, and keep the answer")
    _namespace(run)
    _asking(run)

    chat = add("chat", "a conversation, kept in memory until you leave, or sealed")
    chat.add_argument("bundle", metavar="BUNDLE|TIER")
    chat.add_argument("--session", metavar="NAME",
                      help="keep it under this name, and go on with it")
    chat.add_argument("--kv", choices=("float32", "int8"), default="float32",
                      help="how its KV state is kept: exactly, or in a quarter of the size")
    _namespace(chat)
    _asking(chat)

    compare = add("compare", "tiers side by side on one prompt, one at a time")
    compare.add_argument("prompt", metavar="PROMPT", nargs="?", help=_PROMPT)
    compare.add_argument("--tiers", help="comma-separated (default: all there are)")
    _asking(compare)

    replay = add("replay", "run a replay file again and prove that the same tokens come")
    replay.add_argument("bundle", metavar="BUNDLE|TIER")
    replay.add_argument("file", type=Path, metavar="FILE")
    replay.add_argument("--family", type=Path, metavar="DIR")

    evaluate = add("eval", "scores on a data set, and divergence from another model")
    evaluate.add_argument("models", metavar="BUNDLE|TIER|CKPT", nargs="+")
    _data(evaluate, splits="test, else validate")
    evaluate.add_argument("--task", help="only the examples of one task")
    evaluate.add_argument("--limit", type=_positive, metavar="N", help="at most N of the examples")
    evaluate.add_argument("--against", metavar="BUNDLE|TIER|CKPT",
                          help="also the divergence from this model")
    evaluate.add_argument("--record", action="store_true",
                          help="put the result into the bundle's receipt")
    evaluate.add_argument("--picture", type=Path, metavar="FILE",
                          help="draw the scores divided by Pro's (.png or .svg)")
    evaluate.add_argument("--family", type=Path, metavar="DIR", help="where TIER names bundles")

    _vault(add("vault", "what is kept of you: under which key, how much, and how to be rid of it"),
           common)

    actions = add("kernels", "Cloister's own operators, built once on this machine").add_subparsers(
        dest="action", required=True, metavar="ACTION")
    for name, text in (("build", "build their library now, and not at the first use"),
                       ("status", "whether it is built, and which instruction set it uses")):
        actions.add_parser(name, help=text, description=text, parents=[common])

    _lab(add("lab", "JupyterLab with the prompt lab and private defaults, or a leak check"), common)

    bench = add("bench", "speed and memory against the limits of this machine")
    which = bench.add_mutually_exclusive_group(required=True)
    which.add_argument("--shape", choices=list(Tier), type=Tier, help="a shape of the ladder")
    which.add_argument("--bundle", type=Path, help="a bundle of yours")
    bench.add_argument("--random", action="store_true",
                       help="random weights, for --shape (the only kind there is)")
    bench.add_argument("--device-class", action="store_true",
                       help="whether --bundle starts in what an app may take on phones, and what "
                            "it takes")
    bench.add_argument("--instructions", type=Path, metavar="FILE",
                       help="counts of tests/campaigns/phone/budget.py, beside --device-class")
    bench.add_argument("--record", action="store_true",
                       help="write what --device-class finds into the bundle's receipt")
    bench.add_argument("--size", choices=list(Scale), default=Scale.FULL, type=Scale)
    bench.add_argument("--recipe", default="8da4w-g32", help="(default: %(default)s)")
    bench.add_argument("--backend", default="xnnpack", choices=list(BACKENDS),
                       help="(default: %(default)s)")
    bench.add_argument("--kv", choices=list(KV), help="see `cloister export`")
    bench.add_argument("--against", metavar="PEERS",
                       help="measure --shape with Cloister's own operators beside each of "
                            "llama.cpp,executorch,openvino,onnxruntime-genai that is installed")
    bench.add_argument("--peer-python", default=sys.executable, metavar="PYTHON",
                       help="the interpreter that has the peers (default: this one)")
    bench.add_argument("--turns", type=int, default=3,
                       help="rounds of --against, of which medians count (default: %(default)s)")
    bench.add_argument("--keep", type=Path, metavar="DIR",
                       help="keep the peers' converted models here, and take them from here")
    bench.add_argument("--profile", action="store_true",
                       help="the time by operator, of Cloister's own operators")
    return parser


def _vault(parser: argparse.ArgumentParser, common: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")

    def add(name: str, text: str) -> argparse.ArgumentParser:
        return actions.add_parser(name, help=text, description=text, parents=[common])

    providers = ("keyring", "passphrase", "keyfile")
    init = add("init", "make a vault")
    init.add_argument("--provider", choices=providers,
                      help="who holds its key (default: CLOISTER_PROVIDER, passphrase where "
                           "CLOISTER_PASSPHRASE is set, or the first of these that there is)")
    init.add_argument("--beside", action="store_true",
                      help="where one cannot be opened: move it aside as it is, and begin anew")
    status = add("status", "who holds the key, what that protects from, and what is kept")
    status.add_argument("--accept-rollback", action="store_true",
                        help="go on with a vault that was put back to an earlier state")
    rotate = add("rotate", "take a new key; no data is rewritten")
    rotate.add_argument("--provider", choices=providers, help="who holds the new key")
    forget = add("forget", "delete a conversation and its key")
    forget.add_argument("conversation", metavar="CONVERSATION")
    _namespace(forget)
    shred = add("shred", "delete the keys of a namespace, and with them all that it holds")
    shred.add_argument("namespace", metavar="NAMESPACE")
    shred.add_argument("--kind", choices=("history", "prefix", "responses", "distill"),
                       help="only these; history takes prefix along, the KV state of its text")
    scan = add("scan", "plant texts in every way, and look for them in all that was written")
    scan.add_argument("bundle", metavar="BUNDLE|TIER", nargs="?", default="nano-1")
    scan.add_argument("--teacher", metavar="CKPT|TIER", default="pro",
                      help="whose distillation is also looked at (default: %(default)s)")


def _lab(parser: argparse.ArgumentParser, common: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    begin = actions.add_parser(
        "start", prog="cloister lab", description=explained(), parents=[common],
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="cloister lab [-h] [--port N] [--no-browser] [DIR] [-- JUPYTER'S ARGUMENTS]")
    begin.add_argument("directory", type=Path, metavar="DIR", nargs="?", default=Path(),
                       help="the folder that it shows (default: the current one)")
    begin.add_argument("--port", type=_port, metavar="N", help="(default: Jupyter's, 8888)")
    begin.add_argument("--no-browser", dest="browser", action="store_false",
                       help="print the address, and open no browser")
    text = ("search a notebook and its checkpoint for texts that passed through the lab, and for "
            "personal data; 1 where something is found")
    check = actions.add_parser("check", help=text, description=text, parents=[common])
    check.add_argument("notebook", type=Path, metavar="NOTEBOOK")


def _namespace(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--namespace", default="default", metavar="NAME",
                        help="whose it is (default: %(default)s)")


def _for_jupyter(words: list[str]) -> tuple[list[str], tuple[str, ...]]:
    """Return the arguments with `cloister lab` in full, and those after its `--`."""
    if words[:1] != ["lab"] or words[1:2] == ["check"]:
        return words, ()
    end = words.index("--") if "--" in words else len(words)
    return ["lab", "start", *words[1:end]], tuple(words[end + 1:])


def _of_kind(kind: str, file: str) -> tuple[str, str]:
    return kind, file


def _port(text: str) -> int:
    number = int(text)
    if not 0 <= number < 1 << 16:
        raise argparse.ArgumentTypeError(f"{number} is not from 0 to 65535")
    return number


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not at least 1")
    return number


def _training(
    parser: argparse.ArgumentParser, *, rate: float, required: bool = True, own: str = ""
) -> None:
    _data(parser, splits="train", required=required, own=own)
    parser.add_argument("--held-out", type=Path, metavar="PATH",
                        help="what is measured on (default: 5 %% of the data, kept apart)")
    parser.add_argument("--allow-overlap", action="store_true",
                        help="train even if held-out requests are in the data")
    parser.add_argument("--tolerate", type=float, default=0.05, metavar="SHARE",
                        help="of the data that may be malformed, empty, repeated or too long")
    parser.add_argument("--passes", type=float, default=3.0, help="over the data (default: 3)")
    parser.add_argument("--steps", type=_positive, help="in place of --passes")
    parser.add_argument("--tokens", type=_positive, default=4096, help="a step (default: 4096)")
    parser.add_argument("--micro", type=_positive, default=1024,
                        help="tokens at a time, which bounds the memory (default: 1024)")
    parser.add_argument("--rate", type=float, default=rate, help="learning rate (%(default)s)")
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--float32", action="store_true", help="no products in bfloat16")
    parser.add_argument("--compile", action="store_true",
                        help="faster steps after a minute of compilation, for long runs")


def _data(
    parser: argparse.ArgumentParser, *, splits: str, required: bool = True, own: str = ""
) -> None:
    parser.add_argument("--data", type=Path, required=required, metavar="PATH",
                        help="a file or a directory: JSON lines or lists of messages, instructions "
                             f"or task, input and target; SNIPS, CLINC150, FairytaleQA{own}")
    _split(parser, splits=splits)


def _split(parser: argparse.ArgumentParser, *, splits: str) -> None:
    parser.add_argument("--split", choices=list(Split), type=Split,
                        help=f"which of several in the data (default: {splits})")


def _output(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    parser.add_argument("-o", "--output", type=Path, required=required, metavar="OUT")
    parser.add_argument("--force", action="store_true", help="replace OUT if it exists")


def _asking(parser: argparse.ArgumentParser) -> None:
    for kind, name in (("image", "a picture"), ("audio", "a recording")):
        parser.add_argument(
            f"--{kind}", dest="media", action="append", default=[], type=partial(_of_kind, kind),
            metavar="FILE", help=f"{name} before the prompt, or - for standard input; repeatable")
    parser.add_argument("--trim", action="store_true",
                        help="leave the quiet beginning and end of recordings out")
    parser.add_argument("--system", help="system prompt; for the reference family, the task: call")
    parser.add_argument("--family", type=Path, metavar="DIR", help="where TIER names bundles")
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    parser.add_argument("--top-k", type=int, default=0)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--min-p", type=float, default=0.0)
    parser.add_argument("--repetition-penalty", type=float, default=1.0)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--schema", type=Path, metavar="FILE",
                        help="a JSON Schema that the answer follows")
    parser.add_argument("--tools", type=Path, metavar="FILE",
                        help="a JSON list of tools, one of which the answer calls")
    parser.add_argument("--draft", default="auto", metavar="lookup|off|BUNDLE|TIER",
                        help="what guesses tokens, several of which are then read at once: earlier "
                             "text, or a lower tier, too; the answer stays the same (default: "
                             "earlier text for programs of Cloister's own operators)")


if __name__ == "__main__":
    sys.exit(main())
