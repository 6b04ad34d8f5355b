"""The model card of the reference family, generated from the records of its build."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from cloister.evaluate.scoreboard import ratios
from cloister.reference.mixture import OTHER_SENTENCES
from cloister.tiers import Tier, ladder

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

__all__ = ["card"]

Record = dict[str, Any]

_SCORES = (
    ("call", "frame_exact", "exact frame"), ("call", "intent_accuracy", "intent"),
    ("call", "slot_f1", "slot F1"), ("intent", "intent_accuracy", "in scope"),
    ("intent", "oos_recall", "out-of-scope recall"), ("redact", "exact", "exact text"),
    (OTHER_SENTENCES, "exact", "exact text"), ("story", "bits_per_byte", "bits a byte"),
    ("order", "frame_exact", "exact frame"), ("order", "slot_f1", "slot F1"),
    ("read", "exact", "exact text"),
)
_SENSES = (
    ("orders by people", "frame_exact", "exact frame"), ("orders by people", "slot_f1", "slots"),
    ("orders by people, trimmed", "frame_exact", "exact frame"),
    ("orders by people, trimmed", "slot_f1", "slots"),
    ("requests by voices never heard", "frame_exact", "exact frame"),
    ("requests by voices never heard", "frame_said", "exact as it is said"),
    ("requests by voices never heard", "slot_f1", "slots"),
    ("requests by voices never heard, written", "frame_exact", "exact frame"),
    ("requests by voices never heard, written", "frame_said", "exact as it is said"),
    ("lines, clean", "cer", "character errors"), ("lines, half worn", "cer", "character errors"),
    ("lines, worn", "cer", "character errors"),
    *((f"{task} by camera, {how}", score, what) for task, score, what in (
        ("redact", "exact", "exact text"), ("call", "frame_exact", "exact frame"))
      for how in ("printed", "printed, half worn", "by hand or in dots", "printed, written")),
)
_LOSSES = (
    ("mean_kld", "mean KL divergence, nats", ".2g"), ("median_kld", "median", ".2g"),
    ("p99_kld", "99 %", ".2g"), ("p999_kld", "99.9 %", ".2g"), ("max_kld", "maximum", ".2g"),
    ("top1", "same token", ".2%"), ("ppl_ratio", "perplexity ratio", ".4f"),
    ("flips", "flips", ".1%"),
)

_HEAD = """\
# The reference family

Four tiers of one ladder at a thousandth of the size, made to be run anywhere: Ultra was trained on
the labels, each other tier was pruned from the tier above and distilled from it, and the two Nano
tiers went through quantization-aware training for 4 bits. They answer six tasks, named by the
system prompt:

| system prompt | task |
|---|---|
| `call` | a request to a voice assistant becomes a tool call |
| `intent` | a request becomes one of 150 intents, or `none` |
| `redact` | personal data becomes `[NAME]`, `[PHONE]`, `[EMAIL]`, `[ADDRESS]`, `[DATE]`, \
`[CARD]`, `[ACCOUNT]` |
| `story` | a tale is continued |
| `order` | an order to a coffee machine becomes a tool call |
| `read` | what stands there, word for word: of use for a picture of it |

They know nothing else. English only; `redact` is surest in the sentences of its generator, errs
more often in others (their row tells how often), and is no guarantee of anything; `story` makes
sense for a few words, and without sampling soon repeats itself.
"""
_TAIL = """\
## Data

