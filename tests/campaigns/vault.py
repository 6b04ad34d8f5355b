"""Long trials of the vault, each one command that prints its seed and what it found:

    python tests/campaigns/vault.py kills   [--count 10000] [--seed N]
    python tests/campaigns/vault.py flips   [--count 100000]
    python tests/campaigns/vault.py damage  [--count 20000]
    python tests/campaigns/vault.py faults
    python tests/campaigns/vault.py crowd   [--processes 8] [--count 10000]
    python tests/campaigns/vault.py seals   [--count 10000000] [--processes 8]
    python tests/campaigns/vault.py rotate  [--gigabytes 10]

`tests/unit/vault/test_campaigns.py` runs each of them for a short while.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import errno
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from cloister.errors import CloisterError, NotEnoughDisk, VaultError
from cloister.vault import seal
from cloister.vault.keys import Keyholder
from cloister.vault.namespace import Kind
from cloister.vault.store import Vault

Found = dict[str, Any]


def opened(folder: Path) -> Vault:
    holder = Keyholder(keyfile=folder / "key")
    path = folder / "vault"
    return Vault(path, holder) if path.exists() else Vault.create(path, holder)


def content(number: int) -> bytes:
    return b"%d " % number * (1 + number % 300)


def kills(folder: Path, count: int, seed: int) -> Found:
    """Kill a writing process at random moments: nothing that was acknowledged is lost.

    Seven in eight once it has the vault open. What a killed process wrote the system still has, so
    this says nothing of a power cut.
    """
    rng, said, cut = random.Random(seed), 0, 0
    opened(folder).close()
    for _ in range(count):
        here, there = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(here)
            write_on(folder, there, said, rng.randrange(1 << 30))
        os.close(there)
        with os.fdopen(here, "rb") as pipe:
            if rng.randrange(8):
                assert pipe.readline() == b"%d\n" % said
            time.sleep(rng.random() * 0.06)
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            lines = pipe.read().split(b"\n")[:-1]
        acknowledged = int(lines[-1]) if lines else said
        with opened(folder) as vault:
            space = vault.namespace()
            talk = space.records(Kind.HISTORY, b"talk")
            assert [content(number) for number in range(len(talk))] == talk
            assert acknowledged <= len(talk) <= acknowledged + 1, (acknowledged, len(talk))
            for number in range(8):
                blob = space.get_large(Kind.PREFIX, b"%d" % number)
                assert blob is None or blob == content(int(blob.split(b" ")[0]))
            cut += len(talk) > acknowledged
            said = len(talk)
            if said > 400:
                space.forget(Kind.HISTORY, b"talk")
                said = 0
    return {"kills": count, "between commit and word of it": cut}


def write_on(folder: Path, pipe: int, start: int, seed: int) -> None:
    """Write until killed, and say after each message how many there are."""
    rng = random.Random(seed)
    try:
        vault = opened(folder)
        space = vault.namespace()
        os.write(pipe, b"%d\n" % start)
        for number in range(start, 1 << 30):
            space.append(Kind.HISTORY, b"talk", [content(number)])
            os.write(pipe, b"%d\n" % (number + 1))
            space.put_large(Kind.PREFIX, b"%d" % rng.randrange(8), [content(number)])
            if number % 7 == 0:
                space.forget(Kind.PREFIX, b"%d" % rng.randrange(8))
            if number % 50 == 49:
                vault.rotate()
    finally:
        os._exit(1)


def flips(count: int, seed: int) -> Found:
    """Flip every bit of a small object of each kind, and `count` random ones of a large one."""
    rng, key, small = random.Random(seed), seal.new_key(), 0
    for kind in Kind:
        place = seal.context("record", bytes(16), bytes(16), kind, 1, bytes(32), 0, 1)
        sealed = seal.seal_record(key, place, b"a message of kind %d" % kind)
        for bit in range(8 * len(sealed)):
            changed = bytearray(sealed)
            changed[bit // 8] ^= 1 << bit % 8
            small += refused(lambda c=bytes(changed), p=place: seal.open_record(key, p, c))
    size = 200_000
    whole = bytearray().join(
        bytes(piece) for piece in seal.seal_parts(key, b"large", [rng.randbytes(size)]))
    target, large = memoryview(bytearray(size)), 0
    for _ in range(count):
        bit = rng.randrange(8 * len(whole))
        whole[bit // 8] ^= 1 << bit % 8
        target[:1] = target[-1:] = b"\1"
        large += refused(lambda: seal.open_into(key, b"large", [whole], target))
        assert bytes(target).count(0) == size
        whole[bit // 8] ^= 1 << bit % 8
    seal.open_into(key, b"large", [whole], target)
    return {"bits of small objects": small, "of a large one": large}


def damage(folder: Path, count: int, seed: int) -> Found:
    """Flip bits of a vault's files, cut them, and put one in the place of another: what opens is
    what was written."""
    rng = random.Random(seed)
    wanted = {}
    with opened(folder) as vault:
        for name in ("default", "other"):
            space = vault.namespace(name)
            for number in range(3):
                said = [b"%d " % n * rng.randrange(1, 200) for n in range(4)]
                space.append(Kind.HISTORY, b"%d" % number, said)
                space.put_large(Kind.PREFIX, b"%d" % number, said)
                wanted[name, number] = said
    whole = {path: path.read_bytes() for path in (folder / "vault").rglob("*") if path.is_file()}
    whole[folder / "key"] = (folder / "key").read_bytes()
    full = [path for path, held in whole.items() if held]
    found = {"refused": 0, "opened, and all as it was": 0, "opened, and a part refused": 0}
    for _ in range(count):
        path, other = rng.choice(full), rng.choice(full)
        changed = bytearray(whole[path])
        how = rng.randrange(4)
        if how == 0:
            del changed[rng.randrange(len(changed)):]
        elif how == 1:
            changed = bytearray(whole[other])
        else:
            for _ in range(rng.choice((1, 1, 8))):
                changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
        path.write_bytes(changed)
        lost = 0
        try:
            with opened(folder) as vault:
                for (name, number), said in wanted.items():
                    space, key = vault.namespace(name), b"%d" % number
                    for read, right in (
                        (space.records, said), (space.get_large, b"".join(said))
                    ):
                        kind = Kind.HISTORY if right is said else Kind.PREFIX
                        try:
                            assert read(kind, key) == right, "what was not written was read"
                        except CloisterError:
                            lost += 1
        except CloisterError:
            found["refused"] += 1
        else:
            found["opened, and a part refused" if lost else "opened, and all as it was"] += 1
        for each in (folder / "vault").rglob("*"):
            if each.is_file() and each not in whole:
                each.unlink()
        for each, held in whole.items():
            if not each.exists() or each.read_bytes() != held:
                each.write_bytes(held)
                each.chmod(0o600)
    return found


def refused(action: Any) -> int:
    try:
        action()
    except seal.InvalidTag:
        return 1
    raise AssertionError("a changed object was accepted")


SCRIPT = ("create", "append", "put", "large", "replace", "forget", "rotate", "shred", "close")


def step(vault: Vault, name: str) -> None:
    """One operation of the trial of faults."""
    space = vault.namespace()
    if name == "append":
        space.append(Kind.HISTORY, b"talk", [b"new"])
    elif name == "put":
        space.put(Kind.RESPONSES, b"a", b"new" * 300)
    elif name == "large":
        space.put_large(Kind.PREFIX, b"new", [b"new" * 30_000])
    elif name == "replace":
        space.put_large(Kind.PREFIX, b"kv", [b"new" * 30_000])
    elif name == "forget":
        space.forget(Kind.PREFIX, b"kv")
    elif name == "rotate":
        vault.rotate()
    elif name == "shred":
        space.shred(Kind.RESPONSES)
    elif name == "close":
        space.get(Kind.RESPONSES, b"a")
        vault.close()


def faults(folder: Path, seed: int) -> Found:
    """Make every write and sync of every operation fail in turn; needs the preloaded shim."""
    del seed
    shim = ctypes.CDLL(None)
    if not hasattr(shim, "fault_arm"):
        raise SystemExit(subprocess.call(
            [sys.executable, *sys.argv], env=os.environ | {"LD_PRELOAD": str(built(folder))}))
    shim.fault_count.restype = ctypes.c_long
    (folder / "before").mkdir()
    with opened(folder / "before") as vault:
        space = vault.namespace()
        space.append(Kind.HISTORY, b"talk", [b"old", b"older"])
        space.put(Kind.RESPONSES, b"a", b"old" * 300)
        space.put_large(Kind.PREFIX, b"kv", [b"old" * 30_000])
    tried: Found = {}
    for name in SCRIPT:
        for code in (errno.ENOSPC, errno.EIO):
            nth, left = 1, 1
            while left:
                place = folder / f"{name}-{code}-{nth}"
                left = one_fault(shim, place, name, nth, code)
                nth += 1
            tried[f"{name}, {errno.errorcode[code]}"] = nth - 2
    return tried


def one_fault(shim: Any, place: Path, name: str, nth: int, code: int) -> int:
    """Whether the `nth` write of an operation was there to fail."""
    if name == "create":
        place.mkdir()
        return one_creation(shim, place, nth, code)
    shutil.copytree(place.with_name("before"), place)
    vault, error = opened(place), None
    shim.fault_arm(str(place).encode(), ctypes.c_long(nth), code)
    try:
        step(vault, name)
    except (VaultError, NotEnoughDisk) as caught:
        error = caught
    hit = shim.fault_count() >= nth
    shim.fault_arm(b"", 0, 0)
    with contextlib.suppress(CloisterError):
        vault.close()
    with opened(place) as vault:  # readable, and each object old or new
        space = vault.namespace()
        talk = space.records(Kind.HISTORY, b"talk")
        assert talk[:2] == [b"old", b"older"]
        assert talk[2:] in ([], [b"new"])
        held = space.get(Kind.RESPONSES, b"a")
        blob = space.get_large(Kind.PREFIX, b"kv")
        assert held in (b"old" * 300, b"new" * 300) or (held is None and name == "shred")
        assert blob in (b"old" * 30_000, b"new" * 30_000) or (blob is None and name == "forget")
        if error is None and name == "append":
            assert len(talk) == 3, "a write was acknowledged and is not there"
        space.append(Kind.HISTORY, b"talk", [b"after"])
    shutil.rmtree(place)
    return hit


def one_creation(shim: Any, place: Path, nth: int, code: int) -> int:
    """The same of a vault's making: it is whole, or it is not there."""
    shim.fault_arm(str(place).encode(), ctypes.c_long(nth), code)
    with contextlib.suppress(VaultError, NotEnoughDisk):
        opened(place).close()
    hit = shim.fault_count() >= nth
    shim.fault_arm(b"", 0, 0)
    assert [path.name for path in place.glob("vault*")] in ([], ["vault"])
    with opened(place) as vault:
        vault.namespace().append(Kind.HISTORY, b"talk", [b"after"])
    return hit


