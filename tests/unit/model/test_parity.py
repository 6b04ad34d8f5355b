"""Imported models compute what transformers computes, for every architecture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models

transformers = pytest.importorskip("transformers")

from cloister.model.cache import KVCache  # noqa: E402
from cloister.model.imports import import_model  # noqa: E402
from cloister.model.transformer import Decoder  # noqa: E402

LENGTH, WINDOW = 64, 16
BASE: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 256, "max_position_embeddings": 128,
    "initializer_range": 0.15, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    "attn_implementation": "eager",
}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
}
YARN = {
    "rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0,
    "original_max_position_embeddings": 32,
}
GEMMA3_ROPE = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
}
LAYOUTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-2": ("Llama", {"num_key_value_heads": 4}),
    "llama-3.2": ("Llama", {"rope_parameters": LLAMA3, "tie_word_embeddings": True}),
    "llama-biases": ("Llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 32}),
    "llama-linear": ("Llama", {"rope_parameters": {
        "rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
    "smollm-2": ("Llama", {"tie_word_embeddings": True, "rope_parameters": {
        "rope_type": "default", "rope_theta": 1e5}}),
    "mistral": ("Mistral", {"sliding_window": WINDOW}),
    "mistral-full": ("Mistral", {"sliding_window": None, "head_dim": 32}),
    "qwen-2.5": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen-2.5-window": ("Qwen2", {
        "use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 2}),
    "qwen-2.5-yarn": ("Qwen2", {"rope_parameters": YARN}),
    "qwen-3": ("Qwen3", {"head_dim": 32}),
    "gemma-2": ("Gemma2", {
        "head_dim": 32, "sliding_window": WINDOW, "query_pre_attn_scalar": 24,
        "attn_logit_softcapping": 5.0, "final_logit_softcapping": 4.0,
        "hidden_activation": "gelu_pytorch_tanh"}),
    "gemma-3": ("Gemma3Text", {
        "head_dim": 32, "sliding_window": WINDOW, "query_pre_attn_scalar": 24,
        "rope_parameters": GEMMA3_ROPE, "num_hidden_layers": 6}),
    "smollm-3": ("SmolLM3", {"num_hidden_layers": 5}),
    "smollm-3-window": ("SmolLM3", {
        "use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 2}),
}


def save(directory: Path, name: str, changes: dict[str, Any]) -> Any:
    """A random-weight model of transformers, saved with a tokenizer."""
    torch.manual_seed(len(name) + len(changes))
    config = getattr(transformers, f"{name}Config")(**{**BASE, **changes})
    kind = "Gemma3ForCausalLM" if name == "Gemma3Text" else f"{name}ForCausalLM"
    model = getattr(transformers, kind)(config).eval()
    for key, parameter in model.named_parameters():
        # Norms and biases start at values that hide a mistake in them.
        if "norm" in key:
            parameter.data += 0.3 * torch.randn_like(parameter)
        elif key.endswith("bias"):
            parameter.data = 0.3 * torch.randn_like(parameter)
    model.save_pretrained(directory)
    vocabulary = {chr(0x4E00 + i): i for i in range(BASE["vocab_size"])}
    Tokenizer(models.WordLevel(vocabulary, unk_token=chr(0x4E00))).save(
        str(directory / "tokenizer.json")
    )
    return model


@pytest.fixture(params=LAYOUTS)
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Any, Decoder]:
    """The model of transformers, and ours."""
    name, changes = LAYOUTS[request.param]
    model = save(tmp_path / "theirs", name, changes)
    return model, import_model(tmp_path / "theirs", tmp_path / "ours").load()


@pytest.mark.slow
@torch.inference_mode()
def test_logits_and_greedy_text_are_those_of_transformers(pair: tuple[Any, Decoder]) -> None:
    theirs, ours = pair
    tokens = torch.randint(3, 256, (1, LENGTH), generator=torch.Generator().manual_seed(5))
    expected = theirs(tokens).logits
    assert expected.std() > 0.1  # a model that says something
    assert (ours(tokens) - expected).abs().max() <= 1e-4

    cache = KVCache(ours.config)
    steps = [ours(tokens[:, :40], cache)]
    steps += [ours(tokens[:, i:i + 1], cache) for i in range(40, LENGTH)]
    assert (torch.cat(steps, dim=1) - expected).abs().max() <= 1e-4

    wanted = tokens[:, :8]
    for _ in range(32):  # past every window
        wanted = torch.cat((wanted, theirs(wanted).logits[:, -1:].argmax(-1)), dim=1)
    cache, got = KVCache(ours.config), tokens[:, :8]
    logits = ours(got, cache)
    for _ in range(32):
        choice = logits[:, -1:].argmax(-1)
        got = torch.cat((got, choice), dim=1)
        logits = ours(choice, cache)
    assert torch.equal(got, wanted)
