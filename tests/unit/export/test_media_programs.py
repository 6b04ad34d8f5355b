"""A bundle that reads pictures and sound computes what its checkpoint does, method by method."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from tests.unit.export import media_models

from cloister import pattern, pipeline
from cloister.bundle import Bundle
from cloister.errors import BundleCorrupt, ExportMismatch
from cloister.export.backends import xnnpack_sense
from cloister.export.constants import prove_constants, stored
from cloister.export.media import weight_bytes
from cloister.model import multimodal
from cloister.model.checkpoint import Checkpoint
from cloister.model.projector import TokenProjector
from cloister.parts import Picture, Recording
from cloister.runtime import engine as engines
from cloister.runtime.chat import Sampling
from cloister.runtime.core import Position
from cloister.runtime.encoded import Medium
from cloister.runtime.engine import Engine
from cloister.runtime.generate import Decoding, generate, score
from cloister.runtime.sampling import Sampler
from cloister.settings import Settings

pytestmark = pytest.mark.slow

LAYOUTS = {
    "causal": {},
    "both ways": {"layout": "gemma-3", "picture": "gemma-3", "both_ways": True, "recipe": "8da8w"},
    "tokens": {"picture": "line", "recording": "tokens"},
}


@dataclass
class Made:
    """A checkpoint, its bundle, and that opened."""

    source: Checkpoint
    bundle: Bundle
    engine: Engine
    kinds: dict[str, object]

    @property
    def both_ways(self) -> bool:
        media = self.bundle.manifest.media
        return media is not None and media.picture is not None and media.picture.both_ways


@pytest.fixture(scope="module", params=LAYOUTS)
def made(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tokenizer_dir: Path
) -> Made:
    path = tmp_path_factory.mktemp("media")
    source = media_models.checkpoint(path / "source", tokenizer_dir, **LAYOUTS[request.param])
    bundle = pipeline.export(source, path / "tiny.cloister", chunk=16)
    return Made(source, bundle, Engine(bundle.path), LAYOUTS[request.param])


def vectors(made: Made, part: Medium) -> torch.Tensor:
    """What the checkpoint's own sense makes of a picture or recording."""
    (kind,) = (kind for kind in made.source.senses if (kind == "vision") == isinstance(
        part, Picture))
    sense = made.source.senses[kind].load()
    if isinstance(sense.projector, TokenProjector):
        sense.projector.read_with(made.source.load().embed_tokens)
    dtype = torch.uint8 if isinstance(part, Picture) else torch.float32
    data = torch.frombuffer(bytearray(part.data), dtype=dtype)
    given = data.view(1, 3, part.height, part.width) if isinstance(part, Picture) else (
        data.view(1, 1, -1))
    with torch.no_grad():
        out: torch.Tensor = sense(given)[0]
    return out


def parts_of(made: Made) -> tuple[Picture, Recording]:
    media = made.bundle.manifest.media
    assert media is not None
    assert media.picture is not None
    assert media.recording is not None
    return pattern.picture(media.picture, 5), pattern.recording(media.recording, 6)


def eager(made: Made, shown: list[int | Medium]) -> torch.Tensor:
    """Logits after the last position, of the checkpoint; at most one kind is read both ways."""
    found = [vectors(made, part) for part in shown if not isinstance(part, int)]
    lengths = iter(map(len, found))
    ids = [
        id_ for each in shown
        for id_ in ([each] if isinstance(each, int) else [multimodal.MEDIA] * next(lengths))]
    with torch.no_grad():
        out = multimodal.logits(
            made.source.load(), torch.tensor([ids]), torch.cat(found), both_ways=made.both_ways)
    return out[0, -1]


def positions(made: Made, shown: list[int | Medium]) -> list[Position]:
    return [
        position for each in shown
        for position in ([each] if isinstance(each, int) else made.engine.media(each))]


