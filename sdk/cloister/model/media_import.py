"""Models of pictures or recordings as others made them: configurations and processors as ours.

The decoder is read by `huggingface`; here are the encoder, the projector, and what the processor
does before them. Read as transformers 5.24 reads them (models/gemma3, smolvlm, idefics3, voxtral,
whisper); what a processor does otherwise than `cloister.media` and `front` is refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping  # one of them is called below
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cloister.errors import CheckpointError, SettingError
from cloister.model.encoder import EncoderShape, Stem
from cloister.model.fields import Fields
from cloister.model.processors import Marks, picture_settings, recording_settings
from cloister.model.projector import ProjectorKind, ProjectorShape
from cloister.model.sense import SenseConfig
from cloister.model.sense_file import SenseKind
from cloister.pieces import Fit, MediaFormats, PictureFormat, RecordingFormat, Tiles

if TYPE_CHECKING:
    from cloister.model.front import MelShape

__all__ = ["ARCHITECTURES", "ENCODERS", "Multimodal", "read", "read_encoder"]

ENCODERS = ("WhisperForConditionalGeneration", "WhisperModel")
"""Architectures of which the encoder alone is read."""

_PIECES = 10  # of a recording at most, as many as ExecuTorch's own exporters plan memory for

# What transformers 5.24 takes for a field that is missing.
_SIGLIP: dict[str, Any] = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
    "num_attention_heads": 12, "num_channels": 3, "image_size": 224, "patch_size": 16,
    "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6,
}
_IDEFICS = _SIGLIP | {"hidden_size": 1152, "num_attention_heads": 16, "patch_size": 32}
_VOXTRAL: dict[str, Any] = {
    "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32,
    "num_attention_heads": 20, "activation_function": "gelu", "scale_embedding": False,
    "num_mel_bins": 128, "max_source_positions": 1500,
}
_WHISPER: dict[str, Any] = {
    "d_model": 384, "encoder_ffn_dim": 1536, "encoder_layers": 4, "encoder_attention_heads": 6,
    "activation_function": "gelu", "scale_embedding": False, "num_mel_bins": 80,
    "max_source_positions": 1500,
}
_GEMMA_TEXT: dict[str, Any] = {
    "vocab_size": 262_208, "hidden_size": 2304, "intermediate_size": 9216,
    "num_hidden_layers": 26, "num_attention_heads": 8, "max_position_embeddings": 131_072,
}
_VOXTRAL_TEXT: dict[str, Any] = {
    "vocab_size": 131_072, "hidden_size": 3072, "intermediate_size": 8192,
    "num_hidden_layers": 30, "num_attention_heads": 32, "num_key_value_heads": 8,
    "max_position_embeddings": 131_072, "rms_norm_eps": 1e-5, "head_dim": 128,
}
# Of processors, or of parts that nothing reads (transformers keeps them for their makers' code).
_UNREAD_VISION = {"max_image_size", "size", "tie_word_embeddings", "vision_use_head"}
_UNREAD_SOUND = {"vocab_size", "activation_dropout", "layerdrop"}
_UNREAD_WHISPER = {  # of its decoder, of its training, or of another head
    "activation_dropout", "apply_spec_augment", "architectures", "bos_token_id",
    "classifier_proj_size", "decoder_attention_heads", "decoder_ffn_dim", "decoder_layerdrop",
    "decoder_layers", "encoder_layerdrop", "eos_token_id", "init_std", "is_encoder_decoder",
    "mask_feature_length", "mask_feature_min_masks", "mask_feature_prob", "mask_time_length",
    "mask_time_min_masks", "mask_time_prob", "max_target_positions", "median_filter_width",
    "num_hidden_layers", "tie_word_embeddings", "use_weighted_layer_sum", "vocab_size",
}
_UNREAD_TEXT = {"perceiver_config", "pixel_shuffle_factor"}


@dataclass(frozen=True, kw_only=True)
class Multimodal:
    """A decoder's configuration, what reads media for it, and what the prompt has around them."""

    text: dict[str, Any]  # as `huggingface.configured` reads one
    kind: SenseKind
    sense: SenseConfig
    formats: Callable[[Marks, int], MediaFormats]  # of the tokenizer and the context
    ignored: frozenset[str] = frozenset()  # fields, see there


def read(
    record: Mapping[str, object], source: Path, *, ignore: Collection[str] = ()
) -> Multimodal:
    """Read the configuration and the processor's settings of the model in `source`.

    Raises:
        UnsupportedFeature: a field asks for something that is not implemented.
        CheckpointError: a file or field is missing, or not what it must be.
    """
    architectures: Any = record["architectures"]
    reader, text, defaults = _READERS[architectures[0]]
    fields = Fields(
        dict(record), {"text_config": {}, "tie_word_embeddings": None, **defaults},
        source.name, frozenset(ignore),
        {"architectures", "bos_token_id", "eos_token_id", "hidden_size", "vocab_size"})
    inner = dict(fields.take("text_config", dict))
    if inner.get("model_type", text[0]) not in text:
        raise fields.unsupported(
            f"has a decoder of type {str(inner['model_type'])[:40]}, and Cloister reads {text[0]}")
    tied = fields.take("tie_word_embeddings", bool)
    if tied is not None:
        inner["tie_word_embeddings"] = tied
    model = reader(fields, source, inner)
    fields.done()
    return replace(model, ignored=frozenset(fields.ignored))


