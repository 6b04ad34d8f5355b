"""GGUF files of tiny models, written as llama.cpp's converter writes those of large ones."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

TEXTS = (
    "the quick brown fox jumps over the lazy dog", "What's the weather in Paris tomorrow? 1234567",
    "na\u00efve caf\u00e9 \u4f60\u597d", "def f(x):\n    return x**2  # twice\n\n\n", "I'LL don't",
)
SPECIAL = ("<|end|>", "<|user|>", "<|assistant|>")
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
_KEYS = {  # of the configuration of transformers
    "max_position_embeddings": "context_length", "hidden_size": "embedding_length",
    "num_hidden_layers": "block_count", "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count", "head_dim": "attention.key_length",
    "num_key_value_heads": "attention.head_count_kv", "vocab_size": "vocab_size",
}
_FLOATS = {
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}


def byte_level(size: int = 400) -> Tokenizer:
    """A byte-level BPE of `size` entries, its special tokens the first of them."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(TEXTS * 3, trainers.BpeTrainer(
        vocab_size=size, special_tokens=list(SPECIAL), show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    ))
    return tokenizer


def add_byte_level(writer: gguf.GGUFWriter, rows: int, *, pre: str | None = "gpt-2") -> None:
    """Write the vocabulary of `byte_level`, filled up to `rows`."""
    model = json.loads(byte_level().to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
    fill = [f"[PAD{id_}]" for id_ in range(len(tokens), rows)]
    writer.add_tokenizer_model("gpt2")
    if pre is not None:
        writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens + fill)
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(tokens) - len(SPECIAL))
                           + [5] * len(fill))
    writer.add_token_merges([" ".join(pair) for pair in model["merges"]])
    writer.add_eos_token_id(0)
    writer.add_chat_template(TEMPLATE)


