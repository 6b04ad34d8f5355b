"""GGUF files, llama.cpp's: their configuration and tensors as ours.

Quantized tensors become float32: a product of scale and level and the sum with a minimum need more
bits than a 16-bit type has, and what the file says is kept exactly. Or matrices stay the blocks
that they are. What the entries of an architecture mean is what llama.cpp makes of them
(src/llama-model.cpp).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from cloister.errors import CheckpointError, UnsupportedArchitecture, UnsupportedFeature
from cloister.model import rope
from cloister.model.blocks import HALVES, Blocks, dequantize
from cloister.model.config import RopeScaling
from cloister.model.shards import Stored

if TYPE_CHECKING:
    from cloister.model.gguf_file import Header, Tensor

__all__ = ["ARCHITECTURES", "architecture", "configuration", "stored"]

# By llama.cpp's name. Those with `permuted` pair neighbouring features in their rotary embedding,
# where the checkpoints of transformers pair the halves of a head: rows of q and k are reordered.
ARCHITECTURES = {
    "gemma2": "Gemma2ForCausalLM", "gemma3": "Gemma3ForCausalLM", "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM", "smollm3": "SmolLM3ForCausalLM",
}
_PERMUTED = ("llama", "smollm3")
_FIELDS = {
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "final_logit_softcapping": "final_logit_softcapping",
    "rope.freq_base": "rope_theta",
}
_NEEDED = ("attention.head_count", "attention.layer_norm_rms_epsilon", "block_count",
           "embedding_length")
_LARGEST = {"gemma2": 46, "gemma3": 62}  # layers of the sizes that scale queries by hidden / heads
_TENSORS = {
    "attn_q": "attn.qkv.q", "attn_k": "attn.qkv.k", "attn_v": "attn.qkv.v",
    "attn_output": "attn.o", "attn_q_norm": "attn.q_norm", "attn_k_norm": "attn.k_norm",
    "ffn_gate": "mlp.gate", "ffn_up": "mlp.up", "ffn_down": "mlp.down",
    "attn_norm": "attn_norm", "ffn_norm": "mlp_norm",
    "post_attention_norm": "attn_post_norm", "post_ffw_norm": "mlp_post_norm",
}
_TOP = {"token_embd": "embed", "output_norm": "norm", "output": "head"}
_ROPE = "rope_freqs.weight"
_PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def architecture(file: Header) -> str:
    """Return the architecture, as llama.cpp calls it.

    Raises:
        UnsupportedArchitecture: it is none that Cloister has.
    """
    name = file.metadata.get("general.architecture")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise UnsupportedArchitecture(
            f"{file.path.name} has the architecture {str(name)[:40]}; Cloister reads "
            f"{', '.join(ARCHITECTURES)} of GGUF files."
        )
    return name


def configuration(file: Header) -> dict[str, object]:
    """Return what a Hugging Face `config.json` of the same model says.

    Entries of the architecture that are not understood keep their own name, by which they are
    refused, as unknown fields are.

    Raises:
        UnsupportedArchitecture, UnsupportedFeature: it is none that Cloister has.
        CheckpointError: a needed entry is missing.
    """
    name = architecture(file)
    given = {
        key.removeprefix(f"{name}."): value for key, value in file.metadata.items()
        if key.startswith(f"{name}.")
    }
    lacking = [f"{name}.{key}" for key in _NEEDED if key not in given]
    if "token_embd.weight" not in file.tensors:
        lacking.append("token_embd.weight")
    if lacking:
        raise CheckpointError(
            f"File {file.path.name} has no {lacking[0]}; convert it again."
        )
    for key in ("attention.head_count", "attention.head_count_kv", "feed_forward_length"):
        value = given.get(key)
        if isinstance(value, list) and len(set(value)) == 1:
            given[key] = value[0]  # the same for every layer
    record = {ours: given.pop(key) for key, ours in _FIELDS.items() if key in given}
    caps = [key for key in record if key.endswith("softcapping") and record[key] == 0.0]
    for key in caps:
        del record[key]  # none; it comes back below
    _check_numbers(file, record)
    record |= dict.fromkeys(caps)
    heads, hidden = record["num_attention_heads"], record["hidden_size"]
    record.setdefault("num_key_value_heads", heads)
    head = record.setdefault("head_dim", hidden // heads)
    record.setdefault("rope_theta", 10_000.0)
    for key in ("attention.value_length", "rope.dimension_count"):
        if given.get(key) == head:
            del given[key]
    for key in ("vocab_size", "tensor_data_layout"):  # the tensors themselves say it
        given.pop(key, None)
    record |= {
        "architectures": [ARCHITECTURES[name]],
        "vocab_size": file.tensors["token_embd.weight"].shape[0],
        "tie_word_embeddings": "output.weight" not in file.tensors,
    }
    if name != "qwen2" and "blk.0.attn_q.bias" in file.tensors:
        record["attention_bias"] = True
    if "blk.0.ffn_down.bias" in file.tensors:
        record["mlp_bias"] = True
    if name in _LARGEST:
        _gemma(name, record, given)
    _rotary(file, record, given)
    return record | {f"{name}.{key}": value for key, value in given.items()}


def _check_numbers(file: Header, record: dict[str, Any]) -> None:
    """Raise unless every field is a number, and a size a whole one above 0."""
    for name, value in record.items():
        if isinstance(value, list):
            raise UnsupportedFeature(
                f"{file.path.name} has a {name} of its own for each layer, which Cloister does not "
                "implement."
            )
        real = name.startswith(("rms", "rope", "attn", "final"))
        if (type(value) is not int and not (real and type(value) is float)) or value <= 0:
            raise CheckpointError(
                f"The {name} of {file.path.name} is not a number above 0; convert it again."
            )


def _gemma(name: str, record: dict[str, Any], given: dict[str, Any]) -> None:
    """Add what llama.cpp knows of Gemma without being told."""
    layers, hidden = record["num_hidden_layers"], record["hidden_size"]
    largest = layers == _LARGEST[name]
    record["query_pre_attn_scalar"] = (
        hidden // record["num_attention_heads"] if largest else record["head_dim"])
    window = given.pop("attention.sliding_window", 0 if name == "gemma3" else 4096)
    if not window:
        record["layer_types"] = ["full_attention"] * layers
    else:
        record["sliding_window"] = window
    if name == "gemma3":
        record["rope_local_base_freq"] = given.pop("rope.freq_base_swa", 10_000.0)
        pattern = given.pop("attention.sliding_window_pattern", 6)
        if isinstance(pattern, list):
            record["layer_types"] = [
                "sliding_attention" if windowed else "full_attention" for windowed in pattern]
        else:
            record["sliding_window_pattern"] = pattern


def _rotary(file: Header, record: dict[str, Any], given: dict[str, Any]) -> None:
    """Add the scaling of the rotary embedding."""
    entries = {
        key: given.pop(f"rope.{key}") for key in (
            "scale_linear", "scaling.type", "scaling.factor", "scaling.original_context_length",
            "scaling.attn_factor", "scaling.finetuned", "scaling.yarn_ext_factor",
            "scaling.yarn_attn_factor", "scaling.yarn_beta_fast", "scaling.yarn_beta_slow",
        ) if f"rope.{key}" in given
    }
    for key in ("scaling.attn_factor", "scaling.yarn_ext_factor", "scaling.yarn_attn_factor"):
        if entries.get(key, 1.0) != 1.0:  # refused by its name
            given[f"rope.{key}"] = entries[key]
    factor = entries.get("scaling.factor", entries.get("scale_linear", 0.0))
    kind = entries.get("scaling.type", "linear")
    if kind not in ("none", "linear") or (kind == "linear" and factor not in (0.0, 1.0)):
        record["rope_scaling"] = {"rope_type": kind, "factor": factor}
    if kind == "yarn":
        record["rope_scaling"] |= {
            ours: entries[key] for key, ours in (
                ("scaling.original_context_length", "original_max_position_embeddings"),
                ("scaling.yarn_beta_fast", "beta_fast"), ("scaling.yarn_beta_slow", "beta_slow"),
            ) if key in entries
        }
    if _ROPE in file.tensors:
        if "rope_scaling" in record:
            raise UnsupportedFeature(
                f"{file.path.name} scales its rotary embedding twice ({kind} and {_ROPE})."
            )
        record["rope_scaling"] = _llama3(file, record)


def _llama3(file: Header, record: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of Llama 3.1 that give the frequency factors of the file."""
    factors = _values(file.tensors[_ROPE], None)
    factor = float(factors.max())
    if factor >= 1.0:
        scaling = RopeScaling(kind="llama3", factor=factor, low_freq_factor=1.0,
                              high_freq_factor=4.0, original_context=8192)
        head, theta = record["head_dim"], record["rope_theta"]
        expected = rope.frequencies(head, theta, None) / rope.frequencies(head, theta, scaling)
        if expected.shape == factors.shape and torch.allclose(expected, factors, rtol=1e-4):
            return {
                "rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0,
                "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
            }
    raise UnsupportedFeature(
        f"{file.path.name} has rotary factors ({_ROPE}) other than those of Llama 3.1, which "
        "Cloister does not implement."
    )