def built(folder: Path) -> Path:
    """The shim, compiled."""
    library = folder / "fault.so"
    source = Path(__file__).with_name("fault.c")
    subprocess.run(
        ["cc", "-shared", "-fPIC", "-O1", "-o", str(library), str(source), "-ldl"], check=True)
    return library


def crowd(folder: Path, processes: int, count: int, seed: int) -> Found:
    """Several processes with mixed operations on the same objects: none is turned away."""
    opened(folder).close()
    context = multiprocessing.get_context("fork")
    began = time.perf_counter()
    group = [
        context.Process(target=one_of_many, args=(folder, number, count, seed))
        for number in range(processes)
    ]
    for process in group:
        process.start()
    for process in group:
        process.join()
    assert [process.exitcode for process in group] == [0] * processes
    with opened(folder) as vault:
        for number in range(processes):
            rows = vault.namespace().records(Kind.HISTORY, b"talk %d" % number)
            assert rows == [b"%d" % n for n in range(len(rows))]
    return {"operations": processes * count, "seconds": round(time.perf_counter() - began, 1)}


def one_of_many(folder: Path, number: int, count: int, seed: int) -> None:
    rng, said = random.Random(f"{seed} {number}"), 0
    with opened(folder) as vault:
        space = vault.namespace()
        for _ in range(count):
            name = b"%d" % rng.randrange(50)
            action = rng.randrange(8)
            if action < 2:
                space.put(Kind.RESPONSES, name, name * 50)
            elif action < 5:
                assert space.get(Kind.RESPONSES, name) in (None, name * 50)
            elif action == 5:
                space.put_large(Kind.PREFIX, name, [name * 2000])
            elif action == 6:
                assert space.get_large(Kind.PREFIX, name) in (None, name * 2000)
            elif rng.random() < 0.2:
                space.forget(Kind.PREFIX, name)
                if rng.random() < 0.1:
                    space.shred(Kind.RESPONSES)
                if rng.random() < 0.1:
                    with contextlib.suppress(VaultError):  # two rotations at once: one is refused
                        vault.rotate()
            else:
                space.append(Kind.HISTORY, b"talk %d" % number, [b"%d" % said])
                said += 1


