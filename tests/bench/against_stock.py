"""Our two backends against ExecuTorch's own route, in one run: time, memory, and speed.

    python tests/bench/against_stock.py [--shape nano-1] [--json FILE]

The stock route is the shortest that works (facts of executorch 1.4.1): the same decoder with
torchao's 8da4w tensors, `custom_sdpa`, one method, lowered by `XnnpackPartitioner` with a partition
an operator. Each export runs in a process of its own, without the check at its end. Speeds are
measured in turns, three times each; their ratios are what counts. Takes twenty minutes for nano-1.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from cloister import bench
from cloister.backend import CLOISTER, XNNPACK
from cloister.bench import bare
from cloister.manifest import ProgramEntry
from cloister.model.checkpoint import Checkpoint
from cloister.model.config import ModelConfig
from cloister.model.recipe import Recipe
from cloister.model.transformer import Decoder
from cloister.runtime.memory import peak_bytes
from cloister.tiers import ladder

RECIPE, CHUNK, TURNS = "8da4w-g32", 128, 3
STOCK = "stock"
KINDS = (CLOISTER.name, XNNPACK.name, STOCK)


def stock(source: Path, out: Path) -> None:
    """The stock export of the same decoder (its weights are random anyway)."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import (
        EdgeCompileConfig,
        ExecutorchBackendConfig,
        to_edge_transform_and_lower,
    )
    from executorch.exir.passes import MemoryPlanningPass
    from torch import nn
    from torch.export import Dim, export
    from torchao.quantization import (
        Int8DynamicActivationIntxWeightConfig,
        IntxWeightOnlyConfig,
        quantize_,
    )
    from torchao.quantization.granularity import PerAxis, PerGroup

    from cloister.export.backends.xnnpack import attention
    from cloister.export.graph import KVAttend, Program

    class Forward(Program):
        def forward(self, tokens: torch.Tensor, start_pos: torch.Tensor) -> torch.Tensor:
            start = self.start(start_pos, tokens.shape[1])
            rows = self.decoder.hidden(tokens, start, KVAttend(self, start))
            return self.decoder.logits(rows[:, -1:])[:, 0]

    checkpoint = Checkpoint.open(source)
    with torch.device("meta"):
        decoder = Decoder(checkpoint.metadata.config)
    body = Int8DynamicActivationIntxWeightConfig(
        weight_dtype=torch.int4, weight_granularity=PerGroup(32),
        weight_scale_dtype=torch.bfloat16,
    )
    head = Int8DynamicActivationIntxWeightConfig(
        weight_dtype=torch.int8, weight_granularity=PerAxis(0)
    )
    rows = IntxWeightOnlyConfig(weight_dtype=torch.int8, granularity=PerAxis(0))
    for name, module in decoder.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            weight = torch.randn(module.weight.shape) * 0.02
            module.weight = nn.Parameter(weight, requires_grad=False)
            if isinstance(module, nn.Embedding):
                quantize_(module, rows, lambda inner, _: isinstance(inner, nn.Embedding))
            else:
                quantize_(module, head if name == "head" else body)
        elif hasattr(module, "eps"):
            module.weight = nn.Parameter(torch.ones(module.weight.shape), requires_grad=False)
    exported = export(
        Forward(decoder, attention),
        (torch.zeros(1, 2, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)),
        dynamic_shapes=({1: Dim("T", min=1, max=CHUNK)}, None), strict=False,
    )
    edge = to_edge_transform_and_lower(
        exported, partitioner=[XnnpackPartitioner(per_op_mode=True)],
        compile_config=EdgeCompileConfig(_check_ir_validity=False),
    )
    manager = edge.to_executorch(ExecutorchBackendConfig(
        do_quant_fusion_and_const_prop=True,
        memory_planning_pass=MemoryPlanningPass(alloc_graph_input=False),
        emit_mutable_buffer_names=True,
    ))
    with out.open("wb") as file:
        manager.write_to_file(file)


def stock_entry(source: Checkpoint, directory: Path) -> ProgramEntry:
    """The stock program in the folder of a bundle, so that all are measured by the same code."""
    shape = source.metadata.config.shape
    path = directory / f"program.{XNNPACK.name}.pte"
    stock(source.path, path)
    return ProgramEntry(
        file=path.name, backend=XNNPACK.name, methods=("forward",),
        operator_abi=XNNPACK.operator_abi, arena_bytes=0, weight_bytes=path.stat().st_size,
        kv_bytes=shape.context * shape.kv_bytes_per_token())


def export(kind: str, source: Path, out: Path) -> dict[str, float]:
    """Write a bundle in a process of its own: seconds and peak memory."""
    if kind != STOCK:
        return bare.export_apart(kind, source, out)
    done = subprocess.run(
        [sys.executable, __file__, "--export", str(source), str(out)],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True,
    )
    record: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="nano-1")
    parser.add_argument("--size", default="full")
    parser.add_argument("--layers", type=int, help="fewer layers, to try it out")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--export", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.export:
        source, out = args.export
        began = time.perf_counter()
        checkpoint = Checkpoint.open(source)
        bare.write_bundle(
            checkpoint, Path(out), functools.partial(stock_entry, checkpoint), CHUNK)
        print(json.dumps({"convert_s": time.perf_counter() - began,
                          "convert_peak_bytes": peak_bytes()}))
        return
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        shape = ladder(args.size)[args.shape]
        config = ModelConfig(shape=replace(shape, layers=args.layers or shape.layers))
        bench.random_checkpoint(root / "random", config, Recipe.parse(RECIPE))
        record: dict[str, Any] = {"shape": args.shape, "size": args.size, "turns": TURNS}
        bundles = {}
        for kind in KINDS:
            bundles[kind] = root / f"{kind}.cloister"
            record[kind] = export(kind, root / "random", bundles[kind])
        turns: dict[str, list[dict[str, Any]]] = {kind: [] for kind in KINDS}
        for _ in range(TURNS):
            for kind, path in bundles.items():
                turns[kind].append(bench.measure(path))
        for kind, runs in turns.items():
            for name in ("load_s", "first_token_s", "rss_bytes", "anon_bytes"):
                record[kind][name] = statistics.median(run[name] for run in runs)
            for name in ("prefill_tokens_per_s", "decode_tokens_per_s"):
                record[kind][name] = {
                    at: statistics.median(run[name][at] for run in runs) for at in runs[0][name]
                }
        for kind in KINDS[:-1]:
            record[f"{kind}_over_stock"] = {
                name: {
                    at: record[kind][name][at] / record[STOCK][name][at]
                    for at in record[kind][name]
                }
                for name in ("prefill_tokens_per_s", "decode_tokens_per_s")
            }
    text = json.dumps(record, indent=1)
    if args.json:
        args.json.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
