"""The import of models that others made: a directory or a file in, a checkpoint out."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from dataclasses import dataclass
from dataclasses import replace as changed
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from cloister.errors import (
    CheckpointError,
    SettingError,
    TensorMismatch,
    UnsupportedArchitecture,
)
from cloister.model import (
    gguf,
    gguf_file,
    gguf_tokens,
    huggingface,
    media_import,
    media_names,
    sense_file,
)
from cloister.model import tokens as spoken
from cloister.model.blocks import FileTypes
from cloister.model.checkpoint import (
    FORMAT,
    Checkpoint,
    Metadata,
    Origin,
    check_finite,
    plan,
)
from cloister.model.processors import Marks
from cloister.model.projector import ProjectorKind
from cloister.model.shards import passed_over, read_json, shards, weight_files
from cloister.model.writer import CheckpointWriter
from cloister.progress import silent

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping

    from cloister.model.config import ModelConfig
    from cloister.model.media_import import Multimodal
    from cloister.model.shards import Stored
    from cloister.model.tensor_file import Plan
    from cloister.model.tokens import Tokens
    from cloister.progress import Progress

__all__ = ["check", "import_model"]


@dataclass(frozen=True, kw_only=True)
class _Model:
    """What a directory or file holds, its weights not read yet."""

    name: str
    config: ModelConfig
    tokens: Callable[[], Tokens]
    stored: dict[str, Stored]  # by our names; those of a sense with its kind before them
    origin: Origin
    types: dict[str, str] | None = None  # of matrices whose blocks are kept
    media: Multimodal | None = None


def import_model(
    source: str | Path, out: str | Path, *, name: str | None = None, context: int | None = None,
    ignore: Collection[str] = (), keep_quantization: bool = False, replace: bool = False,
    progress: Progress = silent
) -> Checkpoint:
    """Read `source`, a Hugging Face directory or a GGUF file, into the checkpoint `out`.

    One tensor at a time. Weights keep their type; those that are quantized become float32, which
    holds them exactly, or with `keep_quantization` stay as they are: a GGUF file's own blocks,
    with which programs of Cloister's own operators compute. Pickles are never read: convert them
    to safetensors first. Fields of the configuration named in `ignore` are let through although
    Cloister does not know them. The checkpoint's `report` says what was read, and what was passed
    over.

    Raises:
        SettingError: the quantization of something else than a GGUF file is to be kept.
        UnsupportedArchitecture, UnsupportedFeature: see the module.
        TensorMismatch: a tensor is missing, unexpected, or of another shape or type.
        NonFiniteTensor: a tensor has a NaN or infinite entry.
        VocabularyMismatch: the tokenizer has ids beyond the embedding's rows.
        CheckpointError, OutputExists, NotEnoughDisk: see `CheckpointWriter`.
    """
    source = Path(source)
    model = _read(source, context, ignore, keep=keep_quantization)
    _check_tied(model)
    planned, tokens, done = _planned(model), model.tokens(), itertools.count()
    types = FileTypes(by_tensor=model.types or {})

    def read(tensor: str) -> torch.Tensor:
        progress("import", next(done), len(planned))
        value = model.stored[tensor].read()
        scheme = types.scheme_of(tensor.removesuffix(".blocks"))
        check_finite(
            value if scheme is None else scheme.scales(value), model.stored[tensor].key, source)
        return value

    senses, media = {}, model.media
    if media is not None:
        own = _without(f"{media.kind}.", planned)
        senses[media.kind] = partial(
            sense_file.write, config=media.sense, planned=own,
            tensors=((tensor, read(f"{media.kind}.{tensor}")) for tensor in own))
    with CheckpointWriter(
        out,
        metadata=Metadata(
            name=name or model.name, config=model.config, bos=tokens.bos, eos=tokens.eos,
            special_tokens=dict(tokens.special_tokens), origin=model.origin, types=model.types,
            recipe=None if model.types is None else types.name,
            media=None if media is None else media.formats(
                Marks(tokens.tokenizer, model.name), model.config.shape.context)),
        tensors=planned, tokenizer=tokens.tokenizer, template=tokens.template, replace=replace,
    ).with_senses(senses) as writer:
        for tensor in planned:
            writer.add(tensor, read(tensor))
    checkpoint = Checkpoint.open(out)
    checkpoint.report = model.origin
    return checkpoint


def check(source: Path) -> ModelConfig:
    """Return the configuration of `source`, or raise what an import of it would.

    As far as headers and configuration tell.
    """
    model = _read(source, None, ())
    if source.is_dir():
        spoken.check_there(source)
    _shared(model)
    _planned(model)
    return model.config


def _read(
    source: Path, context: int | None, ignore: Collection[str], *, keep: bool = False
) -> _Model:
    if source.is_file():
        return _gguf(source, context, ignore, keep=keep)
    if keep:
        raise SettingError(
            f"{source.name} is no GGUF file, and of no other is the quantization kept; import it "
            "without --keep-quantization.")
    return _directory(source, context, ignore)


def _directory(source: Path, context: int | None, ignore: Collection[str]) -> _Model:
    name = source.resolve().name
    if not (source / "config.json").exists():
        weight_files(source)  # says what the directory holds in place of a model
    record, media = read_json(source / "config.json"), None
    if record.get("format") == FORMAT and "architectures" not in record:
        raise CheckpointError(f"{name} is a Cloister checkpoint already; use it as it is.")
    _check_architecture(record, name)
    if _architecture(record) in media_import.ARCHITECTURES:
        media = media_import.read(record, source, ignore=ignore)
        record = media.text
    config = huggingface.configured(
        record, name, context=context, ignore=ignore,
        ignored=() if media is None else media.ignored)
    where = shards(source)
    gemma = config.post_norms
    stored = huggingface.stored(where, partial(huggingface.rename, gemma=gemma)) if (
        media is None) else _with_media(where, media, gemma=gemma)
    return _Model(
        name=name, config=config, stored=stored, media=media,
        tokens=lambda: spoken.read(source, config.shape.vocab_size),
        origin=_origin("safetensors", stored, ignore, passed_over(source, where.values())),
    )


def _architecture(record: Mapping[str, object]) -> str:
    names = record.get("architectures")
    return str(names[0]) if isinstance(names, list) and names else "an unnamed one"


def _check_architecture(record: Mapping[str, object], source: str) -> None:
    name = _architecture(record)
    known = (*huggingface.ARCHITECTURES, *media_import.ARCHITECTURES)
    if name in media_import.ENCODERS:
        raise UnsupportedArchitecture(
            f"{source} is a Whisper model, of which Cloister reads the encoder alone; name a file "
            "that ends in .safetensors as the output.")
    if name not in known:
        raise UnsupportedArchitecture(
            f"{source} has the architecture {name[:80]}; Cloister reads {', '.join(known)}, and of "
            "Whisper the encoder.")


def _with_media(
    where: Mapping[str, Path], media: Multimodal, *, gemma: bool
) -> dict[str, Stored]:
    """Return the tensors of decoder and sense by our names."""

    def name_of(key: str) -> str | None:
        found = media_names.name_of(key)
        if found is None:
            return None
        owner, name = found
        return huggingface.rename(name, gemma=gemma) if owner == "text" else f"{owner}.{name}"

    stored = huggingface.stored(where, name_of)
    matrix = f"{media.kind}.projector.linear.weight"
    if media.sense.projector is not None and matrix in stored and (
            media.sense.projector.kind is ProjectorKind.POOL):  # held by inputs, not by outputs
        each = stored[matrix]
        stored[matrix] = changed(
            each, shape=each.shape[::-1], read=lambda: each.read().T)
    return stored


def _gguf(
    source: Path, context: int | None, ignore: Collection[str], *, keep: bool
) -> _Model:
    header = gguf_file.read(source)
    stem = re.sub(r"(-\d{5}-of-\d{5})?\.gguf$", "", source.name)
    config = huggingface.configured(
        gguf.configuration(header), stem, context=context, ignore=ignore)
    gguf_tokens.check(header)
    stored = gguf.stored(header, keep=keep)
    return _Model(
        name=stem, config=config, stored=stored,
        tokens=lambda: gguf_tokens.read(header).checked(config.shape.vocab_size, stem),
        origin=_origin("gguf", stored, ignore),
        types=None if not keep else {
            name.removesuffix(".blocks"): each.kind for name, each in stored.items()
            if name.endswith(".blocks")},
    )


def _without(prefix: str, planned: Plan) -> Plan:
    """Take the tensors with `prefix` out of `planned`, and return them without it."""
    return {
        name.removeprefix(prefix): planned.pop(name)
        for name in list(planned) if name.startswith(prefix)}


def _origin(
    format_: str, stored: dict[str, Stored], ignore: Collection[str],
    others: tuple[str, ...] = ()
) -> Origin:
    return Origin(
        format=format_, types=dict(Counter(each.kind for each in stored.values())),
        passed_over=others, ignored=tuple(sorted(ignore)),
    )


def _check_tied(model: _Model) -> None:
    """Raise TensorMismatch unless both copies of a shared matrix are equal; drop the second."""
    head = _shared(model)
    if head is not None and not torch.equal(model.stored["embed.weight"].read(), head.read()):
        raise TensorMismatch(
            f"{model.name} says that embedding and head are one matrix, and they differ; set "
            "tie_word_embeddings to false in its config.json if they should."
        )


def _shared(model: _Model) -> Stored | None:
    """Return the second copy of a shared matrix, if there is one, and drop it.

    Of the two names safetensors keeps the head's alone where it stores the matrix once.
    """
    if not model.config.shape.tied or "head.weight" not in model.stored:
        return None
    head = model.stored.pop("head.weight")
    return None if model.stored.setdefault("embed.weight", head) is head else head


def _planned(model: _Model) -> Plan:
    """Return the tensors to write.

    Raises:
        TensorMismatch: they are not those of the configuration.
    """
    stored, source, layers = model.stored, model.name, model.config.shape.layers
    if model.media is not None:
        layers += model.media.sense.encoder.layers
    if layers > len(stored):  # before a name is made for every tensor of every layer
        raise TensorMismatch(
            f"{source} has {len(stored)} tensors, and its configuration says {layers} layers; copy "
            "it again."
        )
    types = None if model.types is None else FileTypes(by_tensor=model.types)
    wanted = {name: shape for name, (_, shape) in plan(model.config, types).items()}
    if model.media is not None:
        wanted |= {
            f"{model.media.kind}.{name}": shape
            for name, (_, shape) in sense_file.plan(model.media.sense).items()}
    for tensor in sorted(set(stored) - set(wanted)):
        raise TensorMismatch(
            f"{source} has tensor {stored[tensor].key[:80]}, which Cloister or its configuration "
            "does not know, so it cannot be imported."
        )
    planned: Plan = {}
    for tensor, shape in wanted.items():
        each = stored.get(tensor)
        if each is None:
            todo = "copy it again" if tensor != "head.weight" else (
                "set tie_word_embeddings to true in its config.json if it shares the embedding's")
            raise TensorMismatch(f"{source} lacks the weights for {tensor}; {todo}.")
        if each.dtype is None:
            raise TensorMismatch(
                f"Tensor {each.key} of {source} is of type {each.kind}, and Cloister reads F32, "
                "F16 and BF16; save the model in one of these, or take one that is not quantized."
            )
        if each.shape != shape:
            raise TensorMismatch(
                f"Tensor {each.key} of {source} is {each.kind}{list(each.shape)}, and its "
                f"configuration says {list(shape)}; copy it again."
            )
        planned[tensor] = each.dtype, shape
    return planned
