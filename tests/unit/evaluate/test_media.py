"""Pictures and recordings of a data set are answered as they are in a conversation."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest
import soundfile
import torch
from PIL import Image as Pillow
from tests.unit.model.test_sense import SHAPE, checkpoint

from cloister import corpus
from cloister.errors import MediaUnreadable, UnsupportedMedia
from cloister.evaluate.report import evaluate
from cloister.evaluate.subject import CheckpointSubject
from cloister.media import read
from cloister.model import multimodal
from cloister.model.senses import Senses, tensor
from cloister.parts import Image, Picture
from cloister.pieces import MEDIA, Fit


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    Pillow.fromarray(rng.integers(256, size=(40, 30, 3), dtype=np.uint8)).save(folder / "a.png")
    soundfile.write(folder / "b.wav", rng.normal(0, 0.1, 4000).astype(np.float32), 16_000)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in (
        {"task": "read", "image": "a.png", "input": "what", "target": "Milk"},
        {"task": "order", "audio": "b.wav",
         "target": corpus.tool_call("order", [("size", "large")])},
        {"task": "redact", "input": "I am Jo", "target": "I am [NAME]"})))
    return folder


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory, tokenizer_dir: Path) -> CheckpointSubject:
    return CheckpointSubject(
        checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny", tokenizer_dir,
                   shape=replace(SHAPE, context=128)))


def test_each_task_has_its_scores_whatever_it_is_asked_by(
    subject: CheckpointSubject, data: Path
) -> None:
    found = evaluate(subject, corpus.read(data), against=subject)
    assert {"read.cer", "read.wer", "order.slot_f1", "redact.exact"} <= found.metrics.keys()
    assert found.metrics["mean_kld"] == pytest.approx(0, abs=1e-6)
    assert found.metrics["flips"] == 0


def test_a_picture_that_cannot_be_read_is_named_by_its_place(
    subject: CheckpointSubject, tmp_path: Path
) -> None:
    (tmp_path / "a.png").write_bytes(b"no picture")
    (tmp_path / "rows.jsonl").write_text(
        json.dumps({"task": "read", "image": "a.png", "target": "Milk"}))
    with pytest.raises(MediaUnreadable, match=r"^rows\.jsonl:1: "):
        evaluate(subject, corpus.read(tmp_path))


def test_a_model_of_texts_refuses_pictures_by_place(
    subject: CheckpointSubject, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subject, "formats", None)
    with pytest.raises(UnsupportedMedia, match=r"^rows\.jsonl:1: "):
        evaluate(subject, corpus.read(data))


@torch.no_grad()
def test_logits_and_answers_are_those_of_vectors_among_embeddings(
    subject: CheckpointSubject, data: Path
) -> None:
    senses, formats = subject._senses, subject.formats
    assert formats is not None
    assert formats.picture is not None
    picture = read(Image.open(data / "a.png"), formats)
    ids = [5, *[MEDIA] * formats.picture.tokens, 6, 7]
    vectors_ME = next(iter(senses._senses.values()))(tensor(picture, formats.picture))[0]
    wanted = multimodal.logits(senses._decoder, torch.tensor([ids]), vectors_ME)[0]
    assert (senses.logits(ids, [picture], 5) - wanted[5:]).abs().max() < 1e-5
    (first, *rest) = senses.answer(ids, [picture], end=(), limit=3)
    assert first == int(wanted[-1].argmax())
    assert len(rest) == 2
    assert senses.answer(ids, [picture], end=(first,), limit=3) == []


def test_what_an_encoder_leaves_out_is_no_position(
    subject: CheckpointSubject, monkeypatch: pytest.MonkeyPatch
) -> None:
    senses, formats = subject._senses, subject.formats
    assert formats is not None
    assert formats.picture is not None
    part = Picture(data=bytes(3 * 32 * 32), height=32, width=32)
    whole = senses._senses.copy()
    kind, sense = next(iter(whole.items()))
    fewer = [5, *[MEDIA] * 4, 6]
    shown = sense(tensor(part, formats.picture))[:, :2]
    monkeypatch.setitem(senses._senses, kind, lambda _: shown)
    wanted = multimodal.logits(
        senses._decoder, torch.tensor([[5, MEDIA, MEDIA, 6]]), shown[0])[0, -1:]
    assert (senses.logits(fewer, [part], 5) - wanted).abs().max() < 1e-5


def test_lines_of_a_note_are_read_one_after_the_other(
    subject: CheckpointSubject, monkeypatch: pytest.MonkeyPatch
) -> None:
    senses, formats = subject._senses, subject.formats
    assert formats is not None
    assert formats.picture is not None
    lines = msgspec.structs.replace(
        formats, picture=msgspec.structs.replace(formats.picture, fit=Fit.LINE))
    monkeypatch.setattr(senses, "formats", lines)
    parts = [Picture(data=bytes([shade]) * 3 * 32 * 32, height=32, width=32) for shade in (9, 200)]
    note = Picture(data=parts[0].data + parts[1].data, height=32, width=32, lines=2)
    ids = [5, *[MEDIA] * 4, 7, *[MEDIA] * 4, 6]
    assert torch.equal(senses.logits(ids, [note], 9), senses.logits(ids, parts, 9))


def test_a_checkpoint_of_texts_has_no_senses(tokenizer_dir: Path, tmp_path: Path) -> None:
    plain = checkpoint(tmp_path / "plain", tokenizer_dir, senses=(), media=None)
    subject = CheckpointSubject(plain)
    assert subject.formats is None
    assert Senses(plain, plain.load())._senses == {}
