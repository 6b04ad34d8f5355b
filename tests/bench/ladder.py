"""A real ladder: a student of half the weights of a model that others made, and its Nano in 4 bits.

    python tests/bench/ladder.py MODEL.gguf --data DIR [--out DIR] [--steps 130] [--trial 30]
        [--tokens 2048] [--micro 512] [--rate R] [--samples 160] [--qat 60] [--until STAGE]

Students of half the weights are cut out of the teacher, one of fewer layers, one of narrower ones,
and taught for `--trial` steps with the teacher reading along. The one that is nearer to the teacher
on held-out text is cut anew and taught for `--steps` by 16 draws a token, on conversations that the
teacher makes up and on tales of FairytaleQA; beside it the same student from the same tokens, with
labels alone. Nano is the taught one in 4 bits: rounded by itself, calibrated, and trained `--qat`
steps from there. Measured on parts of the validation tales and on conversations held out.

Each stage keeps its checkpoint in OUT, and its run goes on after a kill; `--until` ends behind one:
samples, depth, width, taught, labels, rounded, calibrated, trained. `OUT/ladder.json` has every
figure and answer.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from fourbit import processor
from torch.nn import functional

from cloister import (
    Checkpoint,
    DistillSettings,
    QatSettings,
    Schedule,
    corpus,
    display,
    distill,
    import_model,
    quantize,
)
from cloister.corpus import Example
from cloister.distill.answers import kept_samples
from cloister.distill.examples import encode
from cloister.distill.losses import Objective
from cloister.distill.run import run_folder
from cloister.distill.schedule import Kind
from cloister.evaluate.divergence import compare
from cloister.evaluate.subject import CheckpointSubject
from cloister.message import Message

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cloister.progress import Progress
    from cloister.tiers import Shape

DRAWS, CONTEXT, CHARACTERS = 16, 1024, 1800  # characters of a part of a tale: 400 tokens or so
TALES, PARTS, HELD_OUT = 8, 1, 16  # tales and their parts, conversations to measure on
PROMPTS = ("What is the capital of France?", "Tell me a story about a fox and a river.",
           "Give me three tips for sleeping better.")
ANSWER = 96  # tokens
CUTS = {  # of 134.5 M weights 67.2 M and 67.5 M, of them 28.3 M and 18.9 M in the embedding
    "depth": {"layers": 11}, "width": {"hidden_size": 384, "heads": 6, "feed_forward": 1024},
}
STAGES = ("samples", *CUTS, "taught", "labels", "rounded", "calibrated", "trained")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--data", type=Path, required=True, help="folder of the public data sets")
    parser.add_argument("--steps", type=int, default=130)
    parser.add_argument("--trial", type=int, default=30, help="steps of each cut")
    parser.add_argument("--tokens", type=int, default=2048, help="a step")
    parser.add_argument("--micro", type=int, default=512, help="tokens at a time")
    # Of the narrow cut's labels alone 12 steps leave 5.04 nats at 4e-4, 5.16 at 1e-3, 5.44 at 2e-3;
    # Muon at 1e-3 leaves 5.20, and takes a third longer.
    parser.add_argument("--rate", type=float, default=4e-4)
    parser.add_argument("--optimizer", type=Kind, choices=list(Kind), default=Kind.ADAMW)
    parser.add_argument("--samples", type=int, default=160, help="conversations, begun")
    parser.add_argument("--qat", type=int, default=60, help="steps")
    parser.add_argument("--qat-rate", type=float, default=2e-5)
    parser.add_argument("--until", choices=STAGES, default=STAGES[-1])
    parser.add_argument("--out", type=Path, default=Path("ladder"))
    given = parser.parse_args()
    given.out.mkdir(exist_ok=True)
    with display.quiet(debug=False) as console, display.progress(console, "ladder") as progress:
        work = _Ladder.begun(given, progress)
        for stage in STAGES[1:STAGES.index(given.until) + 1]:
            work.make(stage)
    _show(work.figures, f"{given.model.name} on {work.figures['processor']}")


@dataclass(kw_only=True)
class _Ladder:
    """The stages of one ladder; what is in OUT is not made again."""

    given: argparse.Namespace
    progress: Progress
    teacher: Checkpoint
    learnt: list[Example]
    measured: dict[str, list[Example]]
    figures: dict[str, Any]

    @classmethod
    def begun(cls, given: argparse.Namespace, progress: Progress) -> _Ladder:
        """Import the teacher, let it make its samples, and measure it."""
        path, record = given.out / "teacher", given.out / "ladder.json"
        if not path.exists():
            import_model(given.model, path, context=CONTEXT, progress=progress)
        teacher, begun = Checkpoint.open(path), time.perf_counter()
        own = kept_samples(teacher, given.samples, given.out, seed=0, progress=progress)
        figures = json.loads(record.read_text()) if record.exists() else {
            "processor": processor(), "samples": {"made": time.perf_counter() - begun}}
        tales = given.data / "fairytaleqa"
        measured = {
            "tales": [part for tale in list(_tales(tales / "stories_val.jsonl"))[:TALES]
                      for part in tale[:PARTS]],
            "samples": own[:HELD_OUT]}
        corpus.refuse_overlap(learnt := [
            *own[HELD_OUT:], *(part for tale in _tales(tales / "stories_train.jsonl")
                               for part in tale)], [each for some in measured.values()
                                                    for each in some])
        work = cls(given=given, progress=progress, teacher=teacher, learnt=learnt,
                   measured=measured, figures=figures)
        work.measure("teacher", teacher, {})
        return work

    def make(self, stage: str) -> None:
        """Make what a stage is for, and measure it."""
        out = self.given.out / stage
        begun = time.perf_counter()
        if not out.exists():
            self._make(stage, out)
        checkpoint = Checkpoint.open(out)
        run = run_folder(out) / "metrics.jsonl"
        steps = [json.loads(line) for line in run.read_text().splitlines()] if run.exists() else []
        self.measure(stage, checkpoint, {
            "parameters": checkpoint.metadata.config.shape.parameters,
            "made": time.perf_counter() - begun, "steps": len(steps),
            "tokens": sum(step["tokens"] for step in steps),
            "losses": [step["loss"] for step in steps],
            "step_s": sum(step["seconds"] for step in steps)})

    def _make(self, stage: str, out: Path) -> None:
        given = self.given
        if stage in CUTS:
            self._distil(out, self._shape(stage), given.trial)
        elif stage == "taught":
            self._distil(out, self._shape(self.better), given.steps, draws=DRAWS)
        elif stage == "labels":
            self._distil(out, self._shape(self.better), given.steps, objective=Objective(hard=1.0))
        else:
            options: dict[str, Any] = {} if stage == "rounded" else {"calibrate": "self"}
            if stage == "trained":  # from there, as a run that was killed behind it goes on
                shutil.copytree(given.out / "calibrated", run_folder(out) / "calibrated",
                                dirs_exist_ok=True)
                options |= {"data": self._spread(given.qat), "settings": QatSettings(
                    schedule=Schedule(steps=given.qat, tokens=given.tokens // 2, micro=given.micro,
                                      peak=given.qat_rate, warmup=given.qat // 10,
                                      save_every=max(20, given.qat // 4)))}
            quantize(given.out / "taught", out, progress=self.progress, **options)

    def _distil(self, out: Path, student: Shape, steps: int, **options: Any) -> None:
        given = self.given
        distill(
            self.teacher, out, student=student, data=self._spread(steps),
            held_out=self.measured["tales"],
            settings=DistillSettings(schedule=Schedule(
                steps=steps, tokens=given.tokens, micro=given.micro, peak=given.rate,
                optimizer=given.optimizer, warmup=steps // 10, save_every=max(20, steps // 4)),
                calibration=64, **options), progress=self.progress)

    def _spread(self, steps: int) -> list[Example]:
        """Return what so many steps read, all conversations and tales evenly over all."""
        room = 0.8 * steps * self.given.tokens  # rows are not quite full
        own = [each for each in self.learnt if each.turns]
        tales = [each for each in self.learnt if not each.turns]
        left = max(1, room - sum(map(_tokens, own))) / sum(map(_tokens, tales))
        return [*own, *tales[::max(1, round(1 / left))]]

    def _shape(self, cut: str) -> Shape:
        return replace(self.teacher.metadata.config.shape, **CUTS[cut])

    @property
    def better(self) -> str:
        """The cut whose student, after the trial, is nearer to the teacher."""
        return min(CUTS, key=lambda cut: sum(
            self.figures[cut][kind]["mean_kld"] for kind in self.measured))

    def measure(self, name: str, checkpoint: Checkpoint, facts: dict[str, Any]) -> None:
        """Add what a checkpoint says, and how far from the teacher, to the figures and the file."""
        if name in self.figures:
            return
        teacher, subject = CheckpointSubject(self.teacher), CheckpointSubject(checkpoint)
        for done, (kind, examples) in enumerate(self.measured.items()):
            self.progress(f"measure {name}", done, len(self.measured), kind)
            pairs = encode(self.teacher, examples, CONTEXT).pairs
            labels = [torch.tensor(answer) for _, answer in pairs]
            surprise: list[torch.Tensor] = []
            divergence = compare(_noting(
                zip(teacher.logits(pairs), subject.logits(pairs), strict=True), labels, surprise),
                labels)
            facts[kind] = {**divergence.to_dict(),
                           "perplexity": float(torch.cat(surprise).mean().exp())}
        asked = [subject.tokenizer.encode_chat([Message(role="user", content=text)])
                 for text in PROMPTS]
        facts["answers"] = dict(zip(
            PROMPTS, map(subject.tokenizer.decode, subject.answers(asked, ANSWER)), strict=True))
        self.figures[name] = facts
        (self.given.out / "ladder.json").write_text(json.dumps(self.figures, indent=1) + "\n")


def _noting(
    pairs: Iterator[tuple[torch.Tensor, torch.Tensor]], labels: list[torch.Tensor],
    surprise: list[torch.Tensor],
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Pass on pairs of logits, and note the second one's nats a token."""
    for (reference, candidate), truth in zip(pairs, labels, strict=True):
        surprise.append(functional.cross_entropy(candidate, truth, reduction="none"))
        yield reference, candidate


