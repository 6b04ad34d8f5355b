"""One shape of random weights by Cloister and by other runtimes, in turns, in one run."""

from __future__ import annotations

import json
import shutil
import statistics
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cloister.backend import CLOISTER, XNNPACK
from cloister.bench.bare import export_apart
from cloister.bench.measured import measure
from cloister.bench.weights import random_checkpoint, random_gguf, random_transformers
from cloister.errors import SettingError, WorkerError
from cloister.evaluate import peers
from cloister.evaluate.speed import POSITIONS, PREFILLS, STEPS
from cloister.export import write
from cloister.model.config import ModelConfig
from cloister.model.recipe import Recipe
from cloister.progress import silent
from cloister.settings import processor, processors
from cloister.tiers import ladder

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from cloister.progress import Progress
    from cloister.tiers import Scale, Shape, Tier

__all__ = ["NAMES", "OURS", "Model", "check_names", "compare", "figures"]

OURS = CLOISTER.name
_STOCK = "executorch"  # ExecuTorch's own way with the same weights: our backend `xnnpack`
NAMES = (_STOCK, *peers.PEERS)
_SOURCE = "checkpoint"


def check_names(text: str) -> list[str]:
    """Return the names in a list with commas, each once.

    Raises:
        SettingError: an unknown one, or none.
    """
    names = list(dict.fromkeys(name.strip() for name in text.split(",")))
    for name in names:
        if name not in NAMES:
            raise SettingError(f"No peer is named {name!r}; choose of {', '.join(NAMES)}.")
    return names


@dataclass(frozen=True, kw_only=True)
class Model:
    """What is measured."""

    tier: Tier
    scale: Scale
    recipe: str
    kv: str | None = None  # of Cloister's own program

    @property
    def name(self) -> str:
        """Of a folder."""
        return f"{self.tier}-{self.scale}-{self.recipe}"


def compare(
    model: Model, names: Sequence[str], *, python: str, turns: int, keep: Path | None = None,
    progress: Progress = silent, debug: bool = False,
) -> dict[str, Any]:
    """Measure Cloister and each of `names` in turns, every time in a new process.

    The peers that are no part of ExecuTorch run in the interpreter `python`. What is not installed
    or fails is said in `left_out`, and the others go on. Models of the peers in `keep` are taken
    from there, with what converting them took, and others are put there.

    Raises:
        SettingError: no turn, `python` is no interpreter, or no peer is installed.
        WorkerError: Cloister's own process failed.
    """
    if turns < 1:
        raise SettingError(f"turns is {turns}; it must be at least 1.")
    installed: dict[str, Any] = {_STOCK: {"executorch": write.release()}}
    left_out: dict[str, str] = {}
    for name in names:
        if name != _STOCK:
            found = _tried(name, left_out, partial(peers.versions, peers.PEERS[name], python))
            if found is not None and (said := peers.missing(found)):
                left_out[name] = said
            installed[name] = found
    wanted = [name for name in names if name not in left_out]
    if not wanted:
        raise SettingError("None of the peers can run here: " + "; ".join(
            f"{name}: {said.rstrip('.')}" for name, said in left_out.items()) + ".")
    shape = ladder(model.scale)[model.tier]
    with _folder(keep) as folder:
        made = _Models(
            folder / model.name, shape, model.recipe, model.kv, python, debug)
        converted: dict[str, Any] = {}
        for name in (OURS, *wanted):
            progress("convert", len(converted), len(wanted) + 1, name)
            found = _tried(name, left_out, partial(made.model, name))
            if found is not None:
                converted[name] = found
        made.clean()
        measured = _measured(made, converted, turns, left_out, progress)
        return {
            "shape": str(model.tier), "size": str(model.scale), "recipe": model.recipe,
            "parameters": shape.parameters, "processor": processor(), "threads": processors(),
            "instruction_set": measured[OURS][0]["instruction_set"],
            "bandwidth_bytes_per_s": [turn["bandwidth_bytes_per_s"] for turn in measured[OURS]],
            "versions": {name: installed[name] for name in wanted},
            "systems": {name: made.system(name) for name in measured
                        if name in peers.PEERS and peers.PEERS[name].tells_system},
            "left_out": left_out, "turns": turns, "converted": converted, "measured": measured,
            "figures": figures(converted, measured),
        }


def _tried(name: str, left_out: dict[str, str], call: Callable[[], Any]) -> Any:
    """Return what `call` returns, or say in `left_out` why a peer failed, and return None."""
    try:
        return call()
    except WorkerError as error:
        if name == OURS:
            raise
        left_out[name] = str(error)
        return None


def _measured(
    made: _Models, converted: dict[str, Any], turns: int, left_out: dict[str, str],
    progress: Progress
) -> dict[str, list[dict[str, Any]]]:
    """Return what each turn found of each subject that ended them all."""
    measured: dict[str, list[dict[str, Any]]] = {name: [] for name in converted}
    for turn in range(turns):
        for name in converted:
            if name in left_out:
                continue
            progress("measure", turn, turns, name)
            found = _tried(name, left_out, partial(made.measure, name))
            if found is not None:
                measured[name].append(found)
    return {name: each for name, each in measured.items() if name not in left_out}


