"""Random weights in the shape of a decoder, as the files that Cloister and its peers read."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from typing import TYPE_CHECKING

import gguf
import numpy as np
import torch
from safetensors.torch import save_file

from cloister import reference
from cloister.model.checkpoint import Metadata, plan
from cloister.model.config import ModelConfig
from cloister.model.writer import CheckpointWriter

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from cloister.model.recipe import Recipe
    from cloister.tiers import Shape

__all__ = ["random_checkpoint", "random_gguf", "random_transformers"]

_BLOCK = gguf.GGML_QUANT_SIZES  # weights and bytes
_BODY, _HEAD = gguf.GGMLQuantizationType.Q4_0, gguf.GGMLQuantizationType.Q6_K
_SMALL_HEAD = gguf.GGMLQuantizationType.Q8_0
_PLACES = {_BODY: (0, 4.6), _HEAD: (208, 18.5 * 64), _SMALL_HEAD: (0, 73.9)}
"""Where in a block its scale is, and the deviation of random weights from zero at scale 1."""
_EOS = 2


def random_checkpoint(path: Path, config: ModelConfig, recipe: Recipe) -> None:
    """Write a quantized checkpoint of random weights, each matrix of about unit gain."""
    config = replace(config, shape=replace(config.shape, tied=False))
    rng = torch.Generator().manual_seed(0)
    tensors = plan(config, recipe)
    tokenizer = reference.bundle_path("nano-1")
    with CheckpointWriter(
        path, metadata=Metadata(name="random", config=config, recipe=recipe.name, eos=(0,)),
        tensors=tensors, tokenizer=tokenizer / "tokenizer.json",
        template=tokenizer / "chat_template.jinja",
    ) as writer:
        for name, (dtype, size) in tensors.items():
            if dtype is torch.int8:
                scheme = recipe.scheme_of(name.removesuffix(".q"))
                assert scheme is not None
                half = 2 ** (scheme.bits - 1)
                inputs = size[1]
                # Uniform integers have a deviation of half / sqrt(3).
                gain = 3**0.5 / half / inputs**0.5
                writer.add(name, torch.randint(-half, half, size, dtype=torch.int8, generator=rng))
            elif name.endswith(".scale"):
                writer.add(name, torch.full(size, gain))
            elif name.endswith("norm.weight"):
                writer.add(name, torch.ones(size))
            else:
                writer.add(name, torch.zeros(size))


def random_gguf(path: Path, shape: Shape) -> None:
    """Write a GGUF file of random weights in the types that llama.cpp's Q4_0 has.

    The head is Q6_K, or Q8_0 where its inputs are no multiple of 256; all other matrices are Q4_0.
    The vocabulary is made up.
    """
    head = _HEAD if shape.hidden_size % _BLOCK[_HEAD][0] == 0 else _SMALL_HEAD
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_0)
    writer.add_block_count(shape.layers)
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.hidden_size)
    writer.add_feed_forward_length(shape.feed_forward)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_key_length(shape.head_size)
    writer.add_value_length(shape.head_size)
    writer.add_rope_dimension_count(shape.head_size)
    writer.add_layer_norm_rms_eps(ModelConfig.norm_eps)
    writer.add_vocab_size(shape.vocab_size)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([f"<{number}>" for number in range(shape.vocab_size)])
    writer.add_token_scores([0.0] * shape.vocab_size)
    writer.add_token_types([gguf.TokenType.NORMAL] * shape.vocab_size)
    writer.add_eos_token_id(_EOS)
    for name, size in _llama(shape):
        if len(size) == 1:
            writer.add_tensor(name, np.ones(size, np.float32))
            continue
        kind = head if name == "output.weight" else _BODY
        writer.add_tensor(name, _blocks(rng, kind, size), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _blocks(
    rng: np.random.Generator, kind: gguf.GGMLQuantizationType, size: Sequence[int]
) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """Return random blocks of a type, uint8[rows, bytes], of about unit gain."""
    weights, taken = _BLOCK[kind]
    rows, inputs = size
    data = rng.integers(0, 256, (rows, inputs // weights, taken), np.uint8)
    place, deviation = _PLACES[kind]
    if kind == _HEAD:
        data[..., place - 16:place] = 64  # scales of each 16 weights
    scale = np.array([1 / deviation / inputs**0.5], np.float16)
    data[..., place:place + 2] = scale.view(np.uint8)
    return data.reshape(rows, -1)


def _llama(shape: Shape) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the name of each tensor in a GGUF file of that architecture, and its size."""
    hidden = shape.hidden_size
    q, kv = shape.heads * shape.head_size, shape.kv_heads * shape.head_size
    yield "token_embd.weight", (shape.vocab_size, hidden)
    for number in range(shape.layers):
        for name, size in (
            ("attn_norm", (hidden,)), ("attn_q", (q, hidden)), ("attn_k", (kv, hidden)),
            ("attn_v", (kv, hidden)), ("attn_output", (hidden, q)), ("ffn_norm", (hidden,)),
            ("ffn_gate", (shape.feed_forward, hidden)), ("ffn_up", (shape.feed_forward, hidden)),
            ("ffn_down", (hidden, shape.feed_forward)),
        ):
            yield f"blk.{number}.{name}.weight", size
    yield "output_norm.weight", (hidden,)
    yield "output.weight", (shape.vocab_size, hidden)


_HUGGING_FACE = {
    "token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head",
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
"""Tensors as GGUF calls them, and as transformers does."""


def random_transformers(path: Path, shape: Shape) -> None:
    """Write a folder of bfloat16 Llama weights that transformers opens, a file for each layer."""
    path.mkdir()
    rng = torch.Generator().manual_seed(0)
    files: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, size in _llama(shape):
        *layer, own, _ = name.split(".")
        prefix = f"model.layers.{layer[1]}." if layer else ""
        file = f"model-{layer[1] if layer else 'rest'}.safetensors"
        files.setdefault(file, {})[f"{prefix}{_HUGGING_FACE[own]}.weight"] = size
    for file, tensors in files.items():
        save_file({
            name: torch.ones(size, dtype=torch.bfloat16) if len(size) == 1 else torch.empty(
                size, dtype=torch.bfloat16).uniform_(-1, 1, generator=rng).mul_(
                (3 / size[1])**0.5)
            for name, size in tensors.items()}, path / file, metadata={"format": "pt"})
    (path / "model.safetensors.index.json").write_text(json.dumps({
        "metadata": {}, "weight_map": {
            name: file for file, tensors in files.items() for name in tensors}}))
    (path / "config.json").write_text(json.dumps({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16",
        "hidden_act": "silu", "hidden_size": shape.hidden_size, "head_dim": shape.head_size,
        "intermediate_size": shape.feed_forward, "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads, "num_key_value_heads": shape.kv_heads,
        "vocab_size": shape.vocab_size, "max_position_embeddings": shape.context,
        "rms_norm_eps": ModelConfig.norm_eps, "tie_word_embeddings": False, "bos_token_id": 1,
        "eos_token_id": _EOS, "pad_token_id": _EOS,
        "rope_parameters": {"rope_type": "default", "rope_theta": ModelConfig.rope_theta},
    }))
    # Peers copy a tokenizer beside the model; none of its text is read here.
    source = reference.bundle_path("nano-1")
    shutil.copyfile(source / "tokenizer.json", path / "tokenizer.json")
    (path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
