"""Exports bundles anew out of their own programs: `python tests/campaigns/family_anew.py OUT`.

A newer exporter wants the quantized checkpoint, and of the larger tiers that is not kept. But all
of it lies in the program, to the bit: OUT/quantized/TIER is read back out of it, and
OUT/family/TIER.cloister is exported from there. The logits of both programs are compared. What was
evaluated stays in the receipt, with the distance of the new program from the one that was.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from operator import eq
from pathlib import Path
from typing import Any

import torch

from cloister import pipeline
from cloister.bundle import Bundle, rewrite_receipt
from cloister.evaluate.divergence import compare
from cloister.export import check
from cloister.export._executorch import read_program, schema
from cloister.model.checkpoint import Checkpoint, Metadata, plan
from cloister.model.recipe import Recipe
from cloister.model.writer import CheckpointWriter
from cloister.reference import checkpoint_path, requests_path
from cloister.runtime.core import Core, Rows
from cloister.runtime.program import load
from cloister.tiers import Tier
from cloister.tokenizer import Tokenizer

RECORDS = Path(__file__).parents[2] / "sdk/cloister/reference/records"


class Stored:
    """The constants of a program, as bytes."""

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            self.program, base = read_program(file)
        self.data = torch.from_file(str(path), size=path.stat().st_size, dtype=torch.uint8)
        self.starts = [base + segment.offset for segment in self.program.segments]
        (self.plan,) = (each for each in self.program.execution_plan if each.name == "score")
        self.calls: list[Any] = [each.instr_args for each in self.plan.chains[0].instructions]
        self.named = {each.key: self.starts[each.segment_index] for each in self.program.named_data}
        norms = [at for call in self.calls if isinstance(call, schema.DelegateCall)
                 for at in map(self.constant, call.args) if at is not None]
        layers = sum(name.endswith(".attn.qkv.q.weight.q") for name in self.named)
        names = [f"layers.{layer}.{norm}_norm.weight"
                 for layer in range(layers) for norm in ("attn", "mlp")]
        if norms:  # else it is of an exporter that named them
            self.named |= dict(zip([*names, "norm.weight"], norms, strict=True))

    def constant(self, value: int) -> int | None:
        """Return where a value of the plan lies in the file; None for what is computed."""
        found: Any = self.plan.values[value].val
        if not getattr(found, "data_buffer_idx", 0):
            return None
        held = self.program.constant_segment
        return int(self.starts[held.segment_index] + held.offsets[found.data_buffer_idx])

    def embedding(self, place: int) -> int:
        """Return where an argument of the embedding's operator begins."""
        (call,) = (
            call for call in self.calls if isinstance(call, schema.KernelCall)
            and "embedding" in self.plan.operators[call.op_index].name)
        at = self.constant(call.args[place])
        assert at is not None
        return at

    def tensor(self, at: int, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
        count = torch.Size(shape).numel() * dtype.itemsize
        return self.data[at:at + count].clone().view(dtype).view(shape)

    def four_bits(self, at: int, shape: tuple[int, int], *, even_high: bool) -> torch.Tensor:
        """Undo `cloister_kernels.reference.pack_4bit`, or `pack_4bit_embedding`."""
        packed = self.data[at:at + shape[0] * shape[1] // 2].view(shape[0], -1)
        halves = (packed >> 4, packed & 15) if even_high else (packed & 15, packed >> 4)
        return (torch.stack(halves, dim=-1).view(shape).to(torch.int8) - 8).contiguous()


def read_back(bundle: Bundle, out: Path) -> Checkpoint:
    """Write the quantized checkpoint that a bundle of the family was made from."""
    said, recipe = bundle.manifest, Recipe.parse(bundle.manifest.recipe)
    like = Checkpoint.open(checkpoint_path("pro")).metadata
    config = replace(like.config, shape=said.shape)
    stored = Stored(bundle.path / said.programs[0].file)
    record = json.loads((RECORDS / f"{said.name}.json").read_text("utf-8"))
    metadata = Metadata(
        name=said.name, config=config, recipe=said.recipe, bos=said.bos, eos=said.eos,
        parent=record["training"]["checkpoint"])
    tensors = plan(config, said.recipe)
    with CheckpointWriter(out, tensors=tensors, metadata=metadata, tokenizer=bundle.tokenizer_path,
                          template=bundle.template_path) as writer:
        for name, (dtype, shape) in tensors.items():
            owner, _, part = name.rpartition(".")
            scheme = recipe.scheme_of(owner)
            if owner == "embed.weight":
                at = stored.embedding(0 if part == "q" else 1)
            else:
                at = stored.named[name]
            if scheme is not None and part == "q" and scheme.bits == 4:
                tensor = stored.four_bits(at, shape, even_high=owner == "embed.weight")
            elif owner == "embed.weight" and part == "scale":
                tensor = stored.tensor(at, torch.float32, shape).to(dtype)
            else:
                tensor = stored.tensor(at, dtype, shape)
            writer.add(name, tensor)
    return Checkpoint.open(out)


def distance(one: Bundle, other: Bundle) -> dict[str, float | int]:
    """Return how far the logits of two programs of the same weights are from each other."""
    said = one.manifest
    tokenizer = Tokenizer.from_files(one.tokenizer_path, one.template_path)
    texts = check.conversations(tokenizer, said.context)
    paths = [each.path / each.manifest.programs[0].file for each in (one, other)]
    cores = [Core(load(path, said.shape.layers, first="score"), name=said.name,
                  context=said.context, chunk=said.prefill_chunk) for path in paths]

    def score(core: Core, ids: list[int]) -> torch.Tensor:
        core.truncate(0)
        return core.extend(ids, Rows.ALL).clone()

    return compare((score(cores[0], ids), score(cores[1], ids)) for ids in texts).to_dict()


def main(out: Path) -> None:
    requests = [json.loads(line) for line in requests_path().read_text("utf-8").splitlines()]
    prompts = [(row["system"], row["prompt"]) for row in requests]
    for folder in ("quantized", "family"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    for tier in Tier:
        before = Bundle.open(tier)
        source = read_back(before, out / "quantized" / tier)
        bundle = pipeline.export(source, out / "family" / f"{tier}.cloister", prompts=prompts)
        found = distance(before, bundle)
        receipt, earlier = bundle.receipt(), before.receipt()
        file = before.manifest.programs[0].file
        evaluated: object = {
            "program": before.manifest.files[file].sha256, "from_this_one": found}
        if before.manifest.files[file] == bundle.manifest.files[file]:
            evaluated = earlier["evaluated"]
        rewrite_receipt(bundle, {
            **receipt, "evaluations": earlier["evaluations"], "evaluated": evaluated})
        same = all(
            one.prompt == other.prompt and all(map(eq, one.tokens, other.tokens))
            for one, other in zip(before.golden(), bundle.golden(), strict=True))
        print(f"{tier}: {found['mean_kld']:.2g} nats from the program before, "
              f"{found['top1']:.2%} the same likeliest token, golden answers "
              f"{'the same as far as both go' if same else 'others'}", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