@contextmanager
def _folder(keep: Path | None) -> Iterator[Path]:
    if keep is not None:
        yield keep
        return
    with tempfile.TemporaryDirectory() as scratch:
        yield Path(scratch)


class _Models:
    """The models of one shape in a folder, each made once but Cloister's own."""

    def __init__(
        self, folder: Path, shape: Shape, recipe: str, kv: str | None, python: str, debug: bool
    ) -> None:
        self._folder, self._shape, self._recipe, self._kv = folder, shape, recipe, kv
        self._python, self._debug = python, debug
        folder.mkdir(parents=True, exist_ok=True)

    def model(self, name: str) -> dict[str, Any]:
        """Make the model of a subject, unless it is there; return what that took and its size.

        Raises:
            WorkerError: the process failed.
        """
        path, record = self._path(name), self._folder / f"{name}.json"
        if name == OURS:  # what is on trial is not taken from an earlier run
            self._remove(path)
            record.unlink(missing_ok=True)
        if not record.exists():
            self._remove(path)
            record.write_text(json.dumps(self._make(name, path)) + "\n")
        found: dict[str, Any] = json.loads(record.read_text())
        files = [path] if path.is_file() else list(path.iterdir())
        return {**found, "model_bytes": sum(each.stat().st_size for each in files)}

    def system(self, name: str) -> str:
        """Return which instructions a peer was built to use."""
        return str(peers.run(peers.PEERS[name], self._python, "about")["system"])

    def measure(self, name: str) -> dict[str, Any]:
        """Measure a subject in a new process."""
        path, shape = self._path(name), self._shape
        if name in (OURS, _STOCK):
            return measure(path, debug=self._debug)
        prefills = [length for length in PREFILLS if length <= shape.context]
        positions = [place for place in POSITIONS if place + STEPS <= shape.context]
        return peers.run(
            peers.PEERS[name], self._python, "speed", str(path), *map(
                json.dumps, (shape.context, processors(), prefills, positions, STEPS)),
            debug=self._debug)

    def clean(self) -> None:
        """Remove the weights that models were made of."""
        for name in (_SOURCE, "transformers"):
            self._remove(self._folder / name)

    def _path(self, name: str) -> Path:
        ending = ".cloister" if name in (OURS, _STOCK) else ""
        return self._folder / f"{name}{ending}"

    def _make(self, name: str, path: Path) -> dict[str, Any]:
        if name in (OURS, _STOCK):
            source = self._source(_SOURCE, lambda out: random_checkpoint(
                out, ModelConfig(shape=self._shape), Recipe.parse(self._recipe)))
            backend, kv = (OURS, self._kv) if name == OURS else (XNNPACK.name, None)
            return export_apart(backend, source, path, kv=kv, debug=self._debug)
        if peers.PEERS[name].reads_gguf:
            random_gguf(path, self._shape)
            return {}  # nothing is converted
        source = self._source("transformers", lambda out: random_transformers(out, self._shape))
        return peers.run(peers.PEERS[name], self._python, "convert", str(source), str(path),
                         debug=self._debug)

    def _source(self, name: str, write: Callable[[Path], None]) -> Path:
        path = self._folder / name
        if not path.exists():
            write(path)
        return path

    def _remove(self, path: Path) -> None:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def figures(
    converted: dict[str, Any], measured: dict[str, list[dict[str, Any]]]
) -> dict[str, dict[str, Any]]:
    """Return every figure by name: its median of each subject, and what ours is of each peer's.

    A ratio is the median of those of turns, beside the lowest and the highest.
    """
    turns = {name: [_flat(turn, converted[name]) for turn in each]
             for name, each in measured.items()}
    found: dict[str, dict[str, Any]] = {}
    for figure in turns[OURS][0]:
        values = {name: [turn[figure] for turn in each] for name, each in turns.items()
                  if figure in each[0]}
        ratios = {name: [ours / theirs for ours, theirs in zip(
            values[OURS], each, strict=True)] for name, each in values.items() if name != OURS}
        found[figure] = {
            "median": {name: statistics.median(each) for name, each in values.items()},
            "ratio": {name: {"median": statistics.median(each), "lowest": min(each),
                             "highest": max(each)} for name, each in ratios.items()},
        }
    return found


def _flat(turn: dict[str, Any], converted: dict[str, Any]) -> dict[str, float]:
    """Return the figures of a turn by name."""
    return {
        **{name: converted[name] for name in ("convert_s", "convert_peak_bytes", "model_bytes")
           if name in converted},
        "load_and_first_token_s": turn["load_s"] + turn["first_token_s"],
        "memory_bytes": turn["anon_bytes"] - turn["empty_bytes"],
        **{f"{kind} {place}": value for kind, key in (
            ("prefill", "prefill_tokens_per_s"), ("decode", "decode_tokens_per_s"))
           for place, value in turn[key].items()},
    }
