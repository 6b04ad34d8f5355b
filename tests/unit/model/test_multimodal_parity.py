"""Imported multimodal models compute what transformers computes of text, pictures and sound."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")

from tests.unit.model import multimodal_models as theirs  # noqa: E402

from cloister.model import multimodal  # noqa: E402
from cloister.model.cache import KVCache  # noqa: E402
from cloister.model.checkpoint import Checkpoint  # noqa: E402
from cloister.model.imports import import_model  # noqa: E402
from cloister.model.sense_file import SenseKind  # noqa: E402
from cloister.pieces import MEDIA  # noqa: E402

# What a sequence has, in order: texts of a length, and media of a number of vectors.
SEQUENCES = {
    "text": (9,), "one medium": (3, "medium", 4), "two media": (2, "medium", 3, "medium", 2),
    "interleaved": ("medium", 5, "medium", 1, "medium", 12),
    "a long medium": (4, "long", 3),
}


class Pair:
    """A model of transformers, and ours."""

    def __init__(self, layout: str, directory: Path) -> None:
        self.layout = layout
        self.model, self.processor = theirs.save(directory / "theirs", layout)
        self.checkpoint: Checkpoint = import_model(directory / "theirs", directory / "ours")
        self.decoder = self.checkpoint.load()
        (self.kind, file), = self.checkpoint.senses.items()
        self.sense = file.load()
        self.rng = torch.Generator().manual_seed(4)

    def medium(self, *, long: bool) -> torch.Tensor:
        """A picture uint8[1, 3, 32, 32], several tiles of one, or a recording."""
        if self.kind is SenseKind.AUDIO:
            length = 64_000 if long else 32_000
            return 0.1 * torch.randn(1, 1, length, generator=self.rng)
        count = 5 if long and self.layout != "gemma3" else 1
        return torch.randint(256, (count, 3, 32, 32), generator=self.rng, dtype=torch.uint8)

    def features(self, media: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        """What their model is given of media, by their processor."""
        if not media:
            return {}
        if self.kind is SenseKind.AUDIO:
            return {"input_features": torch.cat([
                self.processor(
                    each.flatten().numpy(), sampling_rate=16_000, padding=True, truncation=False,
                    pad_to_multiple_of=32_000, return_tensors="pt",
                )["input_features"].reshape(20, -1, 200).transpose(0, 1) for each in media])}
        mean, deviation = (
            torch.tensor(each).view(3, 1, 1)
            for each in (self.processor.image_mean, self.processor.image_std))
        pixels = (torch.cat(media) / 255 - mean) / deviation
        return {"pixel_values": pixels if self.layout == "gemma3" else pixels[None]}

    def sequence(
        self, parts: tuple[int | str, ...]
    ) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
        """Return ids with `MEDIA`, vectors, and media of a sequence."""
        ids, media = [1], []
        vectors = [torch.zeros(0, self.decoder.config.shape.hidden_size)]
        for part in parts:
            if isinstance(part, int):
                ids += torch.randint(8, 256, (part,), generator=self.rng).tolist()
                continue
            media.append(self.medium(long=part == "long"))
            vectors.append(self.sense(media[-1]).flatten(0, 1))
            ids += [6] + [MEDIA] * len(vectors[-1]) + [7]
        return torch.tensor([ids]), torch.cat(vectors), media


@pytest.fixture(scope="module", params=["gemma3", "smolvlm", "idefics3", "voxtral"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    with torch.inference_mode():
        return Pair(request.param, tmp_path_factory.mktemp(request.param))


@pytest.mark.parametrize("name", SEQUENCES)
@torch.inference_mode()
def test_logits_are_those_of_transformers(pair: Pair, name: str) -> None:
    tokens, vectors, media = pair.sequence(SEQUENCES[name])
    given: dict[str, Any] = pair.features(media)
    both_ways = pair.layout == "gemma3"
    places = tokens == MEDIA
    if both_ways and media:
        given["token_type_ids"] = places.long()
    expected = pair.model(input_ids=tokens.masked_fill(places, theirs.PLACE), **given).logits
    got = multimodal.logits(pair.decoder, tokens, vectors, both_ways=both_ways)
    assert expected.std() > 0.1  # a model that says something
    assert (got - expected).abs().max() <= 1e-4
    if media:
        other = multimodal.logits(pair.decoder, tokens, vectors.flip(0), both_ways=both_ways)
        assert (other - expected).abs().max() > 1e-2  # and that looks

    cache, end = KVCache(pair.decoder.config), tokens.shape[1] - 2
    steps = [multimodal.logits(
        pair.decoder, tokens[:, :end], vectors, cache, both_ways=both_ways)]
    steps += [multimodal.logits(pair.decoder, tokens[:, i:i + 1], vectors[:0], cache)
              for i in range(end, tokens.shape[1])]
    assert (torch.cat(steps, dim=1) - expected).abs().max() <= 1e-4


@torch.inference_mode()
def test_pictures_of_gemma_attend_in_both_directions(tmp_path: Path) -> None:
    pair = Pair("gemma3", tmp_path)
    tokens, vectors, _ = pair.sequence(SEQUENCES["one medium"])
    both, one = (
        multimodal.logits(pair.decoder, tokens, vectors, both_ways=way) for way in (True, False))
    assert (both - one).abs().max() > 1e-2
    media = pair.checkpoint.metadata.media
    assert media is not None and media.picture is not None and media.picture.both_ways
