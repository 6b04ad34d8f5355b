"""Recordings and pictures with words in them: what a tier's senses learn from and are measured on.

To learn from: speech of the cache's training part, in rooms and noise, for `call` and `order`; and
lines in the fonts that are trained on, for `read`, `redact` and `call`. To measure: orders that
people spoke, requests by voices never heard, and lines in fonts never seen.

Shapes: B batch, N samples, R rows, W columns, P positions of an encoder, D their size.
"""

from __future__ import annotations

import random
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from cloister.corpus import Example, read
from cloister.distill.sense import Clip
from cloister.message import Message
from cloister.model.generate import generate
from cloister.model.senses import tensor
from cloister.pairs import pair
from cloister.parts import Audio, Picture, Recording
from cloister.pieces import Fit, MediaFormats, PictureFormat, RecordingFormat, Resample
from cloister.progress import silent
from cloister.reference import acoustics, reading, utterances, vocabulary
from cloister.reference.batches import stacked
from cloister.reference.drawing import HEIGHT, WIDTH
from cloister.reference.fonts import Kind
from cloister.reference.lines import LONGEST, Texts, clean
from cloister.reference.pictures import Camera
from cloister.reference.speech import RATE
from cloister.runtime.prompt import decoded

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path

    from cloister.model.sense import Sense, SenseConfig
    from cloister.model.transformer import Decoder
    from cloister.progress import Progress
    from cloister.reference import pictures
    from cloister.reference.fonts import Face
    from cloister.reference.mixture import Mixture
    from cloister.reference.utterances import Utterance
    from cloister.tokenizer import Tokenizer

    Batch = tuple[list[Example], torch.Tensor]  # the words as text, and what a sense reads

__all__ = [
    "CAMERA",
    "answered",
    "clip",
    "encoded",
    "formats",
    "heard",
    "people",
    "seen",
    "shown",
    "single",
    "spoken",
    "written",
]

_ROWS = 16  # of a batch
_SILENCE = 0.2, 6.0  # seconds around speech, drawn for each batch
_AROUND = 2 * RATE  # samples of silence around what is measured, as `hearing` has it
_SHARES = {"read": 0.5, "redact": 0.3, "call": 0.2}  # of the pictures to learn from
_MEASURED = 300  # pictures of each task, and lines of each wear
_PRINTED = (Kind.SANS, Kind.SERIF, Kind.MONO, Kind.DISPLAY)
CAMERA = {  # what a task is measured on: the kinds of fonts, and how worn the lines are
    "printed": (_PRINTED, 0.0), "printed, half worn": (_PRINTED, 0.5),
    "by hand or in dots": ((Kind.HAND, Kind.DOTS), 0.5)}


class _Whole(Texts):
    """Texts that each are one line, none cut."""

    def __init__(self, texts: Sequence[str]) -> None:
        self._whole = texts

    def line(self, rng: random.Random, _longest: int = LONGEST) -> str:
        return rng.choice(self._whole)


def formats(eye: SenseConfig, ear: SenseConfig) -> MediaFormats:
    """Return what a tier takes: lines of text, and recordings of up to the encoder's longest."""
    samples = ear.samples_per_vector
    return MediaFormats(
        picture=PictureFormat(
            height=HEIGHT, width=WIDTH, tokens=eye.vectors, fit=Fit.LINE,
            resample=Resample.BILINEAR, fewer=True),
        recording=RecordingFormat(
            rate=RATE, samples_per_token=samples, multiple=samples, most=ear.vectors * samples,
            fewer=True))


def heard(cache: Path, count: int, form: RecordingFormat, seed: int) -> Iterator[Batch]:
    """Yield recordings to learn from, float32[B, 1, N], those of a batch of about one length.

    Raises:
        DataError: the recordings are missing or malformed.
    """
    there = [each for each in utterances.recorded(cache, "train") if each.task != "sentence"]
    random.Random(f"clips {seed}").shuffle(there)
    chosen = sorted(there[:count], key=lambda each: utterances.length(cache, each))
    begins = list(range(0, len(chosen), _ROWS))
    random.Random(seed).shuffle(begins)
    for at in begins:
        rng, batch = np.random.default_rng((seed, at)), chosen[at:at + _ROWS]
        speech = [torch.from_numpy(utterances.samples(cache, each)) for each in batch]
        lengths = [min(len(each), form.most) for each in speech]
        length = max(lengths) + int(rng.uniform(*_SILENCE) * RATE)
        length = min(form.padded(length), form.most)
        x_BN = nn.utils.rnn.pad_sequence(speech, batch_first=True)[:, :length]
        x_BN = acoustics.record(x_BN, lengths, length, rng, others=x_BN)
        yield [_request(each) for each in batch], x_BN.unsqueeze(1)


def seen(mixture: Mixture, faces: Sequence[Face], count: int, seed: int) -> Iterator[Batch]:
    """Yield pictures of lines to learn from, uint8[B, 3, R, W].

    Raises:
        DataError: no font draws a text.
    """
    rows, texts = list(mixture.examples(1, seed)), mixture.texts(seed)
    for task, share in _SHARES.items():
        camera, targets = _camera(task, rows, texts, faces)
        for at in range(0, round(share * count), _ROWS):
            rng = random.Random(f"clips {seed} {task} {at}")
            batch = [camera.line(f"{seed} {task} {at} {row}", strength=rng.random())
                     for row in range(_ROWS)]
            x_BRW = torch.from_numpy(stacked(batch, WIDTH).x_BRW)
            yield ([_example(task, each.text, targets) for each in batch],
                   x_BRW.unsqueeze(1).expand(-1, 3, -1, -1))


