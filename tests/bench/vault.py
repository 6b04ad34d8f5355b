"""What sealing costs, and what a kept prefix saves:

    python tests/bench/vault.py [--bundle DIR] [--media DIR] [--repeats 5]

Sealing and opening in GB/s; small records against plain SQLite, and against SQLCipher or SQLite3
Multiple Ciphers where `sqlcipher3` or `apsw-sqlite3mc` is installed; then the time to the first
token with and without the prefix cache. Without `--bundle` that is measured on the full nano-1
shape with random weights, which is exported first. With `--media`, a bundle that reads lines and
hears, also the time to encode a picture and a recording, and to put back what that gave. Medians;
run it on an idle machine.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sqlite3
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from cloister import display
from cloister.settings import Settings
from cloister.vault import seal
from cloister.vault.keys import Keyholder
from cloister.vault.namespace import Kind
from cloister.vault.store import Vault

LARGE, RECORDS, RECORD = 100_000_000, 5000, 300
LENGTHS = (256, 512, 1024, 1900)
LINE = "Call Anna back at 555 0123 before Friday."


def median_s(action: Callable[[], object], repeats: int) -> float:
    """Median seconds of an action."""
    taken = []
    for _ in range(repeats):
        began = time.perf_counter()
        action()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)


def sealing(repeats: int) -> dict[str, float]:
    """GB/s of 100 MB, and of the same through a segment file with its sync."""
    key, content = seal.new_key(), bytearray(LARGE)

    def sealed() -> None:
        for _ in seal.seal_parts(key, b"place", [content]):
            pass

    whole = bytearray().join(bytes(p) for p in seal.seal_parts(key, b"place", [content]))
    view, target = memoryview(whole), memoryview(content)
    step = seal.PIECE_BYTES
    found = {
        "seal": median_s(sealed, repeats),
        "open": median_s(lambda: seal.open_into(
            key, b"place", (view[at:at + step] for at in range(0, len(view), step)), target),
            repeats),
    }
    return {name: LARGE / seconds / 1e9 for name, seconds in found.items()}


def records(folder: Path, repeats: int) -> dict[str, dict[str, float]]:
    """Writes and reads a second of single small records, each its own transaction."""
    data = [os.urandom(RECORD) for _ in range(RECORDS)]
    names = [b"%d" % number for number in range(RECORDS)]
    found: dict[str, dict[str, float]] = {}
    with Vault.create(folder / "vault", Keyholder(keyfile=folder / "key")) as vault:
        space = vault.namespace()
        found["vault"] = rates(
            lambda n: space.put(Kind.RESPONSES, names[n], data[n]),
            lambda n: space.get(Kind.RESPONSES, names[n]), repeats)
    for module, key in (("sqlite3", ""), ("sqlcipher3.dbapi2", "key"), ("apsw", "key")):
        try:
            library: Any = importlib.import_module(module)
        except ImportError:
            continue
        path = str(folder / f"{module}.db")
        db = library.Connection(path) if module == "apsw" else library.connect(
            path, isolation_level=None)
        run = db.execute if module != "apsw" else db.cursor().execute
        if key:
            run(f"PRAGMA key = '{seal.new_key().hex()}'")
        run("PRAGMA journal_mode = WAL")
        run("PRAGMA synchronous = NORMAL")
        run("CREATE TABLE records (name BLOB PRIMARY KEY, data BLOB)")
        found[module] = rates(
            lambda n, run=run: run("REPLACE INTO records VALUES (?, ?)", (names[n], data[n])),
            lambda n, run=run: list(run("SELECT data FROM records WHERE name = ?", (names[n],))),
            repeats)
        db.close()
    return found


def rates(
    write: Callable[[int], object], read: Callable[[int], object], repeats: int
) -> dict[str, float]:
    """Of each, calls a second: a new record, the same again, and reading it."""
    def all_of(action: Callable[[int], object]) -> Callable[[], None]:
        def apply() -> None:
            for number in range(RECORDS):
                action(number)

        return apply

    return {
        "new": RECORDS / median_s(all_of(write), 1),
        "again": RECORDS / median_s(all_of(write), repeats),
        "read": RECORDS / median_s(all_of(read), repeats),
    }


def prefixes(bundle: Path, folder: Path, repeats: int) -> list[dict[str, float]]:
    """Seconds to the first token, read anew and put back, by length of the prompt."""
    from cloister.runtime.engine import Engine
    from cloister.runtime.prefix import PrefixCache

    engine, rows = Engine(bundle), []
    with Vault.create(folder / "vault", Keyholder(keyfile=folder / "key")) as vault:
        cache = PrefixCache(engine, vault.namespace())
        ids = [4 + n * 7919 % 4000 for n in range(max(LENGTHS))]
        for length in LENGTHS:
            prompt = ids[:length]
            name = b"%d" % length

            def anew(prompt: list[int] = prompt) -> None:
                engine.truncate(0)
                engine.extend(prompt)

            def put_back(prompt: list[int] = prompt, name: bytes = name) -> None:
                engine.truncate(0)
                assert cache.resume(name) == len(prompt)
                engine.extend(prompt)

            engine.extend(prompt[:128])  # warm
            read_s = median_s(anew, max(1, repeats // 2))
            began = time.perf_counter()
            cache.keep(prompt, name)
            keep_s = time.perf_counter() - began
            back_s = median_s(put_back, repeats)
            engine.truncate(0)
            restore_s = median_s(lambda name=name: cache.resume(name), repeats)
            rows.append({
                "tokens": length, "read_s": read_s, "keep_s": keep_s, "restore_s": restore_s,
                "first_token_s": back_s, "times_faster": read_s / back_s,
                "keep_share": keep_s / read_s,
            })
    return rows


def media(bundle: Path, folder: Path, repeats: int) -> list[dict[str, Any]]:
    """Seconds to encode a picture of a line and a recording of 4 s, and to put back the vectors."""
    from PIL import Image, ImageDraw, ImageFont

    from cloister.message import Message
    from cloister.parts import Audio
    from cloister.parts import Image as ImagePart
    from cloister.runtime import encoded
    from cloister.runtime.engine import Engine
    from cloister.runtime.prefix import PrefixCache
    from cloister.runtime.prompt import decoded

    engine, rows = Engine(bundle), []
    form = engine.bundle.manifest.media
    assert form is not None
    page = Image.new("RGB", (640, 48), "white")
    ImageDraw.Draw(page).text((8, 8), LINE, "black", ImageFont.load_default(28))
    tone_N = np.sin(np.arange(4 * 16_000) * 0.1).astype(np.float32)
    with Vault.create(folder / "vault", Keyholder(keyfile=folder / "key")) as vault:
        cache = PrefixCache(engine, vault.namespace())
        for name, part in (("picture", ImagePart.of(np.asarray(page))), ("recording", Audio.of(
                tone_N, rate=16_000))):
            (message,) = decoded([Message(role="user", content=(part,))], form)
            (medium,) = message.media
            positions = engine.media(medium, cache)
            engine.extend(positions)
            cache.keep(positions)
            digest = positions[0].digest
            kept_ND = cache.fetch_media(digest)
            assert kept_ND is not None
            encode_s = median_s(
                lambda part=medium: encoded.encode(engine.program, form.of(part), part), repeats)
            back_s = median_s(lambda digest=digest: cache.fetch_media(digest), repeats)
            rows.append({"what": name, "vectors": len(kept_ND), "encode_s": encode_s,
                         "put_back_s": back_s, "times_faster": encode_s / back_s})
    return rows


def eight_bits(folder: Path) -> dict[str, Any]:
    """What KV state kept in 8 bits costs the answers of the shipped Nano-1: KL divergence of the
    tokens after a request that was put back, against the same put back exactly."""
    from cloister import reference
    from cloister.evaluate.divergence import compare
    from cloister.message import Message
    from cloister.runtime.engine import Engine
    from cloister.runtime.prefix import Precision, PrefixCache

    engine = Engine(reference.bundle_path("nano-1"))
    lines = reference.requests_path().read_text("utf-8").splitlines()
    pairs, sizes = [], {}
    with Vault.create(folder / "vault", Keyholder(keyfile=folder / "key")) as vault:
        for number, row in enumerate(map(json.loads, lines)):
            ids = engine.tokenizer.encode_chat([
                Message(role="system", content=row["system"]),
                Message(role="user", content=row["prompt"])])
            logits: dict[Precision, list[Any]] = {}
            answer: list[int] = []
            for precision in Precision:
                cache = PrefixCache(
                    engine, vault.namespace(precision), precision=precision)
                engine.truncate(0)
                engine.extend(ids)
                cache.keep(ids, b"%d" % number)
                engine.truncate(0)
                assert cache.resume(b"%d" % number) == len(ids)
                if not answer:  # greedy, by the exact one
                    for _ in range(24):
                        row_V = engine.extend([*ids, *answer])[0].clone()
                        logits.setdefault(precision, []).append(row_V)
                        answer.append(int(row_V.argmax()))
                else:
                    logits[precision] = [
                        engine.extend([*ids, *answer[:end]])[0].clone()
                        for end in range(len(answer))]
            pairs += [
                (exact[None], other[None]) for exact, other in zip(*logits.values(), strict=True)]
        for precision in Precision:
            sizes[str(precision)] = vault.namespace(precision).sizes()[Kind.PREFIX][1]
    found = compare(pairs)
    return {"bytes": sizes, "mean_kld": found.mean_kld, "max_kld": found.max_kld,
            "top1": found.top1, "n": found.n}


def full_size(folder: Path) -> Path:
    """A bundle of the full nano-1 shape with random weights."""
    from cloister import bench, pipeline
    from cloister.model.checkpoint import Checkpoint
    from cloister.model.config import ModelConfig
    from cloister.model.recipe import Recipe
    from cloister.tiers import Scale, ladder

    source, out = folder / "random", folder / "nano-1.cloister"
    shape = ladder(Scale.FULL)["nano-1"]
    bench.random_checkpoint(source, ModelConfig(shape=shape), Recipe.parse("8da4w-g32"))
    pipeline.export(Checkpoint.open(source), out)
    return out


def show(name: str, found: Any) -> None:
    """A table of one part, as soon as it is measured."""
    if name == "seal_gb_per_s":
        display.table("Sealing 100 MB", ("", "GB/s"), [
            (which, f"{value:.2f}") for which, value in found.items()])
    elif name == "records_per_s":
        display.table(
            f"Records of {RECORD} bytes a second (SQLite {sqlite3.sqlite_version}, WAL, NORMAL)",
            ("", "new", "written again", "read"),
            [(which, *(f"{rate:,.0f}" for rate in row.values()))
             for which, row in found.items()])
    elif name == "eight_bits":
        display.table("KV state in 8 bits, against float32", ("", "measured"), [
            ("size", f"{found['bytes']['int8'] / found['bytes']['float32']:.2f}"),
            ("mean KL divergence", f"{found['mean_kld']:.2g} nats"),
            ("maximum", f"{found['max_kld']:.2g} nats"), ("same token", f"{found['top1']:.2%}")])
    elif name == "media":
        display.table("Pictures and recordings", (
            "", "vectors", "encoded in", "put back in", "times faster"), [
            (row["what"], str(row["vectors"]), f"{1000 * row['encode_s']:.2f} ms",
             f"{1000 * row['put_back_s']:.3f} ms", f"{row['times_faster']:.0f}") for row in found])
    else:
        display.table(
            "A kept prefix", ("tokens", "read", "kept in", "put back in", "first token",
                              "times faster", "keeping, of reading"),
            [(str(row["tokens"]), *(f"{row[key]:.3f} s" for key in (
                "read_s", "keep_s", "restore_s", "first_token_s")),
              f"{row['times_faster']:.0f}", f"{row['keep_share']:.1%}") for row in found])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path)
    parser.add_argument("--media", type=Path)
    parser.add_argument("--only", help="one part, by its name in --json")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch, display.quiet(debug=False) as console:
        folder = Path(scratch)
        for name in ("records", "prefixes", "bits", "media"):
            (folder / name).mkdir()
        os.environ["CLOISTER_HOME"] = scratch
        assert Settings.from_environment().home == folder
        parts: dict[str, Callable[[], Any]] = {
            "seal_gb_per_s": lambda: sealing(given.repeats),
            "records_per_s": lambda: records(folder / "records", given.repeats),
            "eight_bits": lambda: eight_bits(folder / "bits"),
            "prefix": lambda: prefixes(
                given.bundle or full_size(folder), folder / "prefixes", given.repeats),
        }
        if given.media:
            parts["media"] = lambda: media(given.media, folder / "media", given.repeats)
        if given.only:
            parts = {given.only: parts[given.only]}
        found: dict[str, Any] = {}
        for name, part in parts.items():
            console.print(f"measuring: {name}")
            found[name] = part()
            if not given.json:
                show(name, found[name])
    if given.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
