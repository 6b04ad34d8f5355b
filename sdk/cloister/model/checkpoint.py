"""Checkpoints: a directory of weights, their configuration, and the tokenizer.

    config.json           format, name, model configuration, recipe or the types of a GGUF file's
                          own blocks, parent's identity, token ids
    model.safetensors     weights (above 4 GB: shards, and model.safetensors.index.json)
    tokenizer.json        as the tokenizers library and ExecuTorch's C++ tokenizers read it
    chat_template.jinja   optional
    vision.safetensors    optional: what reads pictures (`sense_file`)
    audio.safetensors     optional: what reads recordings

A quantized tensor `NAME` is stored as `NAME.q` int8 and `NAME.scale`, or as a GGUF file's own
`NAME.blocks` uint8. Weights are read through the file mapping one tensor at a time, and written one
at a time (`writer`); pickles are never read.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError

from cloister import family, records
from cloister.errors import CheckpointError, NonFiniteTensor, SettingError, TensorMismatch
from cloister.model.blocks import Blocks, FileTypes
from cloister.model.config import ModelConfig  # noqa: TC001  # read at run time, by `records`
from cloister.model.quantized import PARTS, BlockWeight, scale_dtype, swap
from cloister.model.recipe import Recipe
from cloister.model.sense_file import SenseFile, SenseKind, fits
from cloister.model.shards import read_json, shards
from cloister.model.tensor_file import TYPE_NAMES, Plan, opened
from cloister.model.transformer import Decoder
from cloister.pieces import MediaFormats
from cloister.records import Whole  # noqa: TC001
from cloister.summary import Summary

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from cloister.progress import Report

__all__ = [
    "FORMAT",
    "Checkpoint",
    "Metadata",
    "Origin",
    "check_finite",
    "expected_tensors",
    "plan",
]

FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Origin:
    """What an import read: the weights may have been quantized before they came."""

    format: str  # safetensors or gguf
    types: dict[str, Whole]  # number of tensors by the type that the files hold them in
    passed_over: tuple[str, ...] = ()  # other files of weights beside them
    ignored: tuple[str, ...] = ()  # fields of the configuration that the user let pass

    def to_dict(self) -> dict[str, object]:
        """JSON-ready."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Metadata:
    """The contents of `config.json`."""

    name: str
    config: ModelConfig
    recipe: str | None = None
    parent: str | None = None  # identity of the checkpoint this one was made from
    bos: Whole | None = None
    eos: tuple[Whole, ...] = ()
    special_tokens: dict[str, str] | None = None  # that the template is given, by name
    origin: Origin | None = None  # of these weights, or of those that they were made from
    media: MediaFormats | None = None  # that it reads besides text
    types: dict[str, str] | None = None  # of each matrix, where they are a GGUF file's own blocks

    def __post_init__(self) -> None:
        schemes = self.schemes
        if schemes is not None and schemes.name != self.recipe:
            raise SettingError("The types of its matrices are not those of its recipe.")

    @property
    def schemes(self) -> Recipe | FileTypes | None:
        """The scheme of each matrix; None where nothing is quantized."""
        if self.types is not None:
            return FileTypes(by_tensor=self.types)
        return None if self.recipe is None else Recipe.parse(self.recipe)

    def to_json(self) -> str:
        """Return the text of `config.json`."""
        record = {"format": FORMAT, **asdict(self)}
        for name in ("special_tokens", "media", "types"):  # added since: others keep their identity
            if getattr(self, name) is None:
                del record[name]
        return records.to_json(record)


