"""The proof of a program's methods for pictures and sound, part by part (see `parts`).

Shapes: T positions, N vectors of a picture or recording, E size of a vector, H hidden size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

from cloister import pattern
from cloister.errors import ExportMismatch
from cloister.export import parts
from cloister.export.instrument import instrument
from cloister.export.media import VISION
from cloister.model.encoder import Stem
from cloister.model.projector import ProjectorKind, TokenProjector
from cloister.model.quantized import QuantizedLinear
from cloister.model.spelling import SpellingBlock
from cloister.model.transformer import RMSNorm

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from cloister.export.media import Media
    from cloister.export.parts import Gap, Place
    from cloister.model.sense import Sense
    from cloister.model.transformer import Decoder

__all__ = ["MediaProgram", "gaps"]

_STEM = "encoder.stem.linear"
_SEED = 1
_ROWS = 64  # vectors that attend both ways, where the picture has as many


class MediaProgram(Protocol):
    """A loaded program, instrumented or not."""

    def call(self, method: str, *inputs: torch.Tensor) -> list[torch.Tensor]:
        """Return every output of a method."""

    def forward(self, tokens: torch.Tensor, start: int) -> torch.Tensor:
        """Logits after the last token, int64[1, T] -> float32[1, V]."""


def gaps(
    path: Path, decoder: Decoder, media: Media, load: Callable[[Path, str], MediaProgram],
    run: parts.Recording,
) -> list[Gap]:
    """Return how far each method of the program in `path` is from `decoder` and `media`.

    `load` gives a program whose first method is named; `run` is what `score` gives for tokens from
    the first position on.

    Raises:
        ExportMismatch: `text_decoder` does not give for embedded tokens what `score` gives.
    """
    program = load(path, "text_decoder")
    _prove_text(program, decoder, media, run)
    found = _decoder_gaps(path, decoder, media, load) if media.both_ways else []
    for method, sense in media.senses.items():
        if isinstance(sense.projector, TokenProjector):
            sense.projector.read_with(decoder.embed_tokens)
        found += _sense_gaps(path, method, sense, media, load)
    return found


def example(media: Media, method: str) -> torch.Tensor:
    """Return an input of an encoder, of noise."""
    if method == VISION:
        assert media.formats.picture is not None
        picture = pattern.picture(media.formats.picture, _SEED)
        pixels = torch.frombuffer(bytearray(picture.data), dtype=torch.uint8)
        return pixels.view(1, 3, picture.height, picture.width)
    assert media.formats.recording is not None
    recording = pattern.recording(media.formats.recording, _SEED)
    return torch.frombuffer(bytearray(recording.data), dtype=torch.float32).view(1, 1, -1)


def _prove_text(
    program: MediaProgram, decoder: Decoder, media: Media, run: parts.Recording
) -> None:
    """Raise ExportMismatch unless embedded tokens give what tokens give."""
    (embedded,) = program.call("token_embedding", run.tokens[:, :media.most].contiguous())
    embedded, mark = _unmarked(embedded, media)
    with torch.inference_mode():
        expected = decoder.embed_tokens(run.tokens[:, :media.most])
    if mark or not torch.equal(embedded, expected):
        raise ExportMismatch(
            "The program's embeddings are not the checkpoint's; nothing was written, report it.")

    def decode(tokens: torch.Tensor, start: int) -> torch.Tensor:
        (vectors,) = program.call("token_embedding", tokens)
        return program.call("text_decoder", vectors.clone(), torch.tensor([start]))[0]

    parts.prove_forward(decode, run)


def _decoder_gaps(
    path: Path, decoder: Decoder, media: Media, load: Callable[[Path, str], MediaProgram]
) -> list[Gap]:
    """Return the gaps of `text_decoder` for vectors that attend to one another both ways."""
    shape, length = decoder.config.shape, min(_ROWS, media.whole)
    rng = torch.Generator().manual_seed(_SEED)
    vectors_1TH = torch.randn(1, length, shape.hidden_size, generator=rng)
    marked_1TE = torch.cat((vectors_1TH, torch.ones(1, length, 1)), -1)
    calls, outputs = _instrumented(
        path, "text_decoder", load, marked_1TE, torch.zeros(1, dtype=torch.int64))

    def compute() -> torch.Tensor:
        attention = parts.ZeroHistory(decoder.config, 0, torch.zeros(length))
        return decoder.logits(decoder.hidden_from(vectors_1TH, 0, attention))

    return [
        parts.Gap(f"text_decoder {gap.part}", gap.size) for gap in parts.replayed(
            parts.decoder_places(decoder, calls, outputs), compute, outputs[0], "logits")]


def _sense_gaps(
    path: Path, method: str, sense: Sense, media: Media,
    load: Callable[[Path, str], MediaProgram],
) -> list[Gap]:
    given = example(media, method)
    calls, outputs = _instrumented(path, method, load, given)
    vectors, mark = _unmarked(outputs[0], media)
    if mark != (media.mark(method) or 0.0):
        raise ExportMismatch(
            f"The vectors of {method} are not marked as the decoder reads them; nothing was "
            "written, report it.")
    places = _places(sense, [[outputs[place] for place in call] for call in calls])
    return [
        parts.Gap(f"{method} {gap.part}", gap.size)
        for gap in parts.replayed(
            places, lambda: sense(given), vectors, "vectors", activated=(_STEM,))]


def _instrumented(
    path: Path, method: str, load: Callable[[Path, str], MediaProgram], *inputs: torch.Tensor
) -> tuple[list[list[int]], list[torch.Tensor]]:
    """Return the calls of `instrument`, and what the copy gives."""
    copy = path.with_name("instrumented.pte")
    calls = instrument(path, copy, method)
    outputs = [each.clone() for each in load(copy, method).call(method, *inputs)]
    copy.unlink()
    return calls, outputs


def _places(sense: Sense, calls: Sequence[Sequence[torch.Tensor]]) -> Iterator[Place]:
    """Yield the places of a sense, of the delegates of `backends.xnnpack_sense` in order.

    Of the spectrum and of convolutions nothing is rounded: what is read behind them proves them.
    """
    encoder: Any = sense.encoder
    at = sense.config.mel is not None
    at += {Stem.PATCHES: 1, Stem.CONVOLUTIONS_1D: 2}.get(
        encoder.shape.stem, encoder.shape.halvings)
    rest = iter(calls[at:])

    def edge(module: nn.Module, part: str, last: nn.Module | None = None) -> Iterator[Place]:
        read, *given = next(rest)
        yield module, part, True, [read]
        yield last or module, part, False, given

    if encoder.shape.stem is Stem.CONVOLUTIONS_2D:
        yield from edge(encoder.stem.linear, _STEM)
    for number, layer in enumerate(encoder.layers):
        name = f"encoder.layers.{number}"
        read, *qkv = next(rest)
        yield layer.attn_norm, f"{name}.attn_norm", True, [read]
        for part, given in zip("qkv", qkv, strict=True):
            yield getattr(layer.attn, part), f"{name}.attn.{part}", False, [given]
        yield from edge(layer.attn.o, f"{name}.attn.o")
        if layer.convolves:
            yield from edge(layer.convolution_norm, f"{name}.convolution.gate",
                            layer.convolution.gate)
            _, given = next(rest)
            yield layer.convolution.down, f"{name}.convolution", False, [given]
        yield from edge(layer.mlp_norm, f"{name}.mlp", layer.mlp)
    yield from edge(encoder.norm, "encoder.norm")
    kind = sense.config.projector and sense.config.projector.kind
    if kind is ProjectorKind.STACK:
        projector: Any = sense.projector
        yield from edge(projector.up, "projector", projector.down)
        return
    for part, module in sense.projector.named_modules():
        if isinstance(module, SpellingBlock):
            _, given = next(rest)
            yield module.down, f"projector.{part}", False, [given]
        elif ".layers." not in part and isinstance(
                module, nn.Linear | nn.LayerNorm | QuantizedLinear | RMSNorm):
            yield from edge(module, f"projector.{part}")


def _unmarked(vectors_1TE: torch.Tensor, media: Media) -> tuple[torch.Tensor, float]:
    """Return vectors without the mark of what attends both ways, and the mark."""
    if not media.both_ways:
        return vectors_1TE, 0.0
    (mark,) = vectors_1TE[..., -1].unique().tolist()
    return vectors_1TE[..., :-1], mark