def stored(file: Header, *, keep: bool = False) -> dict[str, Stored]:
    """Return the tensors by our names; one that we do not know is marked as such.

    With `keep` the blocks of matrices, uint8[rows, bytes], whose names end in `.blocks`.

    Raises:
        UnsupportedFeature: a matrix to keep is of a type that no operator computes with.
    """
    name = architecture(file)
    offset, result = name.startswith("gemma"), {}
    for key, tensor in file.tensors.items():
        if key == _ROPE:
            continue
        ours = _ours(key)
        change = _Change(
            heads=_heads(file, ours) if name in _PERMUTED else None,
            minus=1.0 if offset and ours.endswith("norm.weight") else 0.0,
        )
        if keep and len(tensor.shape) == 2 and ours.endswith(".weight"):
            result[f"{ours}.blocks"] = _kept(key, tensor, change)
            continue
        plain = torch.float32 if change.minus else _PLAIN.get(tensor.kind.name, torch.float32)
        result[ours] = Stored(
            key=key, kind=tensor.kind.name, dtype=plain, shape=tensor.shape,
            read=partial(_values, tensor, change),
        )
    return result


def _kept(key: str, tensor: Tensor, change: _Change) -> Stored:
    """Return a matrix as it is."""
    kind = tensor.kind.name
    if kind not in HALVES:
        raise UnsupportedFeature(
            f"Tensor {key[:60]} of {tensor.path.name} is of type {kind}, and Cloister computes "
            f"with {', '.join(HALVES)} as they are; import it without keeping its quantization, "
            "and quantize that.")
    shape = (tensor.shape[0], Blocks(kind=kind).row_bytes(tensor.shape[1]))

    def read() -> torch.Tensor:
        return _unpermuted(torch.from_numpy(_raw(tensor)).view(shape), change)

    return Stored(key=key, kind=kind, dtype=torch.uint8, shape=shape, read=read)