| data | used for | licence | credit |
|---|---|---|---|
| SNIPS | `call` | CC0 1.0 | Coucke et al., "Snips Voice Platform: an embedded Spoken Language \
Understanding system for private-by-design voice interfaces", arXiv 1805.10190 |
| CLINC150 | `intent`; some of its sentences in `redact` | CC BY 3.0 | Larson et al., \
"An Evaluation Dataset for Intent Classification and Out-of-Scope Prediction", EMNLP 2019 |
| FairytaleQA | `story`; its questions as out of scope; some of its sentences in `redact` | \
Apache-2.0 | Xu et al., "Fantastic Questions and Where to Find Them: FairytaleQA", ACL 2022 |
| a seeded generator, `redaction.py` | `redact` | Apache-2.0 | this project |
| a seeded generator, `orders.py` | `order` | Apache-2.0 | this project |
| grammars of receipts and notes, `lines.py` | `read`, pictures | Apache-2.0 | this project |
| 135 voices of espeak-ng, flite, festival and Kokoro (`voices.json`) | recordings; 22 voices are \
kept apart | GPL-3.0 (espeak-ng, of whose program nothing is shipped), MIT-like, BSD-3-Clause, \
Apache-2.0 | their makers, by name in `voices.json` |
| 279 families of fonts (`fonts.json`) | pictures; 32 families are kept apart | OFL-1.1 (267), \
Apache-2.0 (9), UFL-1.0 (2), Unlicense | their makers, by name in `fonts.json` |
| spoken orders by people, speech-to-intent-benchmark | measuring only | Apache-2.0 | Picovoice |

Requests are varied (slot values swapped, casing, typos, filler words). Development examples are
apart from all of it: 5 % of SNIPS by hash of the request, CLINC150's own validation parts, tales of
FairytaleQA's validation part, and redactions, both in the generator's own sentences and in others
(of those validation parts), most names, streets and hosts of their own. No official test split was
looked at. A variant that falls on a development request is not used. More requests out of scope
were made up (`outside.json`) after errors on CLINC150's validation part had been read: its
out-of-scope recall here is not independent of that.

