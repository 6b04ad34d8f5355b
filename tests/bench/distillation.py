"""What distillation brings: the same student from scratch, pruned and taught, with the same tokens.

    python tests/bench/distillation.py --teacher CKPT --data DIR [--tier nano-1] [--steps 600]
        [--seeds 0,1,2] [--out DIR]

Prints the held-out cross-entropy of every variant, and which share of the gap between the student
from scratch and the teacher it closes: (scratch - variant) / (scratch - teacher). A run that was
cut short goes on when it is repeated.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from cloister import display, training
from cloister.distill.losses import Objective
from cloister.distill.schedule import Schedule
from cloister.model.checkpoint import Checkpoint
from cloister.reference import mixture
from cloister.tiers import ladder

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
    parser.add_argument("--teacher", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True, help="folder of the public data sets")
    parser.add_argument("--tier", default="nano-1")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--rate", type=float, default=5e-3)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--out", type=Path, default=Path("distillation"))
    given = parser.parse_args()
    teacher, shape = Checkpoint.open(given.teacher), ladder()[given.tier]
    mixed = mixture.Mixture.read(given.data)
    held = mixture.development(given.data)
    held_out = training.encode(
        teacher, [*held["call"], *held["intent"][::3], *held["redact"]], shape.context)
    given.out.mkdir(exist_ok=True)
    found: dict[str, list[float]] = {name: [] for name in VARIANTS}
    record: dict[str, Any] = {"command": vars(given), "runs": []}
    for seed in map(int, given.seeds.split(",")):
        data = training.encode(teacher, mixed.examples(2, seed), shape.context)
        for name, options in VARIANTS.items():
            out = given.out / f"{name.replace(' ', '-').replace(',', '')}-{seed}"
            outcome = training.distill(
                teacher, out, shape=shape, name=given.tier, data=data, held_out=held_out,
                schedule=Schedule(steps=given.steps, peak=given.rate, seed=seed), compiled=True,
                replace_existing=True, **options,
            )
            found[name].append(outcome.after)
            run = {"variant": name, "seed": seed, **outcome.to_dict()}
            if "draws" in options:
                size = (training.run_folder(out) / "logits").stat().st_size
                run["bytes_a_token"] = size / sum(len(answer) for _, answer in data)
            record["runs"].append(run)
    scratch, ceiling = found["from scratch"], outcome.teacher
    rows = []
    for name, values in found.items():
        closed = [(s - v) / (s - ceiling) for s, v in zip(scratch, values, strict=True)]
        rows.append((
            name, f"{statistics.mean(values):.4f}",
            " ".join(f"{value:.4f}" for value in values), f"{statistics.mean(closed):.0%}",
        ))
        record.setdefault("gap_closed", {})[name] = closed
    record["teacher"] = ceiling
    display.table(
        f"{given.tier} of {teacher.path.name}, {given.steps} steps; teacher {ceiling:.4f} nats",
        ("student", "held-out cross-entropy", "by seed", "gap closed"), rows,
    )
    (given.out / "record.json").write_text(json.dumps(record, indent=1, default=str) + "\n")


if __name__ == "__main__":
    main()