def _ours(key: str) -> str:
    match = re.fullmatch(r"(?:blk\.(0|[1-9]\d{0,4})\.)?(\w+)\.(weight|bias)", key)
    names = _TOP if match is None or match[1] is None else _TENSORS
    if match is None or match[2] not in names:
        return f"{key} (unknown)"  # no name of ours, which it might be
    layer = "" if match[1] is None else f"layers.{int(match[1])}."
    return f"{layer}{names[match[2]]}.{match[3]}"


def _heads(file: Header, ours: str) -> int | None:
    """Return the number of heads in the rows of a query or key matrix, None for others."""
    heads = {"q": "attention.head_count", "k": "attention.head_count_kv"}
    match = re.search(r"qkv\.([qk])\.", ours)
    if match is None:
        return None
    prefix = architecture(file)
    given = file.metadata.get(f"{prefix}.{heads[match[1]]}",
                              file.metadata[f"{prefix}.{heads['q']}"])
    return int(given[0] if isinstance(given, list) else given)


@dataclass(frozen=True, kw_only=True)
class _Change:
    """What a converter did to a tensor, and reading undoes."""

    heads: int | None = None  # of rows whose pairs of features were made neighbours
    minus: float = field(default=0.0)  # what was added to a norm (Gemma)


def _values(tensor: Tensor, change: _Change | None) -> torch.Tensor:
    """Read one tensor, quantized ones as float32."""
    raw, kind = _raw(tensor), tensor.kind
    values = torch.from_numpy(raw).view(_PLAIN[kind.name]) if kind.name in _PLAIN else (
        dequantize(raw, kind))
    values = values.view(tensor.shape)
    if change is not None:
        values = _unpermuted(values, change)
        if change.minus:
            values = values.float() - change.minus
    return values


def _unpermuted(values: torch.Tensor, change: _Change) -> torch.Tensor:
    """Return rows in the order of ours, of values or of blocks."""
    if not change.heads:
        return values
    rows = values.view(change.heads, -1, 2, *values.shape[1:])
    return rows.transpose(1, 2).reshape(values.shape)


def _raw(tensor: Tensor) -> np.ndarray[Any, Any]:
    """Read the bytes of one tensor."""
    try:
        return np.array(np.memmap(
            tensor.path, np.uint8, "r", tensor.offset, (tensor.size_bytes,)))
    except (OSError, ValueError):
        raise CheckpointError(
            f"File {tensor.path.name} cannot be read any more; import it again."
        ) from None
