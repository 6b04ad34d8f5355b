"""Figures of a bundle, out of its manifest and its receipt. What a receipt lacks is None or empty.

A receipt is a file of others: what is not of the type that is expected is not there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cloister.errors import SettingError
from cloister.model.recipe import Recipe

if TYPE_CHECKING:
    from collections.abc import Mapping

    from cloister.bundle import Bundle
    from cloister.manifest import Manifest

__all__ = ["KINDS", "NOT_RECORDED", "Divergence", "divergence", "facts", "part", "scores", "sizes"]

NOT_RECORDED = "not in this receipt"
KINDS = ("attention", "feed-forward", "norms", "other")
_MOST_ROWS = 16  # of layers, which are all of one size
_Sizes = list[tuple[str, tuple[float, ...]]]


def sizes(manifest: Manifest) -> _Sizes:
    """Return the bytes of each layer by KINDS, and of what is around the layers.

    Weights are counted by shape and recipe, scales included. The rest of the program are its graph,
    rotary tables and paddings. The rows add up to the bundle, its manifest apart.
    """
    shape, norms = manifest.shape, 4 * manifest.shape.hidden_size
    hidden, q = shape.hidden_size, shape.heads * shape.head_size
    kv, wide = shape.kv_heads * shape.head_size, shape.feed_forward
    program = manifest.files[manifest.programs[0].file].size
    others = ("tokenizer and other files", (0.0, 0.0, 0.0, manifest.size_bytes - program))
    try:
        recipe = Recipe.parse(manifest.recipe)
        attention = sum(recipe.body.size_bytes(*each) for each in (
            (q, hidden), (kv, hidden), (kv, hidden), (hidden, q)))
        feed = 2 * recipe.body.size_bytes(wide, hidden) + recipe.down.size_bytes(hidden, wide)
    except SettingError:  # of another release
        return [("program", (0.0, 0.0, 0.0, program)), others]
    layer = (float(attention), float(feed), 2.0 * norms, 0.0)
    alone = shape.layers <= _MOST_ROWS
    rows: _Sizes = [(f"layer {number}", layer) for number in range(1, shape.layers + 1)] if alone \
        else [(f"{shape.layers} layers", tuple(each * shape.layers for each in layer))]
    embedding = recipe.embedding.size_bytes(shape.vocab_size, hidden)
    head = recipe.head.size_bytes(shape.vocab_size, hidden)
    encoders: _Sizes = [(each.method.replace("_", " "), (0.0, 0.0, 0.0, float(each.weight_bytes)))
                        for each in manifest.programs[0].encoders]
    rest = program - embedding - head - norms - shape.layers * sum(layer) - sum(
        sum(each) for _, each in encoders)
    if rest < 0:  # the program holds less than the shape says
        return [("program", (0.0, 0.0, 0.0, program)), others]
    return [("embedding", (0.0, 0.0, 0.0, embedding)), *rows,
            ("head", (0.0, 0.0, norms, head)), *encoders,
            ("rest of the program", (0.0, 0.0, 0.0, rest)), others]


@dataclass(frozen=True, kw_only=True)
class Divergence:
    """The divergence of a program from its checkpoint, nats a token; None where it is not told."""

    n: int | None
    mean: float | None
    mean_error: float | None
    quantiles: tuple[tuple[str, float | None], ...]
    top1: float | None
    top1_error: float | None
    histogram: tuple[tuple[str, int], ...]  # tokens by the power of ten


def divergence(receipt: Mapping[str, object]) -> Divergence:
    """Return what the receipt says of the program's divergence."""
    said = part(receipt, "program_against_checkpoint")
    quantiles = tuple((name, _number(said, key)) for name, key in (
        ("median", "median_kld"), ("mean", "mean_kld"), ("1 in 100 above", "p99_kld"),
        ("1 in 1,000 above", "p999_kld"), ("largest", "max_kld")))
    n = _number(said, "n")
    return Divergence(
        n=None if n is None else int(n), mean=_number(said, "mean_kld"),
        mean_error=_number(said, "mean_kld_se"), quantiles=quantiles, top1=_number(said, "top1"),
        top1_error=_number(said, "top1_se"), histogram=_histogram(said))