def permuted(rows: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """Make the two features that turn together neighbours: first halves to even, second to odd."""
    result = rows.copy()
    size = len(rows) // heads
    for head in range(heads):
        of_head, out = rows[head * size:(head + 1) * size], result[head * size:(head + 1) * size]
        out[0::2], out[1::2] = of_head[:size // 2], of_head[size // 2:]
    return result


def begin(path: Path, architecture: str, config: dict[str, Any], **options: Any) -> gguf.GGUFWriter:
    """Write what is known of a configuration of transformers."""
    writer = gguf.GGUFWriter(path, architecture, **options)
    for key, name in _KEYS.items():
        if config.get(key) is not None:
            writer.add_uint32(f"{architecture}.{name}", config[key])
    for key, name in _FLOATS.items():
        if config.get(key) is not None:
            writer.add_float32(f"{architecture}.{name}", config[key])
    rope = config.get("rope_parameters") or {}
    rope = rope.get("full_attention", rope)  # Gemma 3 has two
    writer.add_float32(f"{architecture}.rope.freq_base", rope["rope_theta"])
    if config.get("sliding_window") and architecture.startswith("gemma"):
        writer.add_uint32(f"{architecture}.attention.sliding_window", config["sliding_window"])
    return writer


def add_tensors(
    writer: gguf.GGUFWriter, architecture: str, model: Any, config: dict[str, Any]
) -> None:
    """Write the weights of a model of transformers, under the names that the library has."""
    kind = {name: each for each, name in gguf.MODEL_ARCH_NAMES.items()}[architecture]
    names = gguf.get_tensor_name_map(kind, config["num_hidden_layers"])
    for key, value in model.state_dict().items():
        if key == "lm_head.weight" and config["tie_word_embeddings"]:
            continue
        name = names.get_name(key, try_suffixes=(".weight", ".bias"))
        assert name is not None, key
        rows = value.float().numpy()
        if architecture in ("llama", "smollm3") and ("q_proj" in key or "k_proj" in key):
            heads = "num_attention_heads" if "q_proj" in key else "num_key_value_heads"
            rows = permuted(rows, config[heads])
        if architecture.startswith("gemma") and key.endswith("norm.weight"):
            rows = rows + 1
        writer.add_tensor(name, np.ascontiguousarray(rows))


def blocks(
    rows: np.ndarray[Any, Any], kind: gguf.GGMLQuantizationType
) -> np.ndarray[Any, Any]:
    """Quantize rows; where the package cannot, random blocks of about the same size."""
    scales = {"Q4_K": (5e-4, 4e-3), "Q6_K": (1e-4,)}.get(kind.name)
    if scales is None:
        return gguf.quantize(rows, kind)
    block, size = gguf.GGML_QUANT_SIZES[kind]
    made = np.random.default_rng(zlib.crc32(rows.data)).integers(
        0, 256, (len(rows), rows.shape[1] // block, size), np.uint8)
    first = 0 if kind.name == "Q4_K" else 208
    made[..., first:first + 2 * len(scales)] = np.array(scales, np.float16).view(np.uint8)
    return made.reshape(len(rows), -1)


def write_blocks(
    path: Path, kinds: dict[str, str], architecture: str = "llama", **changes: Any
) -> Path:
    """Write a tiny model whose matrices are of `kinds`: by name, by its end, or by "" the others.

    Queries and keys are not put into llama.cpp's order: what is compared is read from the file.
    """
    settings = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2,
                "head_dim": 64, **changes}
    model, config = tiny(architecture, **settings)
    writer = begin(path, architecture, config)
    add_byte_level(writer, config["vocab_size"])
    of = {name: each for each, name in gguf.MODEL_ARCH_NAMES.items()}[architecture]
    names = gguf.get_tensor_name_map(of, config["num_hidden_layers"])
    for key, value in model.state_dict().items():
        if key == "lm_head.weight" and config["tie_word_embeddings"]:
            continue
        name = names.get_name(key, try_suffixes=(".weight", ".bias"))
        short = name.removesuffix(".weight").rpartition(".")[2]
        kind = gguf.GGMLQuantizationType[
            "F32" if value.dim() < 2 else kinds.get(name) or kinds.get(short) or kinds[""]]
        data = blocks(value.numpy(), kind)
        writer.add_tensor(name, data, raw_dtype=kind)
    end(writer)
    return path


def end(writer: gguf.GGUFWriter) -> None:
    """Write it all."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def tiny(architecture: str = "llama", **changes: Any) -> tuple[Any, dict[str, Any]]:
    """A model of transformers with random weights, and its configuration."""
    import transformers

    kind = {"gemma2": "Gemma2", "gemma3": "Gemma3", "llama": "Llama", "qwen2": "Qwen2",
            "qwen3": "Qwen3", "smollm3": "SmolLM3"}[architecture]
    settings = {
        "vocab_size": 416, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
        "head_dim": 16, "rms_norm_eps": 1e-5, "rope_theta": 500.0, "tie_word_embeddings": True,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 0, **changes,
    }
    if architecture.startswith("gemma"):
        settings |= {"sliding_window": 8, "query_pre_attn_scalar": settings["head_dim"]}
    theirs = getattr(transformers, f"{kind}TextConfig" if kind == "Gemma3" else f"{kind}Config")
    config = theirs.from_dict(settings, attn_implementation="eager")
    torch.manual_seed(3)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            parameter.normal_(std=0.05 if "embed" in key else 0.15 if parameter.dim() == 2 else 0.3)
            if "norm" in key and "Gemma" not in kind:
                parameter += 1.0
    return model, {**settings, **config.to_dict()}


def write(path: Path, architecture: str = "llama", **changes: Any) -> Any:
    """Write a tiny model to `path`, and return it."""
    model, config = tiny(architecture, **changes)
    writer = begin(path, architecture, config)
    add_byte_level(writer, config["vocab_size"])
    add_tensors(writer, architecture, model, config)
    end(writer)
    return model