def read_encoder(record: Mapping[str, object], source: Path) -> SenseConfig:
    """Read the encoder of a Whisper model in `source`.

    Raises:
        UnsupportedFeature, CheckpointError: see `read`.
    """
    fields = Fields(dict(record), _WHISPER, source.name, taken=set(_UNREAD_WHISPER))
    shape = _sound(fields, {
        "hidden_size": "d_model", "intermediate_size": "encoder_ffn_dim",
        "num_hidden_layers": "encoder_layers", "num_attention_heads": "encoder_attention_heads"})
    fields.done()
    return SenseConfig(encoder=shape, mel=_mel(shape, source))


def _gemma(fields: Fields, source: Path, text: dict[str, Any]) -> Multimodal:
    text = {**_GEMMA_TEXT, **text, "architectures": ["Gemma3ForCausalLM"]}
    text.pop("final_logit_softcapping", None)  # of which this architecture makes no use
    encoder = _picture_encoder(fields, _SIGLIP)
    vectors = fields.take("mm_tokens_per_image", int)
    begin, end = (fields.take(f"{name}_token_index", int) for name in ("boi", "eoi"))
    fields.take("image_token_index", int)
    side = math.isqrt(vectors)
    if side * side != vectors or encoder.grid_rows % side:
        raise fields.unsupported(
            f"makes {vectors} vectors of {encoder.grid_rows} x {encoder.grid_rows} patches")
    scale, resample, _ = picture_settings(source, encoder, tiles=False)

    def formats(marks: Marks, context: int) -> MediaFormats:  # noqa: ARG001
        before, after = marks.text(begin), marks.text(end)
        return MediaFormats(picture=PictureFormat(
            height=encoder.rows, width=encoder.columns, tokens=vectors, fit=Fit.STRETCH,
            resample=resample, marker=before, before=f"\n\n{before}", after=f"{after}\n\n",
            both_ways=True))

    return Multimodal(
        text=text, kind=SenseKind.VISION, formats=formats, sense=SenseConfig(
            encoder=encoder, pixels=scale, projector=ProjectorShape(
                kind=ProjectorKind.POOL, size=_size(fields, text),
                factor=encoder.grid_rows // side)))


def _idefics(fields: Fields, source: Path, text: dict[str, Any]) -> Multimodal:
    text = {key: value for key, value in text.items() if key not in _UNREAD_TEXT}
    text["architectures"] = ["LlamaForCausalLM"]
    encoder = _picture_encoder(fields, _IDEFICS)
    fields.take("image_token_id", int)
    factor = fields.take("scale_factor", int)
    scale, resample, longest = picture_settings(source, encoder, tiles=True)
    sense = SenseConfig(
        encoder=encoder, pixels=scale, projector=ProjectorShape(
            kind=ProjectorKind.SHUFFLE, size=_size(fields, text), factor=factor))

    def formats(marks: Marks, context: int) -> MediaFormats:  # noqa: ARG001
        around, whole = "<fake_token_around_image>", "<global-img>"
        return MediaFormats(picture=PictureFormat(
            height=encoder.rows, width=encoder.columns, tokens=sense.vectors, fit=Fit.TILES,
            resample=resample, marker=marks.known("<image>"), after=marks.known(around),
            tiles=Tiles(
                longest_edge=longest, before=around + "<row_{row}_col_{column}>", row_end="\n",
                grid_end="\n", whole=around + whole)))

    return Multimodal(text=text, kind=SenseKind.VISION, sense=sense, formats=formats)


def _voxtral(fields: Fields, source: Path, text: dict[str, Any]) -> Multimodal:
    text = {**_VOXTRAL_TEXT, **text, "architectures": ["LlamaForCausalLM"]}
    if not {"rope_theta", "rope_parameters"} & set(text):
        text["rope_theta"] = 1e8
    inner = _part(fields, "audio_config", _VOXTRAL)
    inner.taken |= _UNREAD_SOUND
    encoder = _sound(inner, {})
    inner.done()
    if (act := fields.take("projector_hidden_act", str)) != "gelu":
        raise fields.unsupported(f"has {act[:40]} in its projector, and Cloister has gelu")
    fields.take("audio_token_id", int)
    if encoder.feed_forward % encoder.hidden_size:
        raise fields.unsupported(
            f"stacks frames of {encoder.hidden_size} to {encoder.feed_forward}")
    sense = SenseConfig(
        encoder=encoder, mel=_mel(encoder, source), pieces=True, projector=ProjectorShape(
            kind=ProjectorKind.STACK, size=_size(fields, text),
            factor=encoder.feed_forward // encoder.hidden_size))

    def formats(marks: Marks, context: int) -> MediaFormats:
        assert sense.mel is not None
        piece = encoder.columns * sense.mel.hop
        return MediaFormats(recording=RecordingFormat(
            rate=sense.mel.rate, samples_per_token=sense.samples_per_vector, multiple=piece,
            most=piece * max(1, min(_PIECES, context // sense.vectors)),
            before=marks.known("[BEGIN_AUDIO]")))

    return Multimodal(text=text, kind=SenseKind.AUDIO, sense=sense, formats=formats)


_Reader = Callable[[Fields, Path, dict[str, Any]], Multimodal]
# What reads it, the types of its decoder, and the defaults of its fields.
_READERS: dict[str, tuple[_Reader, tuple[str, ...], dict[str, Any]]] = {
    "Gemma3ForConditionalGeneration": (_gemma, ("gemma3_text",), {
        "mm_tokens_per_image": 256, "boi_token_index": 255_999, "eoi_token_index": 256_000,
        "image_token_index": 262_144}),
    "Idefics3ForConditionalGeneration": (_idefics, ("llama",), {
        "scale_factor": 2, "image_token_id": 128_257, "tie_word_embeddings": False}),
    "SmolVLMForConditionalGeneration": (_idefics, ("llama",), {
        "scale_factor": 2, "image_token_id": 128_257, "tie_word_embeddings": False}),
    "VoxtralForConditionalGeneration": (_voxtral, ("llama",), {
        "projector_hidden_act": "gelu", "audio_token_id": None}),
}
ARCHITECTURES = tuple(_READERS)


def _part(fields: Fields, name: str, defaults: dict[str, Any]) -> Fields:
    part = fields.part(name)
    part.defaults = defaults
    return part


def _size(fields: Fields, text: dict[str, Any]) -> int:
    """Return the decoder's hidden size, which a projector gives."""
    size: int = Fields(text, {}, fields.source).take("hidden_size", int)
    return size


def _picture_encoder(fields: Fields, defaults: dict[str, Any]) -> EncoderShape:
    fields.defaults["vision_config"] = {}
    inner = _part(fields, "vision_config", defaults)
    inner.taken |= _UNREAD_VISION
    act = inner.take("hidden_act", str)
    if act not in ("gelu", "gelu_pytorch_tanh"):
        raise fields.unsupported(f"has {act[:40]} in its encoder, and Cloister has gelu")
    side, patch = inner.take("image_size", int), inner.take("patch_size", int)
    shape = _bounded(
        fields, stem=Stem.PATCHES, rows=side, positions=(side // patch) ** 2, patch=patch,
        channels=inner.take("num_channels", int), hidden_size=inner.take("hidden_size", int),
        layers=inner.take("num_hidden_layers", int), heads=inner.take("num_attention_heads", int),
        feed_forward=inner.take("intermediate_size", int),
        activation="gelu" if act == "gelu" else "gelu_tanh",
        norm_eps=inner.take("layer_norm_eps", float))
    inner.done()
    return shape


def _sound(fields: Fields, names: Mapping[str, str]) -> EncoderShape:
    """Read the shape of a Whisper encoder, whose sizes may have other `names`."""

    def size(name: str) -> int:
        value: int = fields.take(names.get(name, name), int)
        return value

    if (act := fields.take("activation_function", str)) != "gelu":
        raise fields.unsupported(f"has {act[:40]} in its encoder, and Cloister has gelu")
    if fields.take("scale_embedding", bool):
        raise fields.unsupported("scales its encoder's input (scale_embedding)")
    hidden, heads = size("hidden_size"), size("num_attention_heads")
    fields.defaults |= {"num_key_value_heads": heads, "head_dim": hidden // heads}
    if size("num_key_value_heads") != heads or size("head_dim") * heads != hidden:
        raise fields.unsupported("has an encoder whose heads share keys, or leave a part unread")
    return _bounded(
        fields, stem=Stem.CONVOLUTIONS_1D, rows=size("num_mel_bins"),
        positions=size("max_source_positions"), hidden_size=hidden, heads=heads,
        layers=size("num_hidden_layers"), feed_forward=size("intermediate_size"), key_bias=False)


def _bounded(fields: Fields, **values: Any) -> EncoderShape:
    try:
        return EncoderShape(**values)
    except SettingError as error:
        raise CheckpointError(
            f"The encoder of {fields.source} cannot be built: {error}") from None


def _mel(encoder: EncoderShape, source: Path) -> MelShape:
    """Return the spectrum of the processor's settings, and that they give the longest input."""
    shape, samples = recording_settings(source)
    if shape.bins != encoder.rows or samples != encoder.columns * shape.hop:
        raise CheckpointError(
            f"The processor of {source.name} gives {shape.bins} bins of {samples} samples, and its "
            f"encoder reads {encoder.rows} of {encoder.columns * shape.hop}; copy it again.")
    return shape
