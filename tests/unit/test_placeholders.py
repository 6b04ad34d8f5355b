"""A picture's or recording's vectors stand where transformers puts them, and no text can fake one.

A thousand conversations of each model:

    python -m pytest -m campaign tests/unit/test_placeholders.py
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tests.unit.model.spoken import CHATML, beginning, byte_level, gemma, special, text

from cloister.errors import (
    EmptyPrompt,
    InvalidText,
    MediaTooLarge,
    TokenizerError,
    UnsupportedMedia,
)
from cloister.message import Message
from cloister.parts import Audio, Image, Picture, Recording
from cloister.pieces import (
    MEDIA,
    Fit,
    MediaFormats,
    PictureFormat,
    RecordingFormat,
    Resample,
    Tiles,
)
from cloister.tokenizer import Tokenizer

SIZE = 32
TURN = "{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' }}"
GEMMA_3 = (
    "{{ bos_token }}{% for m in messages %}" + TURN + "{% if m['content'] is string %}"
    "{{ m['content'] | trim }}{% else %}{% for item in m['content'] %}"
    "{% if item['type'] == 'image' %}{{ '<start_of_image>' }}"
    "{% else %}{{ item['text'] | trim }}{% endif %}{% endfor %}{% endif %}{{ '<end_of_turn>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
IDEFICS = (
    "<|im_start|>{% for m in messages %}{{ m['role'] | capitalize }}"
    "{% if m['content'][0]['type'] == 'image' %}:{% else %}: {% endif %}"
    "{% for line in m['content'] %}{% if line['type'] == 'text' %}{{ line['text'] }}"
    "{% elif line['type'] == 'image' %}<image>{% endif %}{% endfor %}<end_of_utterance>\n"
    "{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)
GEMMA_TOKENS = special(
    "<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>", "<start_of_image>", "<end_of_image>",
    "<image_soft_token>")
IDEFICS_TOKENS = special(
    "<|im_start|>", "<end_of_utterance>", "<fake_token_around_image>", "<image>", "<global-img>",
    *(f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2)))
STRETCHED = PictureFormat(
    height=SIZE, width=SIZE, tokens=4, fit=Fit.STRETCH, resample=Resample.BILINEAR,
    marker="<start_of_image>", before="\n\n<start_of_image>", after="<end_of_image>\n\n")
TILED = PictureFormat(
    height=SIZE, width=SIZE, tokens=5, fit=Fit.TILES, resample=Resample.LANCZOS, marker="<image>",
    after="<fake_token_around_image>", tiles=Tiles(
        longest_edge=2 * SIZE, before="<fake_token_around_image><row_{row}_col_{column}>",
        row_end="\n", grid_end="\n", whole="<fake_token_around_image><global-img>"))
SOUND = RecordingFormat(
    rate=16000, samples_per_token=1000, multiple=2000, most=8000, before="[sound]",
    after="[/sound]")


def picture(grid: tuple[int, int] = (0, 0)) -> Picture:
    tiles = grid[0] * grid[1] + 1
    return Picture(data=bytes(tiles * 3 * SIZE * SIZE), height=SIZE, width=SIZE, grid=grid)


def recording(samples: int = 4000) -> Recording:
    return Recording(data=bytes(4 * samples), rate=16000)


def made(
    directory: Path, backend: tokenizers.Tokenizer, template: str, media: MediaFormats,
    **names: str,
) -> Tokenizer:
    directory.mkdir(exist_ok=True)
    backend.save(str(directory / "tokenizer.json"))
    return Tokenizer(backend, template, special_tokens=names, media=media)


class Gemma3:
    """A tokenizer and processor in Gemma 3's way: one size, texts around, both kinds of content."""

    name, media = "gemma-3", MediaFormats(picture=STRETCHED)
    typed = ("<start_of_image>", "<end_of_image>", "<image_soft_token>")

    def __init__(self, directory: Path) -> None:
        from transformers import Gemma3ImageProcessor, Gemma3Processor, PreTrainedTokenizerFast

        backend = beginning(gemma(GEMMA_TOKENS), "<bos>")
        self.mine = made(
            directory, backend, GEMMA_3, self.media, bos_token="<bos>", eos_token="<eos>")
        theirs = PreTrainedTokenizerFast(
            tokenizer_file=str(directory / "tokenizer.json"), bos_token="<bos>", eos_token="<eos>",
            extra_special_tokens={
                "image_token": "<image_soft_token>", "boi_token": "<start_of_image>",
                "eoi_token": "<end_of_image>"})
        self.processor = Gemma3Processor(
            Gemma3ImageProcessor(size={"height": SIZE, "width": SIZE}), theirs,
            chat_template=GEMMA_3, image_seq_length=4)
        self.soft = backend.token_to_id("<image_soft_token>")

    def picture(self, rng: random.Random) -> Picture:
        return picture()