def seals(count: int, processes: int, seed: int) -> Found:
    """Seal the same in forks of one process: no salt, and so no subkey, comes twice."""
    del seed
    import numpy

    key = seal.new_key()
    seal.seal_record(key, b"warm", b"")  # whatever the library keeps, before the fork

    def heads(number: int) -> bytes:
        return b"".join(seal.seal_record(key, b"x", b"")[:8] for _ in range(number))

    parts = []
    for _ in range(processes):
        here, there = os.pipe()
        if os.fork() == 0:
            with os.fdopen(there, "wb") as pipe:
                pipe.write(heads(count // processes))
            os._exit(0)
        os.close(there)
        parts.append(here)
    held = []
    for here in parts:
        with os.fdopen(here, "rb") as pipe:
            held.append(numpy.frombuffer(pipe.read(), dtype=numpy.uint64))
        os.wait()
    salts = numpy.concatenate(held)
    assert len(salts) == count // processes * processes
    assert len(numpy.unique(salts)) == len(salts), "a salt came twice"
    return {"seals": len(salts), "processes": processes}


def rotate(folder: Path, gigabytes: float, seed: int) -> Found:
    """Rotate the key of a large vault."""
    del seed
    size = 100_000_000
    with opened(folder) as vault:
        space = vault.namespace()
        for number in range(round(gigabytes * 1e9 / size)):
            space.put_large(Kind.PREFIX, b"%d" % number, [bytes(size)])
        before = {path.name: path.stat().st_mtime_ns
                  for path in (vault.directory / "segments").iterdir()}
        began = time.perf_counter()
        vault.rotate()
        seconds = time.perf_counter() - began
        after = {path.name: path.stat().st_mtime_ns
                 for path in (vault.directory / "segments").iterdir()}
        assert before == after
        assert space.get_large(Kind.PREFIX, b"0") == bytes(size)
    return {"gigabytes": gigabytes, "rotation seconds": round(seconds, 4)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trial", choices=(
        "kills", "flips", "damage", "faults", "crowd", "seals", "rotate"))
    parser.add_argument("--count", type=int)
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--gigabytes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 32))
    given = parser.parse_args()
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch).resolve()
        found = {
            "kills": lambda: kills(folder, given.count or 10_000, given.seed),
            "flips": lambda: flips(given.count or 100_000, given.seed),
            "damage": lambda: damage(folder, given.count or 20_000, given.seed),
            "faults": lambda: faults(folder, given.seed),
            "crowd": lambda: crowd(folder, given.processes, given.count or 10_000, given.seed),
            "seals": lambda: seals(given.count or 10_000_000, given.processes, given.seed),
            "rotate": lambda: rotate(folder, given.gigabytes, given.seed),
        }[given.trial]()
    print(json.dumps({"trial": given.trial, "seed": given.seed, **found,
                      "took_s": round(time.perf_counter() - began, 1)}))


if __name__ == "__main__":
    main()
