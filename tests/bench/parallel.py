"""Memory and losses of one process, two and four that distil together (gloo, on this machine).

    python tests/bench/parallel.py [--worlds 1,2,4] [--hidden 512] [--layers 24] [--steps 4]
        [--out DIR]

A teacher of random weights and a student cut out of it are trained for a few steps on short rows,
in float32, so that weights, gradients and optimizer state are most of the memory. Prints, for each
number of processes, the losses and the peak memory of the process that took most, beyond what it
had when everything was imported (VmHWM).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from cloister import reference
from cloister.corpus import Example
from cloister.distill.parallel import Parallel
from cloister.distill.run import DistillReport, DistillSettings, distill, run_folder
from cloister.distill.schedule import Kind, Schedule
from cloister.model.checkpoint import Checkpoint, Metadata, plan
from cloister.model.config import ModelConfig
from cloister.model.transformer import initial_weights
from cloister.model.writer import CheckpointWriter
from cloister.tiers import Shape

DATA = [
    Example(task="call", input=f"play number {number}", target=f"song {number % 7}")
    for number in range(60)
]


def make_teacher(path: Path, hidden: int, layers: int) -> Checkpoint:
    """Random weights with the tokenizer of the shipped family."""
    source = Checkpoint.open(reference.checkpoint_path("nano-1"))
    config = ModelConfig(shape=Shape(
        vocab_size=4096, hidden_size=hidden, layers=layers, heads=hidden // 32,
        kv_heads=hidden // 32, head_size=32, feed_forward=hidden * 8 // 3 // 32 * 32, context=128,
        tied=True))
    with CheckpointWriter(
        path, metadata=Metadata(name="random", config=config, eos=source.metadata.eos),
        tensors=plan(config, None), tokenizer=source.tokenizer_path,
        template=source.template_path,
    ) as writer:
        for name, value in initial_weights(config, 0):
            writer.add(name, value)
    return Checkpoint.open(path)


def peak_bytes() -> int:
    """Most memory that this process ever had."""
    (line,) = (each for each in Path("/proc/self/status").read_text().splitlines()
               if each.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def work(teacher: Path, out: Path, steps: int, optimizer: Kind) -> None:
    """One process of a run."""
    parallel, before = Parallel(), peak_bytes()
    source = Checkpoint.open(teacher)
    shape = source.metadata.config.shape
    made = distill(
        source, out, student=replace(shape, layers=shape.layers * 3 // 4), data=DATA,
        settings=DistillSettings(schedule=Schedule(
            steps=steps, tokens=256, micro=128, warmup=0, decay=0.0, peak=1e-3, autocast=False,
            optimizer=optimizer)))
    assert isinstance(made.report, DistillReport)
    (run_folder(out) / f"rank-{parallel.rank}.json").write_text(json.dumps({
        "peak_bytes": peak_bytes() - before, "losses": made.report.run.losses,
        "identity": made.identity,
    }))


def measure(
    world: int, teacher: Path, out: Path, *, steps: int = 4, optimizer: Kind = Kind.ADAMW
) -> dict[str, Any]:
    """Peak memory of the largest process of `world`, and the losses."""
    runner = ["-m", "torch.distributed.run", f"--nproc-per-node={world}", "--standalone"]
    subprocess.run(
        [sys.executable, *(runner if world > 1 else []), __file__, "--worker", str(teacher),
         str(out), str(steps), optimizer],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        check=True, stderr=None if "-v" in sys.argv else subprocess.DEVNULL,
    )
    ranks = [json.loads(path.read_text()) for path in run_folder(out).glob("rank-*.json")]
    assert len(ranks) == world
    return {
        "world": world, "peak_bytes": max(rank["peak_bytes"] for rank in ranks),
        "losses": ranks[0]["losses"], "identity": ranks[0]["identity"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worlds", default="1,2,4")
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--optimizer", type=Kind, default=Kind.ADAMW, choices=list(Kind))
    parser.add_argument("--out", type=Path)
    parser.add_argument("-v", action="store_true", help="show what the processes say")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        out = given.out or Path(scratch)
        teacher = make_teacher(out / "teacher", given.hidden, given.layers)
        print(f"teacher: {teacher.metadata.config.shape.parameters / 1e6:.1f} M parameters")
        found = [
            measure(world, teacher.path, out / f"of-{world}", steps=given.steps,
                    optimizer=given.optimizer)
            for world in map(int, given.worlds.split(","))
        ]
    for row in found:
        print(f"{row['world']} processes: largest {row['peak_bytes'] / 1e6:,.0f} MB, "
              f"{row['peak_bytes'] / found[0]['peak_bytes']:.2f} of one; losses",
              " ".join(f"{loss:.6f}" for loss in row["losses"]))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        work(Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]), Kind(sys.argv[5]))
    else:
        main()
