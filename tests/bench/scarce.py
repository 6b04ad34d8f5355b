"""What distillation brings where labels are scarce: a student of few labels, with and without what
its teacher answers to the other requests.

    python tests/bench/scarce.py --data DIR [--teacher pro] [--tier nano-1] [--steps 100]
        [--tokens 1024] [--shares 0.01,0.05,0.25] [--seeds 0,1,2] [--requests N] [--out DIR]

Of the SNIPS and CLINC150 requests to train on a share keeps its labels; the rest are requests only.
All students are cut out of the teacher, and learn from the same number of tokens. The teacher has
seen the labels of all: it stands for a large model that knows the task. Prints means over the seeds
with standard errors. `OUT/scarce.json` has every run.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from cloister import display
from cloister.corpus import split
from cloister.distill.answers import answered
from cloister.distill.losses import Objective
from cloister.distill.run import DistillReport, DistillSettings, distill
from cloister.distill.schedule import Schedule
from cloister.evaluate.report import evaluate
from cloister.evaluate.subject import CheckpointSubject
from cloister.model.checkpoint import Checkpoint
from cloister.reference import find_checkpoint, mixture
from cloister.tiers import Tier

if TYPE_CHECKING:
    from cloister.corpus import Example

LABELS, TAUGHT, UNLABELLED = (
    "labels alone", "labels, taught", "labels and the teacher's answers to the rest, taught")
VARIANTS = {
    LABELS: Objective(hard=1.0), TAUGHT: Objective(), UNLABELLED: Objective(),
}
FIGURES = ("cross_entropy", "call.frame_exact", "intent.intent_accuracy")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the public data sets")
    parser.add_argument("--teacher", default="pro", help="a shipped tier, or a directory")
    parser.add_argument("--tier", default="nano-1")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--tokens", type=int, default=1024, help="a step")
    parser.add_argument("--rate", type=float, default=4e-3)
    parser.add_argument("--shares", default="0.01,0.05,0.25")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--requests", type=int, help="to train on, and as many a fifth to measure")
    parser.add_argument("--out", type=Path, default=Path("scarce"))
    given = parser.parse_args()
    given.out.mkdir(exist_ok=True)
    mixed = mixture.Mixture.read(given.data)
    requests = _spread([*mixed.calls, *mixed.intents], given.requests)
    held_out = _spread([*mixed.held_out["call"], *mixed.held_out["intent"][::5]],
                       given.requests and given.requests // 5)
    teacher = Checkpoint.open(find_checkpoint(given.teacher))
    with display.quiet(debug=False) as console, display.progress(console, "scarce") as progress:
        answers = {each.place: each for each in answered(teacher, requests, progress=progress)}
    runs = []
    for share in map(float, given.shares.split(",")):
        for seed in map(int, given.seeds.split(",")):
            rest, labelled = split(requests, held_out=share, seed=seed)
            taught = [answers[each.place] for each in rest if each.place in answers]
            for name, objective in VARIANTS.items():
                settings = DistillSettings(
                    schedule=Schedule(
                        steps=given.steps, tokens=given.tokens, micro=min(given.tokens, 1024),
                        peak=given.rate, seed=seed, warmup=min(50, given.steps // 10)),
                    objective=objective, allow_overlap=True)
                with tempfile.TemporaryDirectory() as scratch:
                    student = distill(
                        teacher, Path(scratch) / "student", student=Tier(given.tier),
                        data=[*labelled, *taught] if name == UNLABELLED else labelled,
                        held_out=held_out, settings=settings)
                    assert isinstance(student.report, DistillReport)
                    scores = evaluate(CheckpointSubject(student), held_out).metrics
                runs.append({
                    "share": share, "seed": seed, "variant": name, "labels": len(labelled),
                    "cross_entropy": student.report.after, **scores})
                (given.out / "scarce.json").write_text(json.dumps(runs, indent=1) + "\n")
    _show(runs, f"{given.tier} of {given.teacher}, {given.steps} steps of {given.tokens} tokens, "
                f"{len(requests)} requests; measured on {len(held_out)}")


def _spread(examples: list[Example], count: int | None) -> list[Example]:
    """Return `count` or so, evenly over the whole, not the first: files are sorted by intent."""
    return examples[::max(1, len(examples) // count)] if count else examples


def _show(runs: list[dict[str, float | str]], title: str) -> None:
    rows = []
    for share in sorted({run["share"] for run in runs}):
        for name in VARIANTS:
            those = [run for run in runs if (run["share"], run["variant"]) == (share, name)]
            rows.append((
                f"{share:.0%}", name, f"{statistics.mean(run['labels'] for run in those):.0f}",
                *(_mean([run[figure] for run in those]) for figure in FIGURES)))
    display.table(title, ("labels", "student learns from", "of them",
                          *(figure.replace("_", " ") for figure in FIGURES)), rows, texts=2)


def _mean(values: list[float]) -> str:
    """Return the mean, and its standard error where there are several."""
    mean = f"{statistics.mean(values):.4f}"
    if len(values) < 2:
        return mean
    return f"{mean} \u00b1 {statistics.stdev(values) / len(values) ** 0.5:.4f}"


if __name__ == "__main__":
    main()
