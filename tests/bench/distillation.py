"""What distillation brings: the same student from scratch, pruned and taught, with the same tokens.

    python tests/bench/distillation.py --data DIR [--teacher pro] [--tier nano-1] [--steps 300]
        [--passes 1] [--seeds 0,1,2] [--out DIR]

Prints the held-out cross-entropy of every variant, and which share of the gap between the student
from scratch and the teacher it closes: (scratch - variant) / (scratch - teacher). A run that was
cut short goes on when it is repeated. `OUT/distillation.json` is what the model card reads.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from cloister import display
from cloister.distill.examples import encode
from cloister.distill.losses import Objective
from cloister.distill.run import DistillReport, DistillSettings, distill, run_folder
from cloister.distill.schedule import Schedule
from cloister.model.checkpoint import Checkpoint
from cloister.reference import find_checkpoint, mixture
from cloister.tiers import Tier, ladder

DRAWS = 16
VARIANTS: dict[str, dict[str, Any]] = {
    "from scratch": {"from_scratch": True, "objective": Objective(hard=1.0)},
    "from scratch, taught": {"from_scratch": True},
    "pruned": {"objective": Objective(hard=1.0)},
    "pruned, taught": {},
    f"pruned, taught by {DRAWS} draws a token": {"draws": DRAWS},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", default="pro", help="a shipped tier, or a directory")
    parser.add_argument("--data", type=Path, required=True, help="folder of the public data sets")
    parser.add_argument("--tier", default="nano-1")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--passes", type=int, default=1, help="over the training data")
    parser.add_argument("--rate", type=float, default=5e-3)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--out", type=Path, default=Path("distillation"))
    given = parser.parse_args()
    teacher, shape = Checkpoint.open(find_checkpoint(given.teacher)), ladder()[given.tier]
    mixed = mixture.Mixture.read(given.data)
    held = mixed.held_out
    held_out = [*held["call"], *held["intent"][::5], *held["redact"][::3]]
    given.out.mkdir(exist_ok=True)
    seeds, sizes, runs = [int(seed) for seed in given.seeds.split(",")], [], []
    found: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for seed in seeds:
        data = list(mixed.examples(given.passes, seed))
        for name, options in VARIANTS.items():
            out = given.out / f"{name.replace(' ', '-').replace(',', '')}-{seed}"
            outcome = distill(
                teacher, out, student=Tier(given.tier), data=data, held_out=held_out,
                settings=DistillSettings(
                    schedule=Schedule(steps=given.steps, peak=given.rate, seed=seed),
                    allow_overlap=True, **options),
                replace=True,
            ).report
            assert isinstance(outcome, DistillReport)
            found[name].append(outcome.after)
            runs.append({"variant": name, "seed": seed, **outcome.to_dict()})
            if "draws" in options:
                size = (run_folder(out) / "logits").stat().st_size
                sizes.append(size / sum(
                    len(answer) for _, answer in encode(teacher, data, shape.context).pairs))
    scratch, ceiling = found["from scratch"], outcome.teacher
    variants = [{
        "variant": name, "cross_entropy": values, "gap_closed": statistics.mean(
            (s - v) / (s - ceiling) for s, v in zip(scratch, values, strict=True)),
    } for name, values in found.items()]
    record = {
        "command": "python tests/bench/distillation.py --teacher "
                   f"{teacher.metadata.name} --data DIR --tier {given.tier} --steps {given.steps} "
                   f"--passes {given.passes} --rate {given.rate} --seeds {given.seeds}",
        "tier": given.tier, "steps": given.steps, "teacher_name": teacher.metadata.name,
        "teacher": ceiling, "seeds": seeds, "bytes_a_token": statistics.mean(sizes),
        "variants": variants, "runs": runs,
    }
    display.table(
        f"{given.tier} of {teacher.metadata.name}, {given.steps} steps; teacher {ceiling:.4f} "
        f"nats; draws take {record['bytes_a_token']:.1f} bytes a token",
        ("student", "held-out cross-entropy", "by seed", "gap closed"),
        [(
            row["variant"], f"{statistics.mean(row['cross_entropy']):.4f}",
            " ".join(f"{value:.4f}" for value in row["cross_entropy"]), f"{row['gap_closed']:.0%}",
        ) for row in variants],
    )
    (given.out / "distillation.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