def expected_tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor of a plain decoder of `config`, by name, in order."""
    short = replace(config.shape, context=1)  # a rotary table of a million positions takes 2 GB
    with torch.device("meta"):
        decoder = Decoder(replace(config, shape=short))
    shapes = {name: tuple(tensor.shape) for name, tensor in decoder.state_dict().items()}
    if config.shape.tied:
        del shapes["head.weight"]
    return shapes


def plan(
    config: ModelConfig, schemes: Recipe | FileTypes | None, dtype: torch.dtype = torch.float32
) -> Plan:
    """Return the tensors of a checkpoint of `config`; without schemes, all of them in `dtype`.

    Raises:
        SettingError: a row does not divide into the blocks of its type.
    """
    shapes = expected_tensors(config)
    if schemes is None:
        return {name: (dtype, shape) for name, shape in shapes.items()}
    result = Plan()
    for name, shape in shapes.items():
        scheme = schemes.scheme_of(name)
        if scheme is None:
            result[name] = torch.float32, shape
        elif isinstance(scheme, Blocks):
            result[f"{name}.blocks"] = torch.uint8, (shape[0], scheme.row_bytes(shape[1]))
        else:
            result[f"{name}.q"] = torch.int8, shape
            result[f"{name}.scale"] = scale_dtype(scheme), (shape[0], scheme.groups(shape[1]))
    return result


class Checkpoint(Summary):
    """A checkpoint on disk, its headers read and checked, its weights not read yet."""

    report: Report | None = None  # of the stage that made it, unless opened from disk

    def __init__(self, path: Path, metadata: Metadata, where: Mapping[str, Path]) -> None:
        self.path, self.metadata, self._where = path, metadata, where

    def __repr__(self) -> str:
        return f"Checkpoint({self.path.name!r})"

    def summary(self) -> Iterator[tuple[str, str]]:
        """Return the shape, the recipe, and the report of the stage that made it, if any."""
        shape, origin = self.metadata.config.shape, self.metadata.origin
        yield from (
            ("checkpoint", self.path.name), ("tier or model", self.metadata.name),
            ("weights", f"{shape.parameters:,}, {shape.layers} layers of {shape.hidden_size}"),
            ("context", f"{shape.context:,} tokens"),
            ("recipe", self.metadata.recipe or "not quantized"))
        for kind, file in self.senses.items():
            encoder = file.config.encoder
            yield kind, f"{encoder.layers} layers of {encoder.hidden_size}, " + (
                file.config.recipe or "not quantized")
        if origin is not None:
            yield "imported from", origin.format
        if isinstance(self.report, Summary):
            yield from self.report.summary()

    @classmethod
    def open(cls, path: str | Path) -> Checkpoint:
        """Read the checkpoint in `path`, or of a shipped tier.

        Raises:
            CheckpointError: it is no checkpoint, or one of an unknown format.
            TensorMismatch: a tensor is missing, unexpected, or of another shape or type.
        """
        path = family.checkpoint(path)
        record = read_json(path / "config.json")
        if record.get("format") != FORMAT:
            hint = "import it first" if "architectures" in record else "use a newer Cloister"
            raise CheckpointError(
                f"Directory {path.name} is no Cloister checkpoint of format {FORMAT}; {hint}."
            )
        del record["format"]
        metadata = records.build(record, Metadata, refuse=lambda complaint: CheckpointError(
            f"Checkpoint {path.name} cannot be used ({complaint.rstrip('.')}); make it again."
        ))
        checkpoint = cls(path, metadata, shards(path))
        checkpoint._check()
        checkpoint._check_senses()
        return checkpoint

    @cached_property
    def senses(self) -> dict[SenseKind, SenseFile]:
        """What reads pictures and recordings, where there is any."""
        return {
            kind: SenseFile.open(self.path / kind.file) for kind in SenseKind
            if (self.path / kind.file).exists()}

    @property
    def tokenizer_path(self) -> Path:
        """The tokenizer file."""
        return self.path / "tokenizer.json"

    @property
    def template_path(self) -> Path | None:
        """The chat template, where there is one."""
        path = self.path / "chat_template.jinja"
        return path if path.exists() else None

    @cached_property
    def identity(self) -> str:
        """sha256 over the sorted names and hashes of the files, in hex."""
        total = hashlib.sha256()
        for path in sorted(self.path.iterdir()):
            with path.open("rb") as file:
                total.update(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n"
                             .encode())
        return total.hexdigest()

    def tensor(self, name: str) -> torch.Tensor:
        """Read one tensor."""
        try:
            with opened(self._where[name]) as file:
                tensor: torch.Tensor = file.get_tensor(name)
        except (SafetensorError, OSError):
            raise CheckpointError(
                f"Tensor {name} of checkpoint {self.path.name} cannot be read; copy it again."
            ) from None
        return tensor

    def load(self, dtype: torch.dtype = torch.float32) -> Decoder:
        """Read the decoder with its weights, plain ones in `dtype`, ready for inference.

        Raises:
            NonFiniteTensor: a tensor has a NaN or infinite entry.
        """
        with torch.device("meta"):
            decoder = Decoder(self.metadata.config)
            if self.metadata.schemes is not None:
                swap(decoder, self.metadata.schemes)
        for name in self._where:
            tensor = self.tensor(name)
            owner, _, attribute = name.rpartition(".")
            module = decoder.get_submodule(owner)
            check_finite(
                module.scheme.scales(tensor) if isinstance(module, BlockWeight) else tensor,
                name, self.path)
            if not name.endswith(PARTS):
                tensor = tensor.to(dtype)
            if isinstance(getattr(module, attribute), torch.nn.Parameter):
                setattr(module, attribute, torch.nn.Parameter(tensor))
            else:
                setattr(module, attribute, tensor)
        if self.metadata.config.shape.tied:
            decoder.head.weight = decoder.embed.weight
        return decoder.eval()

    def _check(self) -> None:
        if self.metadata.types is not None:
            self._check_types(self.metadata.types)
        wanted = plan(self.metadata.config, self.metadata.schemes)
        for name in sorted(set(wanted) - set(self._where)):
            raise TensorMismatch(f"Checkpoint {self.path.name} lacks tensor {name}; make it again.")
        for name in sorted(set(self._where) - set(wanted)):
            raise TensorMismatch(
                f"Checkpoint {self.path.name} has tensor {name}, which its configuration does "
                "not; make it again."
            )
        for name, dtype, shape in self._headers():
            kind, size = wanted[name]
            quantized = name.endswith(PARTS)
            known = dtype == TYPE_NAMES[kind] if quantized else dtype in ("F32", "F16", "BF16")
            if shape != size or not known:
                raise TensorMismatch(
                    f"Tensor {name} of checkpoint {self.path.name} is {dtype}{list(shape)}, not "
                    f"{TYPE_NAMES[kind]}{list(size)}; make the checkpoint again."
                )

    def _check_types(self, types: Mapping[str, str]) -> None:
        """Raise TensorMismatch unless every matrix has a type, and nothing else has one."""
        shapes = expected_tensors(self.metadata.config)
        matrices = {name for name, shape in shapes.items() if len(shape) == 2}
        for name in sorted(matrices ^ set(types)):
            raise TensorMismatch(
                f"Checkpoint {self.path.name} says the type of {name[:60]} and has no such matrix, "
                "or the reverse; import it again.")

    def _check_senses(self) -> None:
        """Raise CheckpointError unless each sense fits the decoder, and what it is told to read."""
        media = self.metadata.media or MediaFormats()
        for kind, form in (SenseKind.VISION, media.picture), (SenseKind.AUDIO, media.recording):
            file = self.senses.get(kind)
            if (file is None) != (form is None):
                raise CheckpointError(
                    f"Checkpoint {self.path.name} has {kind.file} or says how it is used, and not "
                    "both; make it again.")
            if file is None or form is None:
                continue
            if file.config.size != self.metadata.config.shape.hidden_size or (
                    not fits(file.config, form)):
                raise CheckpointError(
                    f"What {kind.file} of checkpoint {self.path.name} reads or gives is not what "
                    "its config.json says; make it again.")

    def _headers(self) -> Iterator[tuple[str, str, tuple[int, ...]]]:
        for path in dict.fromkeys(self._where.values()):
            with opened(path) as file:
                for name in file.keys():  # noqa: SIM118  # not a dict
                    part = file.get_slice(name)
                    yield name, part.get_dtype(), tuple(part.get_shape())


def check_finite(tensor: torch.Tensor, name: str, path: Path) -> None:
    """Raise NonFiniteTensor if `tensor` has a NaN or infinite entry."""
    if tensor.is_floating_point() and not torch.isfinite(tensor).all():
        raise NonFiniteTensor(
            f"Tensor {name} of {path.name} has a NaN or infinite entry; train or convert it again."
        )
