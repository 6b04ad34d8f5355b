"""GGUF files as they are, in programs of ours and in llama.cpp: how far from each other.

    python tests/bench/kept.py FILE.gguf... --peer-python PYTHON [--tokens N] [--out DIR]

Each file is imported with `keep_quantization` and exported for Cloister's own operators. On chat
texts of the package the program is compared with llama.cpp on the same file, and both with the
values that the file holds, in float32: KL divergence a token, and the same most likely token. What
is left between the two is how each rounds activations, and that keys and values have 16 bits in
ours. PYTHON has llama-cpp-python (see `README.md`). `OUT/kept.json` has every figure; what lies in
OUT is not made again.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fourbit import logits, processor
from peer import LLAMA, _by_llama, _by_us

from cloister import Checkpoint, display, import_model, pipeline
from cloister.evaluate import peers
from cloister.evaluate.divergence import compare
from cloister.export.check import conversations
from cloister.tokenizer import Tokenizer

if TYPE_CHECKING:
    from peer import Llama

    from cloister.evaluate.divergence import Divergence
    from cloister.progress import Progress


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE.gguf")
    parser.add_argument("--peer-python", required=True, metavar="PYTHON")
    parser.add_argument("--tokens", type=int, default=600)
    parser.add_argument("--out", type=Path, default=Path("kept"))
    given = parser.parse_args()
    given.out.mkdir(exist_ok=True)
    if said := peers.missing(peers.versions(LLAMA, given.peer_python)):
        sys.exit(f"{given.peer_python}: {said}; README.md beside this says what to install.")
    llama = functools.partial(peers.run, LLAMA, given.peer_python)
    record: dict[str, Any] = {"processor": processor(), "peer": llama("about"), "files": {}}
    rows = []
    with display.quiet(debug=False) as console, display.progress(console, "kept") as progress:
        for done, file in enumerate(given.files):
            progress("measure", done, len(given.files), file.name)
            recipe, costs = _costs(given, llama, file, progress)
            record["files"][file.name] = {
                "recipe": recipe, **{name: each.to_dict() for name, each in costs.items()}}
            rows.append((file.name, recipe, *(
                f"{each.mean_kld:.4f} +- {each.mean_kld_se:.4f}, {each.top1:.1%}"
                for each in costs.values())))
    (given.out / "kept.json").write_text(json.dumps(record, indent=1) + "\n")
    display.table("KL divergence, nats a token, and the same most likely token", (
        "", "types", "ours from llama.cpp", "llama.cpp from the values", "ours from the values"),
        rows)


def _costs(
    given: argparse.Namespace, llama: Llama, file: Path, progress: Progress
) -> tuple[str, dict[str, Divergence]]:
    """Return the types of a file, and the three divergences."""
    kept, plain = (given.out / f"{file.stem}.{kind}" for kind in ("kept", "plain"))
    bundle = given.out / f"{file.stem}.cloister"
    for path in (kept, plain):
        if not path.exists():
            import_model(file, path, keep_quantization=path is kept)
    if not bundle.exists():
        pipeline.export(kept, bundle, backends=("cloister",), progress=progress)
    source = Checkpoint.open(plain)
    tokenizer = Tokenizer.from_files(
        source.tokenizer_path, source.template_path, source.metadata)
    texts = {"chat": conversations(tokenizer, source.metadata.config.shape.context, given.tokens)}
    values = logits(source.load(), texts["chat"])
    with tempfile.TemporaryDirectory(dir=given.out) as scratch:
        theirs = list(_by_llama(llama, file, texts, Path(scratch))["chat"])
        ours = list(_by_us(bundle, texts)["chat"])
        return Checkpoint.open(kept).metadata.recipe or "", {
            name: compare(zip(reference, candidate, strict=True))
            for name, reference, candidate in (
                ("ours_from_llama_cpp", theirs, ours), ("llama_cpp_from_values", values, theirs),
                ("ours_from_values", values, ours))}


if __name__ == "__main__":
    main()
