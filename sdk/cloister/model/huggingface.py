"""Hugging Face directories: their configurations and tensors as ours.

Every field of `config.json` is either understood, or known not to change the computation, or
refused by name: a switch that is overlooked would give wrong numbers without an error.
"""

from __future__ import annotations

import math
import re
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from cloister.errors import CheckpointError, SettingError, UnsupportedArchitecture
from cloister.model.config import Activation, ModelConfig, RopeScaling
from cloister.model.fields import Fields
from cloister.model.shards import Stored, read_json
from cloister.model.tensor_file import opened
from cloister.tiers import Shape

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping
    from pathlib import Path


__all__ = ["ARCHITECTURES", "configured", "read_config", "rename", "stored"]

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

# What transformers 5.23 takes for a field that is missing (models/*/configuration_*.py), for the
# fields that an architecture reads. Sizes without an entry must be there.
_COMMON: dict[str, Any] = {
    "head_dim": None, "hidden_act": "silu", "layer_types": None, "num_key_value_heads": None,
    "rms_norm_eps": 1e-6, "rope_parameters": None, "rope_scaling": None, "rope_theta": 10_000.0,
    "sliding_window": None, "tie_word_embeddings": False,
}
_BIASES = {"attention_bias": False, "mlp_bias": False}
_QWEN = {
    "num_key_value_heads": 32, "sliding_window": 4096, "use_sliding_window": False,
    "max_window_layers": 28,
}
_GEMMA = _COMMON | {
    "attention_bias": False, "final_logit_softcapping": None, "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh", "num_key_value_heads": 4,
    "query_pre_attn_scalar": 256.0, "sliding_window": 4096, "tie_word_embeddings": True,
}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "Gemma2ForCausalLM": _GEMMA | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    "Gemma3ForCausalLM": _GEMMA | {
        "rope_theta": 1_000_000.0, "rope_local_base_freq": 10_000.0, "sliding_window_pattern": 6,
    },
    "LlamaForCausalLM": _COMMON | _BIASES,
    "MistralForCausalLM": _COMMON | {"num_key_value_heads": 8, "sliding_window": 4096},
    "Qwen2ForCausalLM": _COMMON | _QWEN,
    "Qwen3ForCausalLM": _COMMON | _QWEN | {"attention_bias": False, "head_dim": 128},
    "SmolLM3ForCausalLM": _COMMON | _BIASES | {
        "no_rope_layer_interval": 4, "no_rope_layers": None, "num_key_value_heads": 4,
        "rope_theta": 2_000_000.0, "tie_word_embeddings": True, "use_sliding_window": False,
    },
}
ARCHITECTURES = tuple(_DEFAULTS)
def read_config(path: Path, *, context: int | None = None) -> ModelConfig:
    """Read the configuration of the Hugging Face directory `path`, see `configured`."""
    return configured(read_json(path / "config.json"), path.name, context=context)


def configured(
    record: Mapping[str, object], source: str, *, context: int | None = None,
    ignore: Collection[str] = (), ignored: Collection[str] = ()
) -> ModelConfig:
    """Read the configuration of the model called `source` from what its `config.json` says.

    A field that is missing has the architecture's own default. `context` shortens the context,
    since a program's KV buffers take its whole length. Fields of `ignore` are let through;
    `ignored` are those that were already, in other parts of the file.

    Raises:
        UnsupportedArchitecture, UnsupportedFeature: see the module.
        CheckpointError: a field without a default is missing, or one is not what it must be.
        SettingError: a value, or `context`, is out of bounds, or a field of `ignore` is none that
            would be refused.
    """
    names = record.get("architectures")
    name = names[0] if isinstance(names, list) and names else "an unnamed one"
    if name not in ARCHITECTURES:
        raise UnsupportedArchitecture(
            f"{source} has the architecture {name}; Cloister reads {', '.join(ARCHITECTURES)}."
        )
    fields = Fields(
        dict(record), _DEFAULTS[name], source, frozenset(ignore),
        {"architectures", "bos_token_id", "eos_token_id"}, set(ignored),
    )
    hidden, heads = fields.take("hidden_size", int), fields.take("num_attention_heads", int)
    longest = fields.take("max_position_embeddings", int)
    if context is not None and not 1 <= context <= longest:
        raise SettingError(f"The context is {context}; {source} allows 1 to {longest} tokens.")
    shape = Shape(
        vocab_size=fields.take("vocab_size", int),
        hidden_size=hidden,
        layers=fields.take("num_hidden_layers", int),
        heads=heads,
        kv_heads=fields.take("num_key_value_heads", int) or heads,
        head_size=fields.take("head_dim", int) or hidden // heads,
        feed_forward=fields.take("intermediate_size", int),
        context=context or longest,
        tied=fields.take("tie_word_embeddings", bool),
    )
    bias, mlp_bias = (key in fields.defaults and fields.take(key, bool) for key in _BIASES)
    no_rope = _no_rope(fields, shape.layers) if name == "SmolLM3ForCausalLM" else ()
    config = ModelConfig(
        shape=shape,
        norm_eps=fields.take("rms_norm_eps", float),
        qk_norm=name in ("Qwen3ForCausalLM", "Gemma3ForCausalLM"),
        qkv_bias=bias or name == "Qwen2ForCausalLM",
        output_bias=bias,
        mlp_bias=mlp_bias,
        no_rope_layers=no_rope,
        **_family(fields, hidden),
        **_rotary(fields, longest),
        **_windows(fields, name, shape.layers, no_rope),
    )
    fields.done()
    fields.check_ignored()
    return config


