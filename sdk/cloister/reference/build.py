"""Builds the reference family: `python -m cloister.reference.build --data DIR --out DIR`.

    DIR/tokenizer.json, chat_template.jinja   trained first, shared by every tier
    DIR/checkpoints/TIER/                     bfloat16
    DIR/family/TIER.cloister/                 quantized, exported and checked
    DIR/TIER.json                             what it cost and what it can do
    DIR/TIER.state                            to go on after a kill; may be deleted afterwards

`checkpoints` and `family`, moved into this package, are what it ships.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections import defaultdict
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich.console import Console

from cloister import pipeline
from cloister.corpus import read, split
from cloister.errors import CloisterError, SettingError
from cloister.model.cache import KVCache
from cloister.model.checkpoint import Checkpoint, CheckpointWriter, Metadata, plan
from cloister.model.config import ModelConfig
from cloister.model.recipe import DEFAULT_RECIPE, Recipe
from cloister.model.transformer import Decoder
from cloister.quantize.apply import quantize
from cloister.reference import requests_path, vocabulary
from cloister.reference.training import Schedule, train
from cloister.settings import Settings
from cloister.tiers import Tier, ladder
from cloister.tokenizer import Message, Tokenizer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cloister.corpus import Example
    from cloister.reference.training import Pair, Run

__all__ = ["SCHEDULES", "answer", "build", "main", "pair"]

SCHEDULES = {
    Tier.ULTRA: Schedule(steps=1200, peak=1.5e-3),
    Tier.PRO: Schedule(steps=1200, peak=2e-3),
    Tier.NANO_2: Schedule(steps=1500, peak=2.5e-3),
    Tier.NANO_1: Schedule(steps=1500, peak=3e-3),
}
_LONGEST = 160  # tokens of an answer; the longest of SNIPS has 105


def build(tier: Tier, data: Path, out: Path, schedule: Schedule) -> dict[str, object]:
    """Train `tier` with the tokenizer in `out`, write its checkpoint there, and test it.

    Raises:
        CloisterError: the data or a state file cannot be used, or the disk is full.
    """
    tokenizer = Tokenizer.from_files(out / "tokenizer.json", out / "chat_template.jinja")
    training, held_out = split(read(data / "snips"))
    decoder = Decoder(ModelConfig(shape=ladder()[tier]))
    decoder.initialize(schedule.seed)
    pairs = [pair(tokenizer, example) for example in training]
    run = train(decoder, pairs, schedule, out / f"{tier}.state")
    checkpoint = _write(decoder, tier, tokenizer, out)
    record = {
        "tier": str(tier),
        "command": f"python -m cloister.reference.build --data DATA --out OUT --tiers {tier} "
        f"--steps {schedule.steps} --seed {schedule.seed}",
        "checkpoint": checkpoint.identity,
        **_measure(checkpoint.load(), tokenizer, held_out),
        **_cost(schedule, run),
    }
    _bundle(checkpoint, tier, out)
    (out / f"{tier}.json").write_text(json.dumps(record, indent=1) + "\n", "utf-8")
    return record


def pair(tokenizer: Tokenizer, example: Example) -> Pair:
    """Ids of the prompt, up to where the answer begins, and of the answer with its end."""
    end = tokenizer.id_of("<|end|>")
    assert end is not None
    prompt = [
        Message(role="system", content=example.task), Message(role="user", content=example.input)
    ]
    return tokenizer.encode_chat(prompt), [*tokenizer.encode(example.target), end]


@torch.inference_mode()
def answer(decoder: Decoder, prompts: Sequence[list[int]], end: int) -> list[list[int]]:
    """Greedy answer to each prompt, without its `end`; prompts of one length go together."""
    alike: dict[int, list[int]] = defaultdict(list)
    for index, prompt in enumerate(prompts):
        alike[len(prompt)].append(index)
    answers: list[list[int]] = [[] for _ in prompts]
    for indices in alike.values():
        cache = KVCache(decoder.config)
        tokens_BT = torch.tensor([prompts[index] for index in indices])
        going = set(indices)
        for _ in range(_LONGEST):
            tokens_BT = decoder(tokens_BT, cache)[:, -1:].argmax(-1)
            for index, token in zip(indices, tokens_BT[:, 0].tolist(), strict=True):
                if token == end:
                    going.discard(index)
                elif index in going:
                    answers[index].append(token)
            if not going:
                break
    return answers


def _measure(decoder: Decoder, tokenizer: Tokenizer, examples: list[Example]) -> dict[str, object]:
    pairs = [pair(tokenizer, example) for example in examples]
    got = answer(decoder, [prompt for prompt, _ in pairs], pairs[0][1][-1])
    exact = sum(
        tokenizer.decode(ids) == example.target
        for ids, example in zip(got, examples, strict=True)
    )
    return {"dev_examples": len(pairs), "dev_frame_exact": exact / len(pairs)}


def _cost(schedule: Schedule, run: Run) -> dict[str, object]:
    return {
        "seconds": round(run.seconds),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "schedule": asdict(schedule),
        "losses": [round(loss, 4) for loss in run.losses],
    }


def _write(decoder: Decoder, tier: Tier, tokenizer: Tokenizer, out: Path) -> Checkpoint:
    end = tokenizer.id_of("<|end|>")
    assert end is not None
    tensors = plan(decoder.config, None, torch.bfloat16)
    held = decoder.state_dict()
    path = out / "checkpoints" / tier
    path.parent.mkdir(exist_ok=True)
    with CheckpointWriter(
        path, metadata=Metadata(name=tier, config=decoder.config, eos=(end,)),
        tensors=tensors, tokenizer=out / "tokenizer.json",
        template=out / "chat_template.jinja", replace=True,
    ) as writer:
        for name in tensors:
            writer.add(name, held[name])
    return Checkpoint.open(path)


def _bundle(checkpoint: Checkpoint, tier: Tier, out: Path) -> None:
    """Quantize and export, with the shipped requests as golden prompts."""
    rows = [json.loads(line) for line in requests_path().read_text("utf-8").splitlines()]
    path = out / "family" / f"{tier}.cloister"
    path.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        recipe = Recipe.parse(DEFAULT_RECIPE if tier.four_bit else "8da8w")
        quantize(checkpoint, Path(scratch) / "quantized", recipe)
        pipeline.export(
            Checkpoint.open(Path(scratch) / "quantized"), path, replace=True,
            golden=[(row["system"], row["prompt"]) for row in rows],
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; 0, or 1 with one sentence."""
    parser = argparse.ArgumentParser(prog="python -m cloister.reference.build", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Settings.from_environment().data,
                        help="folder of the public data sets (default: CLOISTER_DATA)")
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--tiers", default="pro,nano-1", help="comma-separated (%(default)s)")
    parser.add_argument("--steps", type=int, help="in place of the tier's own number")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    screen = Console(stderr=True)
    try:
        if given.data is None:
            raise SettingError("No data folder is named; pass --data or set CLOISTER_DATA.")
        jobs = []
        for name in given.tiers.split(","):
            ladder()[name]  # refuses an unknown tier
            schedule = replace(SCHEDULES[Tier(name)], seed=given.seed)
            if given.steps is not None:
                schedule = replace(schedule, steps=given.steps)
            jobs.append((Tier(name), schedule))
        given.out.mkdir(parents=True, exist_ok=True)
        vocabulary.train(given.out, given.data)
        for tier, schedule in jobs:
            record = build(tier, given.data, given.out, schedule)
            screen.print(
                f"{tier}: {record['dev_frame_exact']:.1%} of {record['dev_examples']} "
                f"development requests exact, {record['seconds']} s of training"
            )
    except CloisterError as error:
        screen.print(str(error), style="red", markup=False)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
