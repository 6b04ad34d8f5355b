"""4 bits of ours beside llama.cpp's: what they cost a model, and how fast they are, in one run.

    python tests/bench/peer.py MODEL.gguf --data DIR --ours CHECKPOINT_OR_BUNDLE... [--turns N]
        [--peer-python PYTHON] [--out DIR]

PYTHON has llama-cpp-python, which is no dependency of this project; without the option it is the
one that runs this. Every type of llama.cpp's is made of the same dequantized weights, without an
importance matrix. KL divergence and the same most likely token are measured on the texts of
`fourbit.py`, each side against its own unquantized weights; how far those are from each other is in
the first row. Checkpoints are read eagerly, bundles by their program. Speed is that of the bundles
(without one, of the first checkpoint's, exported into OUT) and of Q4_0, with a thread a processor,
in turns, each in a process of its own: medians, and the ratio's lowest and highest turn. With
`--turns 0` it is left out. `OUT/peer.json` has every figure; the models in OUT are not made again.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np
import torch
from fourbit import logits, processor, read_texts

from cloister import Checkpoint, display, import_model, pipeline
from cloister.bundle import Bundle
from cloister.evaluate import peers, speed
from cloister.evaluate.divergence import compare
from cloister.runtime.engine import Engine
from cloister.runtime.generate import score
from cloister.runtime.program import runs_here
from cloister.settings import processors

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from cloister.evaluate.divergence import Divergence
    from cloister.progress import Progress

    Llama = Callable[..., dict[str, Any]]  # runs a command of `cloister.evaluate.peers.llamacpp`
    Texts = list[list[int]]
    Logits = dict[str, Iterable[torch.Tensor]]  # by kind of text, float32[T, V] of each
    Costs = dict[str, dict[str, Divergence]]  # by name, by kind of text

TYPES = ("Q4_0", "Q4_K_S", "Q4_K_M")
PEER = "Q4_0"  # of as many bits as ours: what ours is divided by
PREFILLS, POSITIONS, STEPS = (128, 512), (0, 512), 32
CONTEXT = POSITIONS[-1] + STEPS
LLAMA = peers.PEERS["llama.cpp"]
_REFERENCES = "float32, from ours"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--data", type=Path, help="folder of the public data sets")
    parser.add_argument("--ours", type=Path, nargs="+", default=[])
    parser.add_argument("--turns", type=int, default=7, help="of speed")
    parser.add_argument("--peer-python", default=sys.executable)
    parser.add_argument("--out", type=Path, default=Path("peer"))
    parser.add_argument("--speed", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.speed:  # of the bundle `model`, in this process
        print(json.dumps(speed.measure(
            given.model, prefills=PREFILLS, positions=POSITIONS, steps=STEPS)))
        return
    ours = {path.name: path for path in given.ours}
    if given.data is None or not ours or len(ours) < len(given.ours):
        parser.error("--data and --ours are needed, and names that differ.")
    given.out.mkdir(exist_ok=True)
    found = peers.versions(LLAMA, given.peer_python)
    if said := peers.missing(found):
        sys.exit(f"{given.peer_python}: {said}; make an interpreter that has it, `python -m venv "
                 "PEER && PEER/bin/python -m pip install llama-cpp-python`, which compiles "
                 "llama.cpp, and give `--peer-python PEER/bin/python`.")
    llama = functools.partial(peers.run, LLAMA, given.peer_python)
    record: dict[str, Any] = {"model": given.model.name, "processor": processor(),
                              "threads": processors(), "peer": {**found, **llama("about")}}
    with display.quiet(debug=False) as console, display.progress(console, "peer") as progress:
        files = _files(given.model, given.out, llama, progress)
        sizes = {name: path.stat().st_size for name, path in files.items()} | {
            name: _program_bytes(path) for name, path in ours.items() if _is_bundle(path)}
        costs = _costs(given, llama, files, ours, progress)
        record |= {"bytes": sizes, "divergence": {
            name: {kind: one.to_dict() for kind, one in each.items()}
            for name, each in costs.items()}}
        _write(given.out, record)
        if given.turns:
            record["speed"] = _speeds(given, llama, files[PEER], ours, progress)
            _write(given.out, record)
    _show(record, costs)


def _program_bytes(path: Path) -> int:
    """Return the size of the program that a bundle runs here."""
    bundle = Bundle.open(path)
    return (path / bundle.program(runs_here).file).stat().st_size


def _files(model: Path, out: Path, llama: Llama, progress: Progress) -> dict[str, Path]:
    """Return the files of llama.cpp's by type, the unquantized one first."""
    files = {kind: out / f"{model.stem}.{kind}.gguf" for kind in ("F32", *TYPES)}
    for done, (kind, path) in enumerate(files.items()):
        if path.exists():
            continue
        progress("quantize", done, len(files), kind)
        part = path.with_suffix(".part")
        if kind == "F32":
            _dequantize(model, part)
        else:
            llama("quantize", str(files["F32"]), str(part), kind, str(processors()))
        part.rename(path)
    return files


