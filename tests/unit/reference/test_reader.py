"""The reader of lines learns, goes on where it was stopped, and is kept as it is."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rapidfuzz.distance import Levenshtein

from cloister.distill.optimizer import Optimizer
from cloister.distill.schedule import Schedule
from cloister.model.encoder import EncoderShape, Stem
from cloister.model.projector import TokenProjector
from cloister.reference import checkpoint_path, ctc, reader, reading, speller
from cloister.reference.batches import Lesson, stacked
from cloister.reference.ctc import CtcModel
from cloister.reference.lines import ALPHABET, label
from cloister.reference.pictures import Camera, Picture
from cloister.reference.reader import Lines
from cloister.reference.trainer import TrainerSettings, train
from cloister.tokenizer import Tokenizer

from .test_pictures import FACES, TEXTS

SMALL = replace(reader.config(), encoder=EncoderShape(
    stem=Stem.CONVOLUTIONS_2D, rows=32, positions=128, hidden_size=64, layers=2, heads=2,
    feed_forward=128, halvings=2, width=8))
FOLDER = checkpoint_path("pro")
TOKENIZER = Tokenizer.from_files(FOLDER / "tokenizer.json", FOLDER / "chat_template.jinja")


@pytest.fixture(scope="module")
def camera() -> Camera:
    return Camera(TEXTS, FACES)


@pytest.mark.slow
def test_eight_lines_are_learnt_by_heart_in_seconds(camera: Camera) -> None:
    lines = [camera.line(f"{number}", strength=0.5, longest=12) for number in range(8)]
    batch = stacked(lines)
    x_BRW = torch.from_numpy(batch.x_BRW)
    model = CtcModel(SMALL, ALPHABET, 4096, pieces=speller.pieces(TOKENIZER))
    assert model.read(x_BRW) != batch.texts
    ends = [speller.ends(text, TOKENIZER) for text in batch.texts]
    spelled = [text.encode() for text in batch.texts]
    optimizer = Optimizer(model, Schedule(autocast=False), blocks=model.blocks)
    for _ in range(150):
        model.loss(model.features(x_BRW), batch.texts, ends, spelled).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step(8e-3)
    assert model.read(x_BRW) == batch.texts
    # And the program reads the very tokens.
    sense = ctc.token_sense(model, 24)
    assert isinstance(sense.projector, TokenProjector)
    with torch.inference_mode():
        _, found = sense.projector.found(sense.encoder(model.features(x_BRW)))
    read = [[id_ for id_ in row.tolist() if id_ != 4096] for row in found]
    assert read == [TOKENIZER.encode(text) for text in batch.texts]


def test_a_lesson_gives_pictures_with_their_characters_and_texts_with_where_their_tokens_end(
    camera: Camera, tmp_path: Path
) -> None:
    lines = Lines(camera=camera, lesson=Lesson(rows=4, ramp=100, seed=0), tokenizer=TOKENIZER)
    with lines.supply(3) as supply:
        batch = next(iter(supply))
    assert batch.x.shape[:2] == (4, 32) and batch.x.dtype == torch.uint8
    for text, ends in zip(batch.spelled, batch.tokens, strict=True):
        assert len(text) == len(ends)
        assert sum(ends) == len(TOKENIZER.encode(label(text.decode())))
    model = CtcModel(SMALL, ALPHABET, TOKENIZER.vocab_size, pieces=speller.pieces(TOKENIZER))
    run = train(model, lines, TrainerSettings(steps=2), tmp_path)
    assert len(run.losses) == 2 and run.tokens > 0


def test_characters_read_as_others_are_counted() -> None:
    class Reads(CtcModel):
        def read(self, x: torch.Tensor) -> list[str]:
            return ["P1ay"] * len(x)

    pixels = torch.full((32, 64), 255, dtype=torch.uint8).numpy()
    pictures = [Picture(pixels_HW=pixels, text="Play")] * 3
    found = reading.confusions(Reads(SMALL, ALPHABET, 8), pictures)
    assert found == [("l", "1", 3)]


def test_a_note_is_measured_line_by_line_and_by_how_it_is_cut(camera: Camera) -> None:
    class Reads(CtcModel):
        def read(self, x: torch.Tensor) -> list[str]:
            return ["a"] * len(x)

    clean = reading.notes(Reads(SMALL, ALPHABET, 8), camera, count=5)["notes, clean"]
    pages = [camera.page(f"test clean {number}", strength=0.0) for number in range(5)]
    texts = ["\n".join(page.texts) for page in pages]
    read = ["\n".join("a" * len(page.texts)) for page in pages]
    errors = sum(map(Levenshtein.distance, read, texts))
    assert clean == {
        "lines": 5, "character_errors": round(errors / sum(map(len, texts)), 4), "whole": 0.0,
        "cut": 1.0}
