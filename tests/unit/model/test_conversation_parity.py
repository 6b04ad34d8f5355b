"""From a conversation with picture files to logits: what transformers' processor and model give."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("PIL.Image")

from tests.unit.model import multimodal_models as tiny  # noqa: E402
from tests.unit.model.spoken import beginning, byte_level, gemma  # noqa: E402
from tests.unit.model.test_processor_parity import photo, pixels, png  # noqa: E402
from tests.unit.test_placeholders import (  # noqa: E402
    GEMMA_3,
    GEMMA_TOKENS,
    IDEFICS,
    IDEFICS_TOKENS,
)

from cloister import media  # noqa: E402
from cloister.message import Message  # noqa: E402
from cloister.model import multimodal  # noqa: E402
from cloister.model.imports import import_model  # noqa: E402
from cloister.model.sense_file import SenseKind  # noqa: E402
from cloister.parts import Image  # noqa: E402
from cloister.tokenizer import Tokenizer  # noqa: E402

TURNS: list[tuple[str, list[Any]]] = [
    ("user", [(70, 40), "What is this?"]), ("assistant", ["A cat."]),
    ("user", ["And", (32, 90), "or", (64, 64), "these two?"]),
]


def saved(directory: Path, layout: str) -> tuple[Any, Any]:
    """Return a model and the whole processor, both saved to `directory`."""
    backend = (
        beginning(gemma(GEMMA_TOKENS), "<bos>") if layout == "gemma3"
        else byte_level(IDEFICS_TOKENS))
    backend.save(str(directory / "tokenizer.json"))
    ids = backend.token_to_id
    text = {**tiny.TEXT, "vocab_size": backend.get_vocab_size() + 3}
    file = str(directory / "tokenizer.json")
    if layout == "gemma3":
        config = transformers.Gemma3Config(
            text_config={**text, "model_type": "gemma3_text", "sliding_window": 16,
                         "layer_types": ["sliding_attention"] * 2 + ["full_attention"],
                         "bos_token_id": ids("<bos>"), "eos_token_id": ids("<end_of_turn>")},
            vision_config={**tiny.PICTURE, "model_type": "siglip_vision_model"},
            mm_tokens_per_image=4, image_token_index=ids("<image_soft_token>"),
            boi_token_index=ids("<start_of_image>"), eoi_token_index=ids("<end_of_image>"))
        images = transformers.Gemma3ImageProcessorPil(size={"height": 32, "width": 32})
        processor = transformers.Gemma3Processor(
            images, transformers.PreTrainedTokenizerFast(
                tokenizer_file=file, bos_token="<bos>", eos_token="<end_of_turn>",
                extra_special_tokens={
                    "image_token": "<image_soft_token>", "boi_token": "<start_of_image>",
                    "eoi_token": "<end_of_image>"}),
            chat_template=GEMMA_3, image_seq_length=4)
    else:
        config = transformers.Idefics3Config(
            text_config={**text, "model_type": "llama", "bos_token_id": None,
                         "eos_token_id": ids("<end_of_utterance>")},
            vision_config=tiny.PICTURE, scale_factor=2, image_token_id=ids("<image>"))
        images = transformers.Idefics3ImageProcessorPil(
            size={"longest_edge": 64}, max_image_size={"longest_edge": 32})
        processor = transformers.Idefics3Processor(
            images, transformers.PreTrainedTokenizerFast(
                tokenizer_file=file, eos_token="<end_of_utterance>"),
            image_seq_len=4, chat_template=IDEFICS)
    torch.manual_seed(3)
    model = transformers.AutoModelForImageTextToText.from_config(config).eval()
    model.save_pretrained(directory)
    processor.save_pretrained(directory)
    return model, processor


@pytest.mark.parametrize("layout", ["gemma3", "idefics3"])
@torch.inference_mode()
def test_logits_of_a_conversation_are_those_of_processor_and_model(
    layout: str, tmp_path: Path
) -> None:
    model, processor = saved(tmp_path, layout)
    records = [
        {"role": role, "content": [
            {"type": "text", "text": part} if isinstance(part, str) else {"type": "image"}
            for part in content]} for role, content in TURNS]
    written = processor.apply_chat_template(records, add_generation_prompt=True)
    shown = [photo(*part) for _, content in TURNS for part in content if not isinstance(part, str)]
    given = processor(
        text=written, images=[shown], add_special_tokens=layout != "gemma3", return_tensors="pt")
    wanted = model(**given).logits

    checkpoint = import_model(tmp_path, tmp_path / "ours")
    formats = checkpoint.metadata.media
    assert formats is not None
    tokenizer = Tokenizer.from_files(
        checkpoint.tokenizer_path, checkpoint.template_path, checkpoint.metadata)
    messages = [
        Message(role=role, content=[
            part if isinstance(part, str)
            else media.read(Image(data=png(photo(*part))), formats) for part in content])
        for role, content in TURNS]
    sense = checkpoint.senses[SenseKind.VISION].load()
    vectors = torch.cat([
        sense.projector(sense.encoder(pixels(sense, part))).flatten(0, 1)
        for message in messages for part in message.media])
    tokens = torch.tensor([tokenizer.encode_chat(messages)])
    got = multimodal.logits(
        checkpoint.load(), tokens, vectors,
        both_ways=formats.picture is not None and formats.picture.both_ways)
    assert got.shape == wanted.shape and wanted.std() > 0.1
    assert (got - wanted).abs().max() <= 1e-4