def _dequantize(model: Path, out: Path) -> None:
    """Write a GGUF file anew with every tensor in float32."""
    reader = gguf.GGUFReader(model)
    keys, skipped = gguf.Keys.General, ("GGUF.version", "GGUF.tensor_count", "GGUF.kv_count")
    writer = gguf.GGUFWriter(out, reader.fields[keys.ARCHITECTURE].contents())
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    for name, field in reader.fields.items():
        if name not in (keys.ARCHITECTURE, keys.FILE_TYPE, keys.QUANTIZATION_VERSION, *skipped):
            writer.add_key_value(name, field.contents(), field.types[0],
                                 field.types[-1] if len(field.types) > 1 else None)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, gguf.quants.dequantize(tensor.data, tensor.tensor_type))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _costs(
    given: argparse.Namespace, llama: Llama, files: dict[str, Path], ours: dict[str, Path],
    progress: Progress
) -> Costs:
    """Return how far each is from its own unquantized model, and those from each other."""
    if not (given.out / "plain").exists():
        import_model(given.model, given.out / "plain")
    source = Checkpoint.open(given.out / "plain")
    texts, costs = read_texts(source, given.data), {}
    names = [_REFERENCES, *TYPES, *ours]

    def measure(reference: Logits, candidate: Logits) -> None:
        costs[names[len(costs)]] = {
            kind: compare(zip(reference[kind], candidate[kind], strict=True)) for kind in texts}
        progress("measure", len(costs), len(names), names[len(costs) - 1])

    # Theirs stay on the disk, where ours are in memory: they take a gigabyte.
    with tempfile.TemporaryDirectory(dir=given.out) as scratch:
        exact = {kind: logits(source.load(), each) for kind, each in texts.items()}
        theirs = _by_llama(llama, files["F32"], texts, Path(scratch) / "F32")
        measure(exact, theirs)
        for kind in TYPES:
            measure(theirs, _by_llama(llama, files[kind], texts, Path(scratch) / "one"))
        for path in ours.values():
            measure(exact, _by_us(path, texts))
    return costs


def _by_llama(llama: Llama, path: Path, texts: dict[str, Texts], scratch: Path) -> Logits:
    for kind, each in texts.items():
        (scratch / kind).mkdir(parents=True, exist_ok=True)
        ids = scratch / f"{kind}.json"
        ids.write_text(json.dumps(each))
        llama("logits", str(path), str(ids), str(scratch / kind), str(processors()))
    return {kind: [torch.from_numpy(np.load(scratch / kind / f"{number}.npy", mmap_mode="c"))
                   for number in range(len(each))] for kind, each in texts.items()}


def _by_us(path: Path, texts: dict[str, Texts]) -> Logits:
    if _is_bundle(path):
        engine = Engine(path)
        return {kind: (torch.cat(list(score(engine, ids, 0))) for ids in each)
                for kind, each in texts.items()}
    decoder = Checkpoint.open(path).load()
    return {kind: (logits(decoder, [ids])[0] for ids in each) for kind, each in texts.items()}