def _family(fields: Fields, hidden: int) -> dict[str, Any]:
    """Return the activation, and the settings of Gemma."""
    gemma = "hidden_activation" in fields.defaults  # its old files have an unused hidden_act too
    named = fields.take("hidden_activation" if gemma else "hidden_act", str)
    known = {"silu": Activation.SILU, "gelu_pytorch_tanh": Activation.GELU_TANH}
    if named not in known:
        raise fields.unsupported(
            f"uses the activation {named}, and Cloister has {' and '.join(known)}"
        )
    if not gemma:
        return {"activation": known[named]}
    cap = "attn_logit_softcapping"  # Gemma 3 has the field, and does not use it
    return {
        "activation": known[named],
        "norm_offset": True,
        "post_norms": True,
        "embedding_scale": hidden**0.5,
        "query_scale": fields.take("query_pre_attn_scalar", float) ** -0.5,
        "attention_softcap": fields.take(cap, float) if cap in fields.defaults else None,
        "final_softcap": fields.take("final_logit_softcapping", float),
    }


def _rotary(fields: Fields, longest: int) -> dict[str, Any]:
    """Return base and scaling, as transformers 4 (rope_scaling) or 5 (rope_parameters) has them."""
    theta, local = fields.take("rope_theta", float), None
    old, new = fields.part("rope_scaling"), fields.part("rope_parameters")
    if old.values and new.values:
        raise fields.unsupported("has both rope_scaling and rope_parameters")
    if "rope_local_base_freq" in fields.defaults:  # Gemma 3 nests them by the type of layer
        local = fields.take("rope_local_base_freq", float)
        new.defaults = {"full_attention": None, "sliding_attention": None}
        local, scaling = _scaling(new.part("sliding_attention"), local, longest)
        full = new.part("full_attention")
        new.done()
        new = full
        if scaling is not None:
            raise fields.unsupported("scales its windowed layers' rotary embedding")
    theta, scaling = _scaling(old if old.values else new, theta, longest)
    return {"rope_theta": theta, "local_rope_theta": local, "rope_scaling": scaling}


def _scaling(fields: Fields, theta: float, longest: int) -> tuple[float, RopeScaling | None]:
    """Return base and scaling of one set of rotary parameters."""
    fields.defaults = {
        "rope_theta": theta, "type": "default", "original_max_position_embeddings": longest,
        "beta_fast": None, "beta_slow": None, "attention_factor": None, "truncate": True,
    }
    fields.defaults["rope_type"] = fields.take("type", str)
    theta, kind = fields.take("rope_theta", float), fields.take("rope_type", str)
    if kind == "default":
        fields.done()
        return theta, None
    if kind not in ("linear", "llama3", "yarn"):
        raise fields.unsupported(
            f"scales its rotary embedding by {kind}, and Cloister has linear, llama3 and yarn"
        )
    known: dict[str, Any] = {
        "factor": fields.take("factor", float),
        "original_context": fields.take("original_max_position_embeddings", int),
    }
    if kind == "llama3":
        for name in ("low_freq_factor", "high_freq_factor"):
            known[name] = fields.take(name, float)
    elif kind == "yarn":
        own = 0.1 * math.log(known["factor"]) + 1.0
        known |= {
            "beta_fast": fields.take("beta_fast", float) or 32.0,
            "beta_slow": fields.take("beta_slow", float) or 1.0,
            "attention_factor": fields.take("attention_factor", float) or own,
            "truncate": fields.take("truncate", bool),
        }
    fields.done()
    return theta, RopeScaling(kind=kind, **known)