def _tales(path: Path) -> Iterator[list[Example]]:
    """Yield each tale as parts: the first sentence asks for what follows it."""
    for line in path.read_text("utf-8").splitlines():
        parts, text = [], ""
        for section in [*json.loads(line)["sections"], ""]:
            if text and (not section or len(text) + len(section) > CHARACTERS):
                opening, dot, rest = text[:CHARACTERS].partition(". ")
                if dot and rest:
                    parts.append(Example(
                        task="", input=f"Tell me the tale that begins: {opening}.", target=rest))
                text = ""
            text = f"{text} {section}".strip()
        yield parts


def _tokens(example: Example) -> int:
    """Return about how many tokens an example takes, those of the template included."""
    return 40 + (len(example.input) + len(example.target)) // 4


def _show(figures: dict[str, Any], title: str) -> None:
    found = {name: each for name, each in figures.items() if "answers" in each}
    display.table(f"{title}: perplexity, and divergence from the teacher in nats a token", (
        "", "weights", "steps", "made in", *(f"{kind}{what}" for kind in ("tales", "samples")
                                            for what in ("", ": KL", ": same token"))), [
        (name, display.count(each["parameters"]) if "parameters" in each else "",
         str(each.get("steps") or ""), f"{each['made']:.0f} s" if "made" in each else "",
         *(text for kind in ("tales", "samples") for text in (
             f"{each[kind]['perplexity']:.1f}",
             f"{each[kind]['mean_kld']:.3f} \u00b1 {each[kind]['mean_kld_se']:.3f}",
             f"{each[kind]['top1']:.1%}")))
        for name, each in found.items()])
    for prompt in PROMPTS:
        display.table(prompt, ("", "answer"), [
            (name, each["answers"][prompt]) for name, each in found.items()], texts=2)


if __name__ == "__main__":
    main()
