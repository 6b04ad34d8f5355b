"""Time and memory of calibrating a model of the full ladder's size, with random weights.

    python tests/bench/large.py [--tier nano-1] [--layers N] [--out DIR]

The texts are as many as `cloister quantize --calibrate` would sample, of random tokens. With
`--layers` it stops behind the first so many, and the time of all is reckoned from theirs; sampling
is timed on one batch of 16 tokens each. Weights in OUT, 3.6 GB for nano-1, are not made again.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path

import torch
from fourbit import processor

from cloister import Checkpoint, display
from cloister.distill.answers import load_to_sample
from cloister.model.checkpoint import plan
from cloister.model.config import ModelConfig
from cloister.model.generate import generate
from cloister.model.recipe import DEFAULT_RECIPE, Recipe
from cloister.model.transformer import initial_weights
from cloister.model.writer import CheckpointWriter
from cloister.quantize.calibrate import Calibration
from cloister.quantize.texts import LENGTH, most
from cloister.reference import find_checkpoint
from cloister.runtime.memory import peak_bytes
from cloister.tiers import Scale, Tier, ladder

BATCH, TOKENS = 32, 16  # texts and tokens that are sampled


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tier", type=Tier, choices=list(Tier), default=Tier.NANO_1)
    parser.add_argument("--layers", type=int, help="calibrate only the first so many")
    parser.add_argument("--out", type=Path, default=Path("large"))
    given = parser.parse_args()
    source = _random(given.out / given.tier, given.tier)
    shape, rng = source.metadata.config.shape, torch.Generator().manual_seed(0)
    texts = torch.randint(shape.vocab_size, (most(shape.parameters), LENGTH), generator=rng)
    calibration = Calibration(source, Recipe.parse(DEFAULT_RECIPE), texts.tolist())
    wanted, begun, times = given.layers or shape.layers, time.perf_counter(), []
    with display.quiet(debug=False) as console, display.progress(console, "large") as progress:
        for _ in calibration.tensors(progress):
            if len(calibration.errors) > len(times):
                times.append(time.perf_counter() - begun)
            if len(times) == wanted < shape.layers:
                break
    calibrated = time.perf_counter() - begun
    if wanted < shape.layers:
        calibrated = times[0] + (shape.layers - 1) * (times[-1] - times[0]) / max(1, wanted - 1)
    peak = peak_bytes()
    sampled = _sampling(source) * texts.numel()
    display.table(f"{given.tier}, {display.count(shape.parameters)} weights on {processor()}", (
        "", "measured"), [
        ("texts", f"{len(texts)} of {LENGTH} tokens"), ("layers", f"{wanted} of {shape.layers}"),
        ("sampling", f"{sampled / 60:.1f} minutes"),
        ("calibration", f"{calibrated / 60:.1f} minutes"), ("peak", display.bytes_text(peak)),
        ("peak with sampling", display.bytes_text(peak_bytes()))])


def _random(out: Path, tier: Tier) -> Checkpoint:
    if not out.exists():
        like = Checkpoint.open(find_checkpoint("nano-1"))  # whose tokenizer it takes
        vocabulary = like.metadata.config.shape.vocab_size
        config = ModelConfig(shape=replace(ladder(Scale.FULL)[tier], vocab_size=vocabulary))
        with CheckpointWriter(
            out, metadata=replace(like.metadata, config=config, name=str(tier)),
            tensors=plan(config, None, torch.bfloat16), tokenizer=like.tokenizer_path,
            template=like.template_path, replace=False,
        ) as writer:
            for name, value in initial_weights(config, 0):
                writer.add(name, value.bfloat16())
    return Checkpoint.open(out)


def _sampling(source: Checkpoint) -> float:
    """Return the seconds that a sampled token takes."""
    decoder, rng = load_to_sample(source), torch.Generator().manual_seed(0)
    begun = time.perf_counter()
    generate(decoder, [[1]] * BATCH, end=(), limit=TOKENS, temperature=1.0, rng=rng)
    return (time.perf_counter() - begun) / (BATCH * TOKENS)


if __name__ == "__main__":
    main()