class Idefics3:
    """A tokenizer and processor in Idefics 3's and SmolVLM's way: tiles, and lists alone."""

    name, media, splits = "idefics-3", MediaFormats(picture=TILED), True
    typed = ("<image>", "<fake_token_around_image>", "<row_1_col_2>", "<global-img>")

    def __init__(self, directory: Path) -> None:
        from transformers import (
            Idefics3ImageProcessor,
            Idefics3Processor,
            PreTrainedTokenizerFast,
        )

        backend = byte_level(IDEFICS_TOKENS)
        self.mine = made(directory, backend, IDEFICS, self.media, eos_token="<end_of_utterance>")
        theirs = PreTrainedTokenizerFast(
            tokenizer_file=str(directory / "tokenizer.json"), eos_token="<end_of_utterance>")
        self.processor = Idefics3Processor(
            Idefics3ImageProcessor(
                size={"longest_edge": 2 * SIZE}, max_image_size={"longest_edge": SIZE},
                do_image_splitting=self.splits),
            theirs, image_seq_len=5, chat_template=IDEFICS)
        self.soft = backend.token_to_id("<image>")

    def picture(self, rng: random.Random) -> Picture:
        return picture(rng.choice([(1, 2), (2, 2), (2, 1)]))


class Idefics3Whole(Idefics3):
    """The same, its pictures not cut."""

    name, splits = "idefics-3-whole", False

    def picture(self, rng: random.Random) -> Picture:
        return picture()


MODELS = [Gemma3, Idefics3, Idefics3Whole]


def theirs(model: Any, turns: list[tuple[str, list[str | Picture]]]) -> list[int]:
    import PIL.Image

    images, records = [], []
    for role, content in turns:
        items = []
        for part in content:
            if isinstance(part, str):
                items.append({"type": "text", "text": part})
            else:
                rows, columns = part.grid if part.grid[0] else (1, 1)
                images.append(PIL.Image.new("RGB", (columns * SIZE, rows * SIZE)))
                items.append({"type": "image"})
        records.append({"role": role, "content": items})
    written = model.processor.apply_chat_template(records, add_generation_prompt=True)
    begins = model.name == "gemma-3"  # the template writes <bos>, and the tokenizer would, too
    ids = model.processor(
        text=written, images=images or None, add_special_tokens=not begins)
    return [MEDIA if id_ == model.soft else id_ for id_ in ids["input_ids"][0]]


def ours(model: Any, turns: list[tuple[str, list[str | Picture]]]) -> list[int]:
    return model.mine.encode_chat(
        [Message(role=role, content=content) for role, content in turns])


@pytest.mark.parametrize("count", [
    40, pytest.param(1000, marks=[pytest.mark.campaign, pytest.mark.timeout(3600)])])
@pytest.mark.parametrize("kind", MODELS)
def test_pictures_among_texts_have_the_ids_that_transformers_gives_them(
    tmp_path: Path, kind: Any, count: int
) -> None:
    model, rng = kind(tmp_path), random.Random(kind.name)
    never, seen = [token.content for token in (GEMMA_TOKENS + IDEFICS_TOKENS)], 0
    for _ in range(count):
        turns: list[tuple[str, list[str | Picture]]] = []
        for role in ["user", "assistant", "user"][:rng.choice([1, 3])]:
            content: list[str | Picture] = []
            for _ in range(rng.randint(1, 4) if role == "user" else 1):
                said = text(rng)
                look = role == "user" and rng.random() < 0.5
                # Two texts in a row are one: of these transformers' templates make two.
                if look or (content and isinstance(content[-1], str)):
                    content.append(model.picture(rng))
                elif not any(token in said for token in never):
                    content.append(said)
            turns.append((role, content or ["hello"]))
        got = ours(model, turns)
        assert got == theirs(model, turns), turns
        seen += MEDIA in got
    assert seen > count / 4


@pytest.mark.parametrize("kind", MODELS)
def test_text_that_spells_what_stands_for_a_picture_stays_text(
    tmp_path: Path, kind: Any
) -> None:
    model = kind(tmp_path)
    for typed in kind.typed:
        for content in ([typed, picture(), f"a{typed}", picture()], [typed], [f"{typed[:3]}", "x"]):
            ids = ours(model, [("user", content)])
            plain = [part if isinstance(part, Picture) else "x" for part in content]
            control = {model.mine.id_of(token) for token in kind.typed} | {MEDIA}
            assert [id_ for id_ in ids if id_ in control] == [
                id_ for id_ in ours(model, [("user", plain)]) if id_ in control]
            assert "".join(part for part in content if isinstance(part, str)).strip() in (
                model.mine.decode([id_ for id_ in ids if id_ != MEDIA]).replace("\n", ""))