def people(folder: Path, form: MediaFormats, *, trim: bool) -> list[Example]:
    """Return the orders that people spoke.

    Raises:
        DataError, MediaUnreadable, MediaTooLarge: the recordings are missing or malformed.
    """
    return [
        replace(each, turns=decoded((
            Message(role="system", content=each.task),
            Message(role="user", content=(Audio.open(path, trim=trim),))), form))
        for each in read(folder) for _, path in each.files]


def spoken(cache: Path, form: RecordingFormat) -> list[Example]:
    """Return the requests of the task `call` that voices never heard speak, the same each time.

    Raises:
        DataError: the recordings are missing or malformed.
    """
    found = []
    asked = [each for each in utterances.recorded(cache, "measure") if each.task == "call"]
    for number, each in enumerate(asked):
        speech_N = utterances.samples(cache, each)
        length = min(len(speech_N) + _AROUND, form.most)
        x_1N = acoustics.record(torch.from_numpy(speech_N)[None], [len(speech_N)], length,
                                np.random.default_rng(number))
        part = Recording(data=x_1N.numpy().tobytes(), rate=RATE)
        found.append(_with(_request(each), part))
    return found


def shown(mixture: Mixture, faces: Sequence[Face]) -> dict[str, list[Example]]:
    """Return what is measured with pictures in `faces`, by what it is."""
    texts = mixture.held_out_texts
    found = {
        f"lines, {wear}": [_picture(_example("read", each.text, {}), each) for each in lines]
        for wear, lines in reading.samples(Camera(texts, faces), _MEASURED).items()}
    for task in ("redact", "call"):
        for name, (kinds, strength) in CAMERA.items():
            camera, targets = _camera(task, mixture.held_out[task], texts, [
                face for face in faces if face.family.kind in kinds])
            lines = (
                camera.line(f"test {task} {row}", strength=strength) for row in range(_MEASURED))
            found[f"{task} by camera, {name}"] = [
                _picture(_example(task, each.text, targets), each) for each in lines]
    return found


def written(examples: Iterable[Example]) -> list[Example]:
    """Return what recordings or pictures say, as text."""
    return [replace(each, turns=(), files=()) for each in examples]


@torch.no_grad()
def encoded(
    batches: Iterable[Batch], sense: Sense, tokenizer: Tokenizer, progress: Progress = silent,
    total: int = 0
) -> list[Clip]:
    """Return clips of what `sense`, without a projector, gives; their answers are the labels'."""
    found: list[Clip] = []
    for examples, x in batches:
        found += [clip(tokenizer, example, x_PD)
                  for example, x_PD in zip(examples, sense(x), strict=True)]
        progress("encode", len(found), max(total, len(found)))
    return found


def clip(tokenizer: Tokenizer, example: Example, x_PD: torch.Tensor) -> Clip:
    """Return a clip of an example, and of what an encoder gives for its recording or picture.

    Where nobody wrote down what is said, an example has no input, and a clip no words.
    """
    end, _, user, _ = (tokenizer.id_of(marker) for marker in vocabulary.SPECIAL)
    text = example.input or "-"
    prompt, answer = pair(tokenizer, replace(example, input=text, turns=(), files=()))
    begin = prompt.index(user) + 1 if user is not None else 0
    stop = prompt.index(end, begin) if end is not None else len(prompt)
    words = prompt[begin:stop] if example.input else []
    return Clip(x_ND=x_PD, before=tuple(prompt[:begin]), words=tuple(words),
                after=tuple(prompt[stop:]), answer=tuple(answer))


def single(examples: Iterable[Example], form: MediaFormats) -> Iterator[Batch]:
    """Yield examples that have a recording or a picture one by one, as the program reads them."""
    for example in examples:
        (part,) = example.turns[-1].media
        assert isinstance(part, Picture | Recording)
        yield [example], tensor(part, form.of(part))


def answered(clips: Sequence[Clip], teacher: Decoder, end: int) -> list[Clip]:
    """Return clips with the greedy answers of `teacher` to their words, but those without end."""
    limit = 2 * max(len(each.answer) for each in clips) + 16
    prompts = [[*each.before, *each.words, *each.after] for each in clips]
    said = generate(teacher, prompts, end=(end,), limit=limit)
    return [replace(each, answer=(*answer, end))
            for each, answer in zip(clips, said, strict=True) if len(answer) < limit]


def _camera(
    task: str, examples: Iterable[Example], texts: Texts, faces: Sequence[Face]
) -> tuple[Camera, dict[str, str]]:
    """Return a camera of the texts of a task, and the answers to them; `read` has any lines."""
    if task == "read":
        return Camera(texts, faces), {}
    targets = {
        each.input: each.target for each in examples
        if each.task == task and len(each.input) <= LONGEST and clean(each.input) == each.input}
    return Camera(_Whole(list(targets)), faces), targets


def _example(task: str, text: str, targets: dict[str, str]) -> Example:
    return Example(task=task, input=text, target=targets.get(text, text))


def _request(each: Utterance) -> Example:
    return Example(task=each.task, input=each.text, target=each.target)


def _picture(example: Example, picture: pictures.Picture) -> Example:
    x_RW = stacked([picture], WIDTH).x_BRW[0]
    data = np.broadcast_to(x_RW, (3, *x_RW.shape)).tobytes()
    return _with(example, Picture(data=data, height=HEIGHT, width=WIDTH))


def _with(example: Example, part: Picture | Recording) -> Example:
    """Return an example that is asked with `part` in place of its text, which it keeps."""
    return replace(example, turns=(
        Message(role="system", content=example.task), Message(role="user", content=(part,))))