def far(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


TEXT = list(range(20, 45))


def test_pictures_among_text_give_the_checkpoints_logits(made: Made) -> None:
    picture, _ = parts_of(made)
    for shown in ([*TEXT, picture, *TEXT], [picture, *TEXT, picture, 7], [*TEXT, picture]):
        made.engine.truncate(0)
        got = made.engine.extend(positions(made, shown))[0].clone()
        assert far(got, eager(made, shown)) < 0.05


def test_recordings_among_text_give_the_checkpoints_logits(made: Made) -> None:
    _, recording = parts_of(made)
    if made.both_ways:
        pytest.skip("the eager reference takes every medium for one that attends both ways")
    shown = [*TEXT, recording, *TEXT]
    made.engine.truncate(0)
    assert far(made.engine.extend(positions(made, shown))[0], eager(made, shown)) < 0.05


def test_a_picture_read_in_parts_leaves_the_keys_and_values_of_one_reading(made: Made) -> None:
    engine, (picture, recording) = made.engine, parts_of(made)
    shown = positions(made, [*TEXT, picture, *TEXT, recording, 9])
    engine.truncate(0)
    whole = engine.extend(shown).clone()
    kept = [row.clone() for row in engine.buffers(0, len(shown))]
    for at in range(0, len(shown), 13):
        engine.truncate(at)
        assert far(engine.extend(shown), whole) < 0.02  # one 8-bit step that flips
        for row, expected in zip(engine.buffers(0, len(shown)), kept, strict=True):
            assert far(row, expected) < 0.02


def test_text_after_a_picture_is_scored_as_it_is_read(made: Made) -> None:
    engine, (picture, _) = made.engine, parts_of(made)
    shown = positions(made, [*TEXT, picture, *TEXT])
    rows = torch.cat(list(score(engine, shown, len(shown) - 5))).clone()
    for number in range(5):
        expected = engine.extend(shown[:len(shown) - 4 + number])[0]
        assert far(rows[number], expected) < 1e-3


def test_the_bundle_is_proved_with_its_media_on_this_machine(made: Made) -> None:
    rows = [row for row in made.bundle.golden() if row.media is not None]
    if "line" in made.kinds.values():
        pytest.skip("these random weights are sure of no answer to noise")
    assert rows
    found = pipeline.verify(made.bundle.path, Settings.from_environment())["checks"]
    assert found["golden_media"] == len(rows)
    assert found["as_on_phones"]


def test_a_picture_that_is_encoded_otherwise_is_found_out(
    made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "line" in made.kinds.values():
        pytest.skip("these random weights are sure of no answer to noise")
    encode = engines.encoded.encode
    monkeypatch.setattr(
        engines.encoded, "encode",
        lambda *given: torch.cat((-encode(*given)[..., :-1], encode(*given)[..., -1:]), -1))
    with pytest.raises(BundleCorrupt, match="gives another token"):
        pipeline.verify(made.bundle.path, Settings.from_environment())


def test_one_entry_of_an_encoder_that_is_another_is_found_out(made: Made) -> None:
    program, = made.bundle.manifest.programs
    senses = {f"{kind}_encoder": file.load() for kind, file in made.source.senses.items()}

    def proved() -> int:
        return prove_constants(made.bundle.path / program.file, stored(
            made.source.load(), made.source.tensor, senses))

    whole = proved()
    assert whole > prove_constants(made.bundle.path / program.file, stored(
        made.source.load(), made.source.tensor))
    for method, sense in senses.items():
        for name in ("positions", "layers.0.mlp_norm.weight", "layers.0.mlp.up.bias"):
            tensor = sense.encoder.state_dict()[name].view(-1)
            right = tensor[0].clone()
            tensor[0] += 1e-3
            with pytest.raises(ExportMismatch, match=f"{method}.encoder.{name}"):
                proved()
            tensor[0] = right
    assert proved() == whole


def test_the_manifest_says_what_is_read_and_what_each_encoder_takes(made: Made) -> None:
    manifest = made.bundle.manifest
    (entry,) = manifest.programs
    assert manifest.modalities == ("text", "picture", "recording")
    assert entry.methods == ("forward", "score", "token_embedding", "text_decoder",
                             "vision_encoder", "audio_encoder")
    senses = [file.load() for file in made.source.senses.values()]
    assert [each.weight_bytes for each in entry.encoders] == list(map(weight_bytes, senses))
    total = entry.weight_bytes + sum(each.weight_bytes for each in entry.encoders)
    assert total == manifest.files[entry.file].size
    tensors = made.source.load().state_dict().values()
    weights = sum(each.numel() * each.element_size() for each in tensors)
    assert entry.weight_bytes < 1.2 * weights + 300_000  # once, in however many methods it is


def test_the_stock_runner_gives_our_greedy_text(made: Made) -> None:
    engine, (picture, recording) = made.engine, parts_of(made)
    plain = engine.tokenizer
    first, second = plain.encode("the weather is"), plain.encode("what is the weather in Paris")
    pixels = torch.frombuffer(bytearray(picture.data), dtype=torch.uint8)
    image = ["picture", pixels.view(3, picture.height, picture.width).tolist()]
    sound = ["recording",
             torch.frombuffer(bytearray(recording.data), dtype=torch.float32).tolist()]
    begin, end = ["text", "the weather is"], ["text", "what is the weather in Paris"]
    asked = {
        "program": str(made.bundle.path / made.bundle.manifest.programs[0].file),
        "tokenizer": str(made.bundle.tokenizer_path), "tokens": 12,
        "conversations": [[begin, image, end], [sound, end], [begin, image, end, sound, begin]]}
    done = subprocess.run(
        [sys.executable, "-m", "tests.unit.export.stock_multimodal"], input=json.dumps(asked),
        capture_output=True, text=True, check=True)
    shown: list[list[int | Medium]] = [
        [*first, picture, *second], [recording, *second],
        [*first, picture, *second, recording, *first]]
    for answer, ours in zip(json.loads(done.stdout), shown, strict=True):
        engine.truncate(0)
        ids = [choice.id for choice in generate(
            engine, positions(made, ours), Decoding(sampler=Sampler(Sampling()), limit=12))]
        said = bytes.fromhex(answer).decode("utf-8", "replace")
        assert said == engine.tokenizer.decode(ids)


def test_a_method_that_computes_something_else_is_not_written(
    tmp_path: Path, tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = media_models.checkpoint(tmp_path / "source", tokenizer_dir, recording=None)

    def turned(self: object, x: torch.Tensor) -> torch.Tensor:
        return forward(self, x.flip(3))

    forward = xnnpack_sense._Patches.forward
    monkeypatch.setattr(xnnpack_sense._Patches, "forward", turned)
    with pytest.raises(ExportMismatch, match=r"vision_encoder encoder\.layers\.0"):
        pipeline.export(source, tmp_path / "x.cloister", chunk=16)
    assert not (tmp_path / "x.cloister").exists()
