"""Tiny multimodal models with random weights, as transformers saves them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models

VOCABULARY = 256
MARKS = {  # ids of the tokens around media
    "<start_of_image>": 6, "<end_of_image>": 7, "<image_soft_token>": 5, "<image>": 5,
    "<fake_token_around_image>": 6, "<global-img>": 7, "[AUDIO]": 5, "[BEGIN_AUDIO]": 6,
}
PLACE = 5  # the id that stands for a vector in their files
TEXT: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": VOCABULARY, "max_position_embeddings": 512,
    "head_dim": 16, "initializer_range": 0.15, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": 0,
}
PICTURE: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "image_size": 32, "patch_size": 8,
}
SOUND: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_mel_bins": 20, "max_source_positions": 100,
}


def gemma3(**text: Any) -> tuple[Any, Any]:
    """Gemma 3, whose pictures have 4 vectors, with windows of 8 positions."""
    config = transformers.Gemma3Config(
        text_config={**TEXT, "model_type": "gemma3_text", "sliding_window": 8,
                     "layer_types": ["sliding_attention"] * 2 + ["full_attention"],
                     "query_pre_attn_scalar": 24, **text},
        vision_config={**PICTURE, "model_type": "siglip_vision_model"}, mm_tokens_per_image=4,
        image_token_index=PLACE, boi_token_index=6, eoi_token_index=7)
    processor = transformers.Gemma3ImageProcessorPil(
        size={"height": 32, "width": 32}, image_mean=[0.4, 0.5, 0.6], image_std=[0.2, 0.3, 0.4])
    return transformers.Gemma3ForConditionalGeneration(config), processor


def smolvlm(kind: str = "SmolVLM") -> tuple[Any, Any]:
    """SmolVLM or Idefics 3, whose tiles have 4 vectors."""
    config = getattr(transformers, f"{kind}Config")(
        text_config={**TEXT, "model_type": "llama", "perceiver_config": {"depth": 3}},
        vision_config=PICTURE, scale_factor=2, image_token_id=PLACE)
    processor = getattr(transformers, f"{kind}ImageProcessorPil")(
        size={"longest_edge": 96}, max_image_size={"longest_edge": 32})
    return getattr(transformers, f"{kind}ForConditionalGeneration")(config), processor


def voxtral() -> tuple[Any, Any]:
    """Voxtral, whose pieces of two seconds have 25 vectors."""
    config = transformers.VoxtralConfig(
        text_config={**TEXT, "model_type": "llama"}, audio_config=SOUND, audio_token_id=PLACE)
    processor = transformers.WhisperFeatureExtractor(feature_size=20, chunk_length=2)
    return transformers.VoxtralForConditionalGeneration(config), processor


def whisper() -> tuple[Any, Any]:
    """Whisper, of two seconds."""
    config = transformers.WhisperConfig(
        d_model=32, encoder_layers=2, decoder_layers=1, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64, num_mel_bins=20,
        max_source_positions=100, vocab_size=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        decoder_start_token_id=1, init_std=0.15)
    processor = transformers.WhisperFeatureExtractor(feature_size=20, chunk_length=2)
    return transformers.WhisperForConditionalGeneration(config), processor


LAYOUTS = {
    "gemma3": gemma3, "smolvlm": smolvlm, "idefics3": lambda: smolvlm("Idefics3"),
    "voxtral": voxtral, "whisper": whisper,
}


def save(directory: Path, layout: str) -> tuple[Any, Any]:
    """Save a model with weights that hide nothing, a processor and a tokenizer; return the two."""
    torch.manual_seed(len(layout))
    model, processor = LAYOUTS[layout]()
    for name, parameter in model.named_parameters():
        if "norm" in name:  # where they start hides a mistake in them
            parameter.data += 0.3 * torch.randn_like(parameter)
        elif name.endswith("bias") or "embed_positions" in name:
            parameter.data = 0.3 * torch.randn_like(parameter)
        elif any(part in name for part in ("vision", "audio", "encoder", "projector", "connector")):
            parameter.data = torch.randn_like(parameter) / parameter[0].numel() ** 0.5
    model.eval().save_pretrained(directory)
    processor.save_pretrained(directory)
    words = {mark: id_ for mark, id_ in MARKS.items() if _speaks(layout, mark)}
    others = (id_ for id_ in range(VOCABULARY) if id_ not in words.values())
    vocabulary = {**words, **{chr(0x4E00 + id_): id_ for id_ in others}}
    Tokenizer(models.WordLevel(vocabulary, unk_token=chr(0x4E00))).save(
        str(directory / "tokenizer.json"))
    return model, processor


def _speaks(layout: str, mark: str) -> bool:
    if layout == "gemma3":
        return "_" in mark and "fake" not in mark and mark.startswith("<")
    return mark.startswith("[") if layout == "voxtral" else mark in (
        "<image>", "<fake_token_around_image>", "<global-img>")
