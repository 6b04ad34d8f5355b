"""What a model's own processor does before its encoder, out of its files.

    preprocessor_config.json    settings of pictures or recordings
    processor_config.json       the same in files of transformers 5, one object each

A setting that is neither understood nor known to change nothing is refused by name.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer

from cloister.errors import CheckpointError, SettingError
from cloister.model.fields import Fields
from cloister.model.front import MelShape, PixelScale
from cloister.model.shards import read_json
from cloister.pieces import Resample

if TYPE_CHECKING:
    from pathlib import Path

    from cloister.model.encoder import EncoderShape

__all__ = ["Marks", "picture_settings", "recording_settings"]

_FILTERS = {1: Resample.LANCZOS, 2: Resample.BILINEAR, 3: Resample.BICUBIC}  # Pillow's numbers
_LARGEST = 4096  # pixels of a side, to which transformers shrinks what is larger
_RESCALE = 1 / 255
# Names, and what is said of files, batches or prompts elsewhere.
_SPOKEN = {
    "processor_class", "image_processor_type", "feature_extractor_type", "data_format",
    "do_convert_rgb", "do_pad", "image_seq_length", "image_seq_len", "input_data_format",
    "pan_and_scan_max_num_crops", "pan_and_scan_min_crop_size", "padding_side", "padding_value",
    "pan_and_scan_min_ratio_to_activate", "return_attention_mask", "return_tensors",
    "video_sampling", "mel_filters", "nb_max_frames", "n_samples", "device", "pad_size",
}


class Marks:
    """The texts of a tokenizer's tokens that stand around media."""

    def __init__(self, tokenizer: str, name: str) -> None:
        """Read them of the contents of a `tokenizer.json`, of the model `name`."""
        self._backend, self._name = Tokenizer.from_str(tokenizer), name

    def text(self, id_: int) -> str:
        """Return the text of the token `id_`.

        Raises:
            CheckpointError: the tokenizer does not know it.
        """
        found: str | None = self._backend.id_to_token(id_)
        if found is None:
            raise self._unknown(str(id_))
        return found

    def known(self, token: str) -> str:
        """Return `token`, which the tokenizer has.

        Raises:
            CheckpointError: it does not.
        """
        if self._backend.token_to_id(token) is None:
            raise self._unknown(token)
        return token

    def _unknown(self, token: str) -> CheckpointError:
        return CheckpointError(
            f"The tokenizer of {self._name} does not know the token {token}, which stands around "
            "media; copy its tokenizer_config.json and added_tokens.json, too.")


def picture_settings(
    source: Path, encoder: EncoderShape, *, tiles: bool
) -> tuple[PixelScale, Resample, int]:
    """Return scale, filter, and the longest edge in pixels of a picture before it is cut, or 0.

    Raises:
        UnsupportedFeature: a setting asks for something that is not implemented.
        CheckpointError: there are no settings, or they do not fit the encoder.
    """
    fields = _settings(source, "image_processor", {
        "do_resize": True, "do_rescale": True, "do_normalize": True, "rescale_factor": _RESCALE,
        "resample": 1 if tiles else 2, "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
        "size": None, "max_image_size": None, "do_image_splitting": tiles,
    })
    for name in ("do_resize", "do_rescale", "do_normalize"):
        if not fields.take(name, bool):
            raise fields.unsupported(f"does not resize, rescale or normalize pictures ({name})")
    if abs(fields.take("rescale_factor", float) - _RESCALE) > 1e-9:
        raise fields.unsupported("rescales pixels by another factor than 1/255")
    number = fields.take("resample", int)
    if number not in _FILTERS:
        raise fields.unsupported(f"resizes pictures by Pillow's filter {number}")
    if fields.take("do_image_splitting", bool) != tiles:
        raise fields.unsupported("cuts pictures into tiles, or does not, as others of its kind")
    sides = {"height": encoder.rows, "width": encoder.columns}
    edge = {"longest_edge": encoder.rows}
    size, longest = fields.take("size", dict), 0
    if tiles:
        longest = 4 * encoder.rows if size is None else size.get("longest_edge", 0)
        size, sides = fields.take("max_image_size", dict), edge
    if size not in (None, sides) or type(longest) is not int or (
            tiles and not encoder.rows <= longest <= _LARGEST):
        raise CheckpointError(
            f"The processor of {source.name} gives pictures of another size than the "
            f"{encoder.rows} x {encoder.columns} that its encoder reads; copy both again.")
    scale = _scale(fields)
    fields.done()
    return scale, _FILTERS[number], longest


def recording_settings(source: Path) -> tuple[MelShape, int]:
    """Return the spectrum, and the samples that a recording is filled up to.

    Raises:
        UnsupportedFeature, CheckpointError: see `picture_settings`.
    """
    fields = _settings(source, "feature_extractor", {
        "feature_size": 80, "sampling_rate": 16_000, "hop_length": 160, "n_fft": 400,
        "chunk_length": 30,
    })
    rate = fields.take("sampling_rate", int)
    shape = MelShape(
        bins=fields.take("feature_size", int), rate=rate, window=fields.take("n_fft", int),
        hop=fields.take("hop_length", int))
    if rate != 16_000:  # whose filters end at 8 kHz, whatever the rate
        raise fields.unsupported(f"reads {rate} samples a second, and Cloister 16000")
    samples = rate * fields.take("chunk_length", int)
    fields.done()
    return shape, samples


def _settings(source: Path, part: str, defaults: dict[str, Any]) -> Fields:
    """Return the fields of the first file that has settings of `part`."""
    old, new = source / "preprocessor_config.json", source / "processor_config.json"
    record: object = None
    if new.exists():
        record = read_json(new).get(part)
    if record is None and old.exists():
        record = read_json(old)
    if not isinstance(record, dict):
        raise CheckpointError(
            f"{source.name} has no {old.name} with the settings of its pictures or recordings; "
            "download that too.")
    return Fields(record, defaults, source.name, taken=set(_SPOKEN))


def _scale(fields: Fields) -> PixelScale:
    mean, deviation = fields.take("image_mean", list), fields.take("image_std", list)
    try:
        return PixelScale(mean=tuple(map(float, mean)), deviation=tuple(map(float, deviation)))
    except (SettingError, TypeError, ValueError):
        raise CheckpointError(
            f"The processor of {fields.source} has an image_mean or image_std that is none; copy "
            "it again.") from None
