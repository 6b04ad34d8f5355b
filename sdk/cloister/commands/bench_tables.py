"""The tables of `cloister bench --against` and `--profile`: title, columns, rows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cloister.display import bytes_text

if TYPE_CHECKING:
    from cloister.commands.options import Record

    Table = tuple[str, tuple[str, ...], list[tuple[str, ...]]]

__all__ = ["against", "profile"]

_NAMES = {
    "convert_s": "export or conversion", "convert_peak_bytes": "... its peak memory",
    "model_bytes": "model", "load_and_first_token_s": "load and first token",
    "memory_bytes": "anonymous memory above an empty process",
}


def against(record: Record) -> tuple[Table, Table]:
    """Return the tables of a record of `cloister.bench.against.compare`: medians, and ratios."""
    figures: dict[str, Any] = record["figures"]
    names = list(record["measured"])
    ours, *others = names
    read = record["bandwidth_bytes_per_s"]
    title = (
        f"{record['shape']} ({record['size']}), random weights, on {record['processor']}, "
        f"{record['threads']} threads, {record['instruction_set']}, memory read at "
        f"{min(read) / 1e9:.1f} to {max(read) / 1e9:.1f} GB/s: medians of {record['turns']} turns")
    for name, system in record["systems"].items():
        title += f"; {name} is built with {system}"
    if "executorch" in names:
        title += f"; executorch is its XNNPACK lowering of the same {record['recipe']} weights"
    labels = {figure: _NAMES.get(figure) or f"{figure}, tokens/s" for figure in figures}
    return (
        (title, ("", *names), [
            (labels[figure], *(_value(figure, found["median"].get(name)) for name in names))
            for figure, found in figures.items()]),
        (f"{ours} / other: median of turns, lowest to highest", ("", *others), [
            (labels[figure], *(_ratio(found["ratio"].get(name)) for name in others))
            for figure, found in figures.items()]),
    )


def _ratio(found: dict[str, float] | None) -> str:
    if found is None:
        return ""
    apart = found["lowest"] < found["highest"]
    return ("{median:.2f} ({lowest:.2f} to {highest:.2f})" if apart else "{median:.2f}").format(
        **found)


def _value(figure: str, value: float | None) -> str:
    if value is None:
        return ""
    if figure.endswith("_bytes"):
        return bytes_text(value)
    return f"{value:.2f} s" if figure.endswith("_s") else f"{value:.1f}"


def profile(record: Record) -> Table:
    """Return the table of a record of `cloister.evaluate.profile.measure`."""
    columns = {f"{label} {place}": found
               for label, key in (("prefill", "prefill_s"), ("decode at", "decode_s"))
               for place, found in record[key].items()}
    kinds = list(next(iter(columns.values())))
    title = (f"{record.get('bundle') or record['shape']}, {record['instruction_set']}: "
             "milliseconds by operator")
    return title, ("operator", *columns), [
        (kind, *(f"{found[kind] * 1e3:.3g} ({found[kind] / found['all']:.0%})"
                 for found in columns.values())) for kind in kinds]