def scores(receipt: Mapping[str, object]) -> tuple[dict[str, float], dict[str, float]]:
    """Return every recorded score, by `EVALUATION.NAME`, and the standard errors of some.

    What pictures and recordings say, as text, is there to be compared with alone.
    """
    values: dict[str, float] = {}
    errors: dict[str, float] = {}
    evaluations = part(receipt, "evaluations")
    for name in evaluations:
        if name.endswith(", written"):
            continue
        each = part(evaluations, name)
        for found, key in ((values, "metrics"), (errors, "errors")):
            record = part(each, key)
            for score in record:
                if (value := _number(record, score)) is not None:
                    found[f"{name}.{score}"] = value
    return values, errors


def facts(bundle: Bundle) -> list[tuple[str, str]]:
    """Return names and values: what the bundle is, where it is from, how it was checked."""
    manifest, receipt = bundle.manifest, bundle.receipt()
    lost = divergence(receipt)
    proof, parent = part(receipt, "parts_against_checkpoint"), part(receipt, "against_parent")
    weights = part(receipt, "weights")
    backends = ", ".join(f"{each.backend} (operators {each.operator_abi})"
                         for each in manifest.programs)
    return [
        ("tier", manifest.name),
        ("weights", f"{manifest.shape.parameters:,}, embedding and head apart"),
        ("recipe", manifest.recipe),
        ("context", f"{manifest.context:,} tokens"),
        ("bundle", f"{manifest.size_bytes:,} bytes"),
        ("backend", f"{backends}, ExecuTorch {manifest.executorch}"),
        ("origin of the weights", _origin(weights)),
        ("checkpoint", manifest.parent[:16]),
        ("model id", bundle.model_id(manifest.programs[0])[:16]),
        ("measured on", _text(receipt.get("measured_on"))),
        ("checked on", NOT_RECORDED if lost.n is None else f"{lost.n:,} tokens"),
        ("mean KL divergence", _with_error(lost.mean, lost.mean_error, ".2g", " nats a token")),
        ("same most likely token", _with_error(lost.top1, lost.top1_error, ".2%")),
        ("proof by parts", _proof(proof)),
        ("against the unquantized parent", _parent(parent)),
    ]


def part(record: Mapping[str, object], name: str) -> Mapping[str, object]:
    """Return the object called `name` in a record; an empty one where there is none."""
    found = record.get(name)
    return found if isinstance(found, dict) else {}


def _number(record: Mapping[str, object], name: str) -> float | None:
    value = record.get(name)
    plain = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if plain and math.isfinite(value) else None  # type: ignore[arg-type]


def _histogram(said: Mapping[str, object]) -> tuple[tuple[str, int], ...]:
    counts = part(said, "histogram")
    return tuple((name, int(value)) for name in counts
                 if (value := _number(counts, name)) is not None and value >= 0)


def _text(value: object) -> str:
    return value if isinstance(value, str) and value else NOT_RECORDED


def _with_error(value: float | None, error: float | None, form: str, unit: str = "") -> str:
    if value is None:
        return NOT_RECORDED
    return f"{value:{form}}{'' if error is None else f' ± {error:{form}}'}{unit}"


def _origin(weights: Mapping[str, object]) -> str:
    if weights.get("origin", NOT_RECORDED) is None:
        return "trained with Cloister, not imported"
    origin = part(weights, "origin")
    types = part(origin, "types")
    held = ", ".join(f"{types[name]} tensors in {name}" for name in types)
    return f"{_text(origin.get('format'))}{f': {held}' if held else ''}"


def _proof(proof: Mapping[str, object]) -> str:
    parts, held = _number(proof, "parts"), _number(proof, "constants_bytes")
    if parts is None:
        return NOT_RECORDED
    return f"{parts:,.0f} parts compute what the checkpoint's do" + (
        "" if held is None else f", {held:,.0f} bytes of weights are the checkpoint's")


def _parent(parent: Mapping[str, object]) -> str:
    program, checkpoint = (
        _number(part(parent, name), "mean_kld") for name in ("program", "checkpoint"))
    if program is None or checkpoint is None:
        reason = parent.get("reason")
        return f"not measured: {reason}" if isinstance(reason, str) else NOT_RECORDED
    return f"{program:.2g} nats a token, its checkpoint {checkpoint:.2g}"