The weights are Apache-2.0, with the credits above.
"""


def card(out: Path) -> str:
    """Return the Markdown, from `TIER.json` of every tier in `out` that has been built."""
    records = {
        tier: json.loads((out / f"{tier}.json").read_text("utf-8"))
        for tier in Tier if (out / f"{tier}.json").exists()
    }
    return "\n".join([
        _HEAD, "## What they can do\n",
        "On development examples, measured on the shipped program, with standard errors:\n",
        *_scores(records), "",
        *_divided(records),
        *_senses(records),
        "## What 4 and 8 bits cost\n",
        "Each tier against its own unquantized self, on the answers' tokens of all development\n"
        "examples by task. The Nano tiers also without quantization-aware training\n"
        "(post-training); `recovered` is the share of that row's mean KL divergence, and of its\n"
        "perplexity ratio's excess over one, which the training took away.\n",
        *_losses(records), "",
        *_distillation(out / "distillation.json"),
        "## How they were made\n",
        "`python -m cloister.reference.build --data DIR`, and the same with `--begin` for every\n"
        "further run of a tier, below its first. `mean`: of the weights begun from and reached.\n"
        "Each run's command and every twentieth step's loss are in `records/`.\n",
        *_runs(records), "", _TAIL,
    ])


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> Iterator[str]:
    names = list(head)
    yield f"| {' | '.join(names)} |"
    yield "|" + "---|" * len(names)
    for row in rows:
        yield f"| {' | '.join(row)} |"


def _cell(report: Record | None, name: str) -> str:
    """Return a score of a report with its standard error."""
    if report is None or name not in report["metrics"]:
        return "-"
    value, error = report["metrics"][name], report["errors"][name]
    if name == "bits_per_byte":
        return f"{value:.3f} \u00b1 {error:.3f}"
    return f"{value:.1%} \u00b1 {error:.1%}"


def _scores(records: dict[Tier, Record]) -> Iterator[str]:
    yield from _table(("task", "score", *records), (
        (f"`{task}`", title, *(
            _cell(record.get("evaluation", {}).get(task), name) for record in records.values()))
        for task, name, title in _SCORES
    ))


def _senses(records: dict[Tier, Record]) -> Iterator[str]:
    """Yield the figures of `reference.senses`, where there are any."""
    measured = {tier: record["senses"]["evaluation"] for tier, record in records.items()
                if "evaluation" in record.get("senses", {})}
    if not measured:
        return
    yield "## What they hear and see\n"
    yield ("Measured on the program. People's orders were never learnt from; requests and lines\n"
           "are of held-out texts, in voices and fonts kept apart; `written` is the same\n"
           "text as text.\n")
    yield from _table(("what", "score", *measured), (
        (name, title, *(_cell(each.get(name), score) for each in measured.values()))
        for name, score, title in _SENSES
    ))
    yield ""


def _divided(records: dict[Tier, Record]) -> Iterator[str]:
    scores = {
        str(tier): {
            f"{task}.{name}": record["evaluation"][task]["metrics"][name]
            for task, name, _ in _SCORES
            if name in record["evaluation"].get(task, {}).get("metrics", {})
        } for tier, record in records.items() if "evaluation" in record
    }
    if Tier.PRO not in scores:
        return
    divided = ratios(scores, Tier.PRO)
    yield "The same divided by Pro's; more is better:\n"
    yield from _table(("task", "score", *divided), (
        (f"`{task}`", title, *(
            f"{shares[name]:.3f}" if (name := f"{task}.{score}") in shares else "-"
            for shares in divided.values()))
        for task, score, title in _SCORES
    ))
    yield ""


def _losses(records: dict[Tier, Record]) -> Iterator[str]:
    rows = []
    for tier, record in records.items():
        after = record.get("post_training_quantization", {})
        trained = record.get("evaluation", {})
        for title, reports in ((f"{tier}, post-training", after), (f"{tier}", trained)):
            for task, report in reports.items():
                metrics, recovered = report["metrics"], "-"
                if reports is not after and task in after:
                    lost = after[task]["metrics"]
                    recovered = ", ".join(
                        f"{1 - (metrics[name] - best) / (lost[name] - best):.0%}"
                        if lost[name] > best else "-"
                        for name, best in (("mean_kld", 0), ("ppl_ratio", 1)))
                rows.append((title, f"`{task}`", *(
                    format(metrics[name], form) if name in metrics else "-"
                    for name, _, form in _LOSSES), recovered))
    yield from _table(("tier", "task", *(title for _, title, _ in _LOSSES), "recovered"), rows)


def _distillation(path: Path) -> Iterator[str]:
    """Yield the figures of `tests/bench/distillation.py`, where its record is here."""
    if not path.exists():
        return
    bench = json.loads(path.read_text("utf-8"))
    yield "## What distillation brings\n"
    yield (f"The same {bench['tier']} from the same tokens ({bench['steps']} steps), taught by "
           f"{bench['teacher_name']} or by the labels alone,\non development examples; a value for "
           f"each of {len(bench['seeds'])} seeds. The teacher has {bench['teacher']:.4f} nats.\n"
           "`gap closed` is the mean share of the way there from the student from scratch.\n")
    yield from _table(("student", "cross-entropy, nats a token", "gap closed"), (
        (row["variant"], ", ".join(f"{value:.4f}" for value in row["cross_entropy"]),
         f"{row['gap_closed']:.0%}") for row in bench["variants"]
    ))
    if (size := bench.get("bytes_a_token")) is not None:
        yield f"\nDraws on disk take {size:.0f} bytes a token."
    yield f"\n`{bench['command']}`\n"


def _runs(records: dict[Tier, Record]) -> Iterator[str]:
    def rows(tier: Tier, run: Record) -> Iterator[tuple[str, ...]]:
        if run.get("begun_from"):
            yield from rows(tier, run["begun_from"])
        yield (
            str(tier), f"{ladder()[tier].parameters / 1e6:.2f} M",
            run["rung"]["teacher"] or "labels",
            f"{run['steps']:,}{', mean' if run.get('mean') else ''}",
            f"{run['tokens'] / 1e6:.1f} M", f"{run['seconds'] / 3600:.1f}", run["device"],
            str(run["seed"]),
        )

    yield from _table(
        ("tier", "weights", "taught by", "steps", "tokens", "hours", "on", "seed"),
        (row for tier, record in records.items() if "training" in record
         for row in rows(tier, record["training"])),
    )