def _windows(fields: Fields, name: str, layers: int, no_rope: tuple[int, ...]) -> dict[str, Any]:
    """Return the window, and the layers that have it."""
    window = fields.take("sliding_window", int)
    if "use_sliding_window" in fields.defaults and not fields.take("use_sliding_window", bool):
        window = None
    first = fields.take("max_window_layers", int, least=0) if "Qwen" in name else 0
    pattern = fields.take("sliding_window_pattern", int) if "Gemma3" in name else 2
    default: Iterable[int] = ()
    if name.startswith("Gemma"):
        default = (i for i in range(layers) if (i + 1) % pattern)
    elif window is not None and name != "LlamaForCausalLM":
        default = no_rope if name == "SmolLM3ForCausalLM" else range(first, layers)
    windowed = tuple(default)
    types = fields.take("layer_types", list)
    if types is not None:
        listed = tuple(i for i, kind in enumerate(types) if kind == "sliding_attention")
        known = all(kind in ("full_attention", "sliding_attention") for kind in types)
        # Llama and Mistral do not read the field.
        ignored = name in ("LlamaForCausalLM", "MistralForCausalLM") and listed != windowed
        if len(types) != layers or not known or ignored:
            raise fields.unsupported("has layer_types that Cloister does not know")
        windowed = listed
    if windowed and window is None:
        raise fields.unsupported("has windowed layers, and no sliding_window in use")
    return {"window": window, "windowed_layers": windowed} if windowed else {}


def _no_rope(fields: Fields, layers: int) -> tuple[int, ...]:
    """Return the layers without rotary embedding."""
    interval = fields.take("no_rope_layer_interval", int)
    rotary = fields.take("no_rope_layers", list)  # 1 where a layer is rotary
    if rotary is None:
        return tuple(range(interval - 1, layers, interval))
    if len(rotary) < layers or any(type(used) is not int for used in rotary):
        raise CheckpointError(
            f"Field no_rope_layers of the configuration of {fields.source} must be a list of "
            "0 or 1 for each layer; copy it again."
        )
    return tuple(i for i in range(layers) if not rotary[i])


def stored(
    where: Mapping[str, Path], name_of: Callable[[str], str | None]
) -> dict[str, Stored]:
    """Return the tensors in the files `where` by our names, without those that have None."""
    result = {}
    for path in dict.fromkeys(where.values()):
        with opened(path) as file:
            for key in file.keys():  # noqa: SIM118  # not a dict
                name = name_of(key)
                if name is None:
                    continue
                part = file.get_slice(key)
                kind = part.get_dtype()
                result[name] = Stored(
                    key=key, kind=kind, dtype=_DTYPES.get(kind), shape=tuple(part.get_shape()),
                    read=partial(_tensor, path, key))
    return result


def _tensor(path: Path, key: str) -> torch.Tensor:
    with opened(path) as file:
        tensor: torch.Tensor = file.get_tensor(key)
    return tensor


_NAMES = {
    "self_attn.q_proj": "attn.qkv.q", "self_attn.k_proj": "attn.qkv.k",
    "self_attn.v_proj": "attn.qkv.v", "self_attn.o_proj": "attn.o",
    "self_attn.q_norm": "attn.q_norm", "self_attn.k_norm": "attn.k_norm",
    "mlp.gate_proj": "mlp.gate", "mlp.up_proj": "mlp.up", "mlp.down_proj": "mlp.down",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "mlp_norm",
}
_GEMMA_NAMES = _NAMES | {
    "post_attention_layernorm": "attn_post_norm", "pre_feedforward_layernorm": "mlp_norm",
    "post_feedforward_layernorm": "mlp_post_norm",
}
_TOP = {
    "model.embed_tokens.weight": "embed.weight", "model.norm.weight": "norm.weight",
    "lm_head.weight": "head.weight",
}


def rename(key: str, *, gemma: bool) -> str | None:
    """Return our name of a tensor; its own, marked, where we have none; None for one that is none.

    Gemma's norms have other places than those of the same names in other layouts.
    """
    if key.endswith("rotary_emb.inv_freq"):
        return None
    if key in _TOP:
        return _TOP[key]
    match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)", key)
    names = _GEMMA_NAMES if gemma else _NAMES
    if match is None or match[2] not in names:
        return f"{key} (unknown)"  # no name of ours, which it might be
    return f"layers.{match[1]}.{names[match[2]]}.{match[3]}"