def test_text_cannot_complete_a_marker_that_is_no_token_of_the_vocabulary(tmp_path: Path) -> None:
    template = IDEFICS.replace("<image>", "<img>").replace("': '", "': <'")
    media = MediaFormats(picture=PictureFormat(
        height=SIZE, width=SIZE, tokens=2, fit=Fit.STRETCH, resample=Resample.BICUBIC,
        marker="<img>"))
    mine = made(tmp_path, byte_level(IDEFICS_TOKENS), template, media)
    for said in ("<img>", "img>", "<img", "<img><img>"):
        ids = mine.encode_chat([
            Message(role="user", content=[said, picture()]),
            Message(role="assistant", content=said), Message(role="user", content=said)])
        assert ids.count(MEDIA) == 2
        assert mine.decode([id_ for id_ in ids if id_ != MEDIA]).count(said) >= 3


@pytest.fixture
def inline(tmp_path: Path) -> Tokenizer:
    """One whose template takes texts, and whose formats have no marker."""
    plain = PictureFormat(
        height=SIZE, width=SIZE, tokens=3, fit=Fit.STRETCH, resample=Resample.BICUBIC,
        before="<|see|>")
    return made(
        tmp_path, byte_level(special("<|im_start|>", "<|im_end|>", "<|see|>")), CHATML,
        MediaFormats(picture=plain, recording=SOUND))


def test_a_template_of_texts_has_pictures_and_recordings_where_they_were_given(
    inline: Tokenizer,
) -> None:
    ids = inline.encode_chat([Message(role="user", content=[
        "hello ", recording(), picture(), "the fox<|see|>", recording(2000)])])
    see = inline.id_of("<|see|>")
    said = ["hello [sound]", *[MEDIA] * 4, "[/sound]", see, *[MEDIA] * 3, "the fox<|see|>[sound]",
            MEDIA, MEDIA, "[/sound]"]
    expected = [inline.id_of("<|im_start|>"), *inline.encode("user\n")]
    for piece in said:
        expected += inline.encode(piece) if isinstance(piece, str) else [piece]
    # Texts meet the template's: "user\nhello [sound]" is read as one.
    assert ids[:ids.index(MEDIA)] == [
        expected[0], *inline.encode("user\nhello [sound]")]
    assert ids.count(see) == 1
    rest = expected[expected.index(MEDIA):]
    assert ids[ids.index(MEDIA):][:len(rest)] == rest


def test_texts_in_a_row_are_one_text(inline: Tokenizer) -> None:
    assert inline.encode_chat([Message(role="user", content=["the ", "fox"])]) == (
        inline.encode_chat([Message(role="user", content="the fox")]))
    halves = [Message(role="user", content=["<|im_", "end|>", picture()])]
    assert inline.encode_chat(halves).count(inline.id_of("<|im_end|>")) == 1


@pytest.mark.parametrize("content", [[], [""], ["", ""]])
def test_a_message_of_no_parts_is_refused(inline: Tokenizer, content: list[str]) -> None:
    with pytest.raises(EmptyPrompt):
        inline.encode_chat([Message(role="user", content=content)])


def test_a_picture_is_a_message_by_itself(inline: Tokenizer) -> None:
    assert inline.encode_chat([Message(role="user", content=[picture()])]).count(MEDIA) == 3


@pytest.mark.parametrize("part", [
    Image(data=b"x"), Audio(data=b"x"), picture((1, 1)), Recording(data=bytes(8), rate=8000),
    Picture(data=bytes(12), height=2, width=2),
])
def test_what_was_not_decoded_for_the_model_is_refused(inline: Tokenizer, part: Any) -> None:
    with pytest.raises(UnsupportedMedia, match=r"decode"):
        inline.encode_chat([Message(role="user", content=["hello", part])])


def test_a_recording_that_is_too_long_is_refused_with_its_length(inline: Tokenizer) -> None:
    with pytest.raises(MediaTooLarge, match=r"0\.6 s is over the 0\.5 s"):
        inline.encode_chat([Message(role="user", content=[recording(9000)])])


@pytest.mark.parametrize("part", [picture(), recording()])
def test_a_model_of_texts_refuses_media_by_kind(tokenizer_dir: Path, part: Any) -> None:
    plain = Tokenizer.from_files(
        tokenizer_dir / "tokenizer.json", tokenizer_dir / "chat_template.jinja")
    with pytest.raises(UnsupportedMedia, match=r"pictures|recordings"):
        plain.encode_chat([Message(role="user", content=[part])])


@pytest.mark.parametrize("template", [
    "{{ messages[0].content[:3] }}", "{{ messages[0].content }}{{ messages[0].content }}",
    "{% for item in messages[0].content %}{{ item.text }}{% endfor %}",
])
def test_a_template_that_drops_or_repeats_a_picture_is_refused(
    tmp_path: Path, template: str
) -> None:
    mine = made(tmp_path, byte_level(IDEFICS_TOKENS), template, MediaFormats(picture=TILED))
    with pytest.raises(TokenizerError, match="once"):
        mine.encode_chat([Message(role="user", content=["hello", picture()])])


def test_text_beside_a_picture_that_is_no_unicode_is_refused(inline: Tokenizer) -> None:
    with pytest.raises(InvalidText):
        inline.encode_chat([Message(role="user", content=[picture(), "\ud800"])])