def _speeds(
    given: argparse.Namespace, llama: Llama, peer: Path, ours: dict[str, Path],
    progress: Progress
) -> dict[str, Any]:
    """Return tokens a second by turn, their medians, and what ours are of the peer's."""
    bundles = {name: path for name, path in ours.items() if _is_bundle(path)}
    if not bundles:
        name, path = next(iter(ours.items()))
        bundles[name] = given.out / f"{name}.cloister"
        if not bundles[name].exists():
            pipeline.export(path, bundles[name], progress=progress)
    commands: dict[str, Callable[[], dict[str, Any]]] = {
        name: functools.partial(_speed, path) for name, path in bundles.items()
    } | {PEER: functools.partial(llama, "speed", str(peer), *map(
        json.dumps, (CONTEXT, processors(), PREFILLS, POSITIONS, STEPS)))}
    turns: dict[str, list[dict[str, float]]] = {name: [] for name in commands}
    for turn in range(given.turns):
        for name, command in commands.items():
            progress("speed", turn, given.turns, name)
            found = command()
            turns[name].append({
                f"{label} {place}": value for label, key in (
                    ("prefill of", "prefill_tokens_per_s"), ("decode at", "decode_tokens_per_s"))
                for place, value in found[key].items()})
    kinds = turns[PEER][0]
    ratios = {name: {kind: [mine[kind] / other[kind] for mine, other in zip(
        turns[name], turns[PEER], strict=True)] for kind in kinds} for name in bundles}
    return {
        "turns": turns, "tokens_per_s": {
            name: {kind: statistics.median(turn[kind] for turn in each) for kind in kinds}
            for name, each in turns.items()},
        "ratio": {name: {kind: {
            "median": statistics.median(each), "lowest": min(each), "highest": max(each),
        } for kind, each in kinds.items()} for name, kinds in ratios.items()},
    }


def _speed(path: Path) -> dict[str, Any]:
    """Measure a bundle in a process of its own."""
    # As `peers.run` does, what is set for OpenMP is left out.
    environment = {key: value for key, value in os.environ.items() if not key.startswith("OMP_")}
    done = subprocess.run([sys.executable, __file__, "--speed", str(path)], capture_output=True,
                          text=True, check=False, env=environment)
    if done.returncode:
        sys.exit(f"Measuring {path.name} failed: {done.stderr.strip().splitlines()[-1:]}.")
    record: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return record


def _is_bundle(path: Path) -> bool:
    return (path / "manifest.json").exists()


def _write(out: Path, record: dict[str, Any]) -> None:
    (out / "peer.json").write_text(json.dumps(record, indent=1) + "\n")


def _show(record: dict[str, Any], costs: Costs) -> None:
    kinds = list(costs[PEER])
    where = f"{record['model']} on {record['processor']}, {record['threads']} threads"
    display.table(f"{where}: KL divergence from the own unquantized model, nats a token", (
        "", "file", *(kind + what for kind in kinds for what in ("", f" / {PEER}", ": same"))), [
        (name, display.bytes_text(record["bytes"][name]) if name in record["bytes"] else "",
         *(text for kind in kinds for text in (
             f"{each[kind].mean_kld:.3g} +- {each[kind].mean_kld_se:.1g}",
             f"{each[kind].mean_kld / costs[PEER][kind].mean_kld:.2f}", f"{each[kind].top1:.1%}")))
        for name, each in costs.items()])
    if "speed" in record:
        found = record["speed"]
        display.table("Tokens a second, medians of turns", (
            "", PEER, *(text for name in found["ratio"] for text in (name, f"/ {PEER}"))), [
            (kind, f"{peer:.1f}", *(text for name, each in found["ratio"].items() for text in (
                f"{found['tokens_per_s'][name][kind]:.1f}",
                "{median:.2f} ({lowest:.2f} to {highest:.2f})".format(**each[kind]))))
            for kind, peer in found["tokens_per_s"][PEER].items()])


if __name__ == "__main__":
    main()
