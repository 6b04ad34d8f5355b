"""The import of an encoder alone, Whisper's, into the file of a sense."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cloister.errors import CheckpointError, OutputExists, TensorMismatch
from cloister.model import ctranslate2, huggingface, media_import, media_names, sense_file
from cloister.model.checkpoint import check_finite
from cloister.model.front import MelShape
from cloister.model.processors import recording_settings
from cloister.model.sense import SenseConfig
from cloister.model.sense_file import SenseFile
from cloister.model.shards import Stored, read_json, shards
from cloister.progress import silent

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import torch

    from cloister.model.tensor_file import Plan
    from cloister.progress import Progress

__all__ = ["import_encoder"]


def import_encoder(
    source: Path, out: Path, *, replace: bool = False, progress: Progress = silent
) -> SenseFile:
    """Read the encoder of the Whisper model in the directory `source` into the file `out`.

    That of transformers' layout, or CTranslate2's. Weights keep their type. It has no projector
    yet, so its vectors are those of the encoder.

    Raises:
        UnsupportedFeature, CheckpointError: see `media_import.read` and `ctranslate2.encoder`.
        TensorMismatch: a tensor is missing, unexpected, or of another shape or type.
        NonFiniteTensor: a tensor has a NaN or infinite entry.
        OutputExists: `out` is there and `replace` is false, or it is no sense.
    """
    if out.exists():
        if not replace:
            raise OutputExists(f"Output {out.name} exists already; name another or pass --force.")
        SenseFile.open(out)  # or it is another's file, and stays
    config, stored = _read(source)
    planned = _planned(config, stored, source)

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        for done, name in enumerate(planned):
            progress("import", done, len(planned))
            value = stored[name].read()
            check_finite(value, stored[name].key, source)
            yield name, value

    sense_file.write(out, config, tensors(), planned)
    return SenseFile.open(out)


def _read(source: Path) -> tuple[SenseConfig, dict[str, Stored]]:
    if (source / ctranslate2.NAME).exists():
        shape, found = ctranslate2.encoder(source / ctranslate2.NAME)
        mel = MelShape(bins=shape.rows)  # what CTranslate2's users compute where nothing is said
        if (source / "preprocessor_config.json").exists():
            mel, _ = recording_settings(source)
        return SenseConfig(encoder=shape, mel=mel), {
            f"encoder.{name}": each for name, each in found.items()}
    record = read_json(source / "config.json")
    names = record.get("architectures")
    name = names[0] if isinstance(names, list) and names else "an unnamed one"
    if name not in media_import.ENCODERS:
        raise CheckpointError(
            f"{source.name} has the architecture {str(name)[:80]}; an encoder alone is read of "
            f"{' and '.join(media_import.ENCODERS)}, so name a directory as the output.")
    config = media_import.read_encoder(record, source)
    return config, huggingface.stored(shards(source), _name_of)


def _name_of(key: str) -> str | None:
    owner, name = media_names.name_of(key) or (None, "")
    if owner is None:
        return None
    return name if owner == "audio" else f"{key} (unknown)"


def _planned(config: SenseConfig, stored: dict[str, Stored], source: Path) -> Plan:
    if config.encoder.layers > len(stored):  # before a module is made for each
        raise TensorMismatch(
            f"{source.name} has {len(stored)} tensors, and its configuration says "
            f"{config.encoder.layers} layers; copy it again.")
    planned: Plan = {}
    wanted = sense_file.plan(config)
    for name in sorted(set(stored) - set(wanted)):
        raise TensorMismatch(
            f"{source.name} has tensor {stored[name].key[:80]}, which Cloister or its "
            "configuration does not know, so it cannot be imported.")
    for name, (_, shape) in wanted.items():
        each = stored.get(name)
        if each is None or each.dtype is None or each.shape != shape:
            is_ = "missing" if each is None else f"{each.kind}{list(each.shape)}"
            raise TensorMismatch(
                f"Tensor {name} of {source.name} is {is_}, and F32, F16 or BF16 of {list(shape)} "
                "is wanted; copy it again.")
        planned[name] = each.dtype, shape
    return planned
