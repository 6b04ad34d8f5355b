"""Random models that read pictures and recordings, quantized."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tests.unit.export.test_lower import LAYOUTS, quantized_decoder

from cloister.model import sense_file
from cloister.model.checkpoint import Checkpoint, Metadata, plan
from cloister.model.config import ModelConfig
from cloister.model.encoder import EncoderShape, Stem
from cloister.model.front import MelShape, PixelScale
from cloister.model.projector import ProjectorKind, ProjectorShape, TokenProjector
from cloister.model.quantized import QuantizedLinear
from cloister.model.recipe import Recipe
from cloister.model.sense import Sense, SenseConfig
from cloister.model.sense_file import SenseKind
from cloister.model.transformer import RMSNorm
from cloister.model.writer import CheckpointWriter
from cloister.pieces import Fit, MediaFormats, PictureFormat, RecordingFormat, Resample
from cloister.quantize.rounding import quantize_weight

HIDDEN, VOCABULARY, CONTEXT = 128, 300, 192
_SIZES: dict[str, Any] = {"hidden_size": 64, "layers": 2, "heads": 4, "feed_forward": 128}
_PATCHES = EncoderShape(stem=Stem.PATCHES, rows=32, channels=3, patch=4, positions=64, **_SIZES)
_FRAMES = EncoderShape(stem=Stem.CONVOLUTIONS_1D, rows=20, positions=96, key_bias=False, **_SIZES)
_MEL = MelShape(bins=20)
SENSES = {
    "gemma-3": SenseConfig(
        encoder=replace(_PATCHES, activation="gelu_tanh"), pixels=PixelScale(),
        projector=ProjectorShape(kind=ProjectorKind.POOL, size=HIDDEN, factor=2)),
    "idefics-3": SenseConfig(
        encoder=_PATCHES, pixels=PixelScale(),
        projector=ProjectorShape(kind=ProjectorKind.SHUFFLE, size=HIDDEN, factor=2)),
    "voxtral": SenseConfig(
        encoder=_FRAMES, mel=_MEL,
        projector=ProjectorShape(kind=ProjectorKind.STACK, size=HIDDEN, factor=4)),
    "voxtral-pieces": SenseConfig(
        encoder=_FRAMES, mel=_MEL, pieces=True,
        projector=ProjectorShape(kind=ProjectorKind.STACK, size=HIDDEN, factor=4)),
    "tokens": SenseConfig(
        encoder=EncoderShape(
            stem=Stem.CONVOLUTIONS_2D, rows=20, positions=64, halvings=2, width=16, kernel=7,
            **_SIZES),
        mel=_MEL,
        projector=ProjectorShape(kind=ProjectorKind.TOKENS, size=HIDDEN, vocabulary=VOCABULARY)),
    "line": SenseConfig(
        encoder=EncoderShape(
            stem=Stem.CONVOLUTIONS_2D, rows=32, positions=64, halvings=2, width=16, **_SIZES),
        pixels=PixelScale(mean=(0.5,), deviation=(0.5,)),
        projector=ProjectorShape(
            kind=ProjectorKind.TOKENS, size=HIDDEN, vocabulary=VOCABULARY, alphabet=" aé€")),
}


def sense(name: str, recipe: str | None = "8da8w") -> Sense:
    """A sense of random weights, of about unit gain."""
    torch.manual_seed(1)
    plain = Sense(SENSES[name])
    plain.encoder.initialize(2)
    for part, module in plain.named_modules():
        if isinstance(module, torch.nn.LayerNorm | RMSNorm):
            module.weight.data.uniform_(0.5, 1.5)
        for parameter in module.parameters(recurse=False):
            if parameter.dim() == 2 and part:
                parameter.data.normal_(std=parameter.shape[1] ** -0.5)
    for name_, parameter in plain.named_parameters():
        if name_.endswith("bias"):
            parameter.data.normal_(std=0.2)
    if plain.config.encoder.stem is Stem.CONVOLUTIONS_2D:  # trained ones are silent here and there
        plain.encoder.stem.convolutions[-1].bias.data[:4] = -5.0
    if recipe is None:
        return plain.eval().requires_grad_(False)
    made, weights = Sense(replace(SENSES[name], recipe=recipe)), dict(plain.named_parameters())
    for part, module in made.named_modules():
        if isinstance(module, QuantizedLinear):
            module.weight.q, module.weight.scale = quantize_weight(
                weights[f"{part}.weight"].detach(), module.scheme)
            if module.bias is not None:
                module.bias = weights[f"{part}.bias"].detach()
    for part, parameter in made.named_parameters():
        parameter.data = weights[part].data
    return made.eval().requires_grad_(False)


def formats(picture: str | None, recording: str | None, *, both_ways: bool) -> MediaFormats:
    """What a model of the two senses reads."""
    seen = heard = None
    if picture is not None:
        config = SENSES[picture]
        seen = PictureFormat(
            height=config.encoder.rows, width=config.encoder.columns, tokens=config.vectors,
            fit=Fit.PAD, resample=Resample.BILINEAR, both_ways=both_ways,
            fewer=isinstance(sense(picture, None).projector, TokenProjector))
    if recording is not None:
        config = SENSES[recording]
        step = config.samples_per_vector
        longest = config.encoder.columns * _MEL.hop
        heard = RecordingFormat(
            rate=_MEL.rate, samples_per_token=step, multiple=longest if config.pieces else 2 * step,
            most=2 * longest if config.pieces else longest,
            fewer=isinstance(sense(recording, None).projector, TokenProjector))
    return MediaFormats(picture=seen, recording=heard)


def config_of(layout: str) -> ModelConfig:
    """A layout of `test_lower` with the vocabulary of the tests' tokenizer."""
    config = LAYOUTS[layout]
    return replace(config, shape=replace(
        config.shape, vocab_size=VOCABULARY, context=CONTEXT), window=24 if config.window else None)


def checkpoint(
    path: Path, tokenizer_dir: Path, layout: str = "llama", recipe: str = "8da4w-g32",
    picture: str | None = "idefics-3", recording: str | None = "voxtral", *,
    both_ways: bool = False
) -> Checkpoint:
    """A checkpoint of a random decoder with two senses."""
    config = config_of(layout)
    values = quantized_decoder(config, recipe).state_dict()
    planned = plan(config, Recipe.parse(recipe))
    senses = {SenseKind.VISION: picture, SenseKind.AUDIO: recording}
    with CheckpointWriter(
        path, tensors=planned, template=tokenizer_dir / "chat_template.jinja",
        tokenizer=tokenizer_dir / "tokenizer.json",
        metadata=Metadata(
            name="tiny", config=config, recipe=recipe, eos=(0,),
            media=formats(picture, recording, both_ways=both_ways)),
    ).with_senses({
        kind: partial(
            sense_file.write, config=sense(name).config,
            tensors=sense(name).state_dict().items())
        for kind, name in senses.items() if name is not None}) as writer:
        for name in planned:
            writer.add(name, values[name])
    return Checkpoint.open(path)
