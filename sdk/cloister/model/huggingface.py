"""Reads Hugging Face directories: their configurations and tensor names onto ours.

Every field of `config.json` is either understood, or known not to change the computation, or
refused by name: a switch that is overlooked would give wrong numbers without an error.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open

from cloister.errors import (
    CheckpointError,
    SettingError,
    TensorMismatch,
    UnsupportedArchitecture,
    UnsupportedFeature,
    VocabularyMismatch,
)
from cloister.model.checkpoint import (
    Checkpoint,
    CheckpointWriter,
    Metadata,
    Plan,
    check_finite,
    expected_tensors,
    read_json,
    shards,
)
from cloister.model.config import Activation, ModelConfig, RopeScaling
from cloister.tiers import Shape

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["ARCHITECTURES", "import_huggingface", "read_config"]

ARCHITECTURES = (
    "Gemma2ForCausalLM", "Gemma3ForCausalLM", "LlamaForCausalLM", "MistralForCausalLM",
    "Qwen2ForCausalLM", "Qwen3ForCausalLM", "SmolLM3ForCausalLM",
)
# Of training, bookkeeping, or output format; none changes the logits of inference.
_HARMLESS = frozenset({
    "_name_or_path", "add_cross_attention", "attention_dropout", "auto_map", "bad_words_ids",
    "cache_implementation", "chunk_size_feed_forward", "cross_attention_hidden_size", "dtype",
    "finetuning_task", "id2label", "initializer_range", "is_decoder", "is_encoder_decoder",
    "label2id", "model_type", "output_attentions", "output_hidden_states", "pad_token_id",
    "prefix", "pretraining_tp", "problem_type", "return_dict", "sep_token_id",
    "task_specific_params", "tokenizer_class", "torch_dtype", "torchscript",
    "transformers_version", "unsloth_fixed", "use_cache",
})
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass
class _Fields:
    """The fields of a configuration, each taken once; what is left over is refused."""

    values: dict[str, Any]
    path: Path
    taken: set[str] = field(default_factory=set)

    def take(self, name: str, kinds: tuple[type, ...], default: Any = ...) -> Any:
        self.taken.add(name)
        value = self.values.get(name)
        if value is None:
            if default is ...:
                raise CheckpointError(
                    f"The configuration of {self.path.name} lacks {name}; copy it again."
                )
            return default
        if type(value) not in kinds and not (float in kinds and type(value) is int):
            raise CheckpointError(
                f"Field {name} of the configuration of {self.path.name} is of the wrong type; "
                "copy it again."
            )
        return value

    def refuse(self, name: str, *allowed: Any) -> None:
        """Refuse the feature `name` unless its value is one of `allowed` or none."""
        self.taken.add(name)
        if self.values.get(name) not in (None, *allowed):
            raise UnsupportedFeature(
                f"{self.path.name} uses {name}, which Cloister does not implement; choose another "
                "model."
            )

    def done(self) -> None:
        for name in sorted(set(self.values) - self.taken - _HARMLESS):
            if self.values[name] not in (None, False):
                raise UnsupportedFeature(
                    f"The configuration of {self.path.name} has a field {name}, which Cloister "
                    "does not know; choose another model."
                )


def read_config(path: Path, *, context: int | None = None) -> ModelConfig:
    """The configuration of the Hugging Face directory `path`, as ours.

    `context` shortens the context, since a program's KV buffers take its whole length.

    Raises:
        UnsupportedArchitecture, UnsupportedFeature: see the module.
        CheckpointError: a field is missing or of the wrong type.
    """
    record = read_json(path / "config.json")
    names = record.get("architectures")
    name = names[0] if isinstance(names, list) and names else "an unnamed one"
    if name not in ARCHITECTURES:
        raise UnsupportedArchitecture(
            f"{path.name} has the architecture {name}; Cloister reads {', '.join(ARCHITECTURES)}."
        )
    fields = _Fields(dict(record), path, {"architectures", "bos_token_id", "eos_token_id"})
    fields.refuse("quantization_config")
    fields.refuse("partial_rotary_factor", 1.0)
    fields.refuse("use_bidirectional_attention", False)
    fields.refuse("head_dim_override")
    gemma = name in ("Gemma2ForCausalLM", "Gemma3ForCausalLM")
    hidden, heads = fields.take("hidden_size", (int,)), fields.take("num_attention_heads", (int,))
    longest = fields.take("max_position_embeddings", (int,))
    if context is not None and not 1 <= context <= longest:
        raise SettingError(f"The context is {context}; {path.name} allows 1 to {longest} tokens.")
    shape = Shape(
        vocab_size=fields.take("vocab_size", (int,)),
        hidden_size=hidden,
        layers=fields.take("num_hidden_layers", (int,)),
        heads=heads,
        kv_heads=fields.take("num_key_value_heads", (int,), heads),
        head_size=fields.take("head_dim", (int,), hidden // max(heads, 1)),
        feed_forward=fields.take("intermediate_size", (int,)),
        context=context or longest,
        tied=fields.take("tie_word_embeddings", (bool,), gemma or name == "SmolLM3ForCausalLM"),
    )
    bias = fields.take("attention_bias", (bool,), False)
    rotary = _rotary(fields, longest)
    config = ModelConfig(
        shape=shape,
        activation=_activation(fields),
        norm_eps=fields.take("rms_norm_eps", (float,), 1e-6),
        norm_offset=gemma,
        post_norms=gemma,
        qk_norm=name in ("Qwen3ForCausalLM", "Gemma3ForCausalLM"),
        qkv_bias=bias or name == "Qwen2ForCausalLM",
        output_bias=bias,
        mlp_bias=fields.take("mlp_bias", (bool,), False),
        embedding_scale=hidden**0.5 if gemma else 1.0,
        query_scale=fields.take("query_pre_attn_scalar", (float,)) ** -0.5 if gemma else None,
        attention_softcap=fields.take("attn_logit_softcapping", (float,), None),
        final_softcap=fields.take("final_logit_softcapping", (float,), None),
        **rotary,
        **_windows(fields, name, shape.layers),
        no_rope_layers=_no_rope(fields, name, shape.layers),
    )
    fields.done()
    return config


def _activation(fields: _Fields) -> Activation:
    # Gemma writes hidden_activation and, in old files, a hidden_act that it does not use.
    named = fields.take("hidden_act", (str,), None)
    named = fields.take("hidden_activation", (str,), named)
    known = {"silu": Activation.SILU, "gelu_pytorch_tanh": Activation.GELU_TANH}
    if named not in known:
        raise UnsupportedFeature(
            f"{fields.path.name} uses the activation {named}; Cloister has {', '.join(known)}."
        )
    return known[named]


def _rotary(fields: _Fields, longest: int) -> dict[str, Any]:
    """Base and scaling, in the spelling of transformers 4 (rope_scaling) or 5 (rope_parameters)."""
    theta = fields.take("rope_theta", (float,), 10_000.0)
    local = fields.take("rope_local_base_freq", (float,), None)
    plain = fields.take("rope_scaling", (dict,), {})
    parameters = fields.take("rope_parameters", (dict,), {})
    if "full_attention" in parameters:
        local = parameters.get("sliding_attention", {}).get("rope_theta", local)
        if parameters.get("sliding_attention", {}).get("rope_type", "default") != "default":
            raise UnsupportedFeature(
                f"{fields.path.name} scales the rotary embedding of its windowed layers; Cloister "
                "does not implement that."
            )
        parameters = parameters["full_attention"]
    scaling = dict(parameters or plain)
    theta = scaling.pop("rope_theta", theta)
    scaling.pop("type", None) if "rope_type" in scaling else None
    kind = scaling.pop("rope_type", scaling.pop("type", "default"))
    return {
        "rope_theta": float(theta),
        "local_rope_theta": local,
        "rope_scaling": None if kind == "default" else _scaling(kind, scaling, fields, longest),
    }


def _scaling(
    kind: str, values: dict[str, Any], fields: _Fields, longest: int
) -> RopeScaling:
    factor = float(values.pop("factor", 1.0))
    trained = values.pop("original_max_position_embeddings", None) or longest
    known: dict[str, Any] = {}
    if kind == "llama3":
        known = {
            "low_freq_factor": values.pop("low_freq_factor", 1.0),
            "high_freq_factor": values.pop("high_freq_factor", 4.0),
        }
    elif kind == "yarn":
        attention = values.pop("attention_factor", None)
        known = {
            "beta_fast": values.pop("beta_fast", None) or 32.0,
            "beta_slow": values.pop("beta_slow", None) or 1.0,
            "truncate": values.pop("truncate", True),
            "attention_factor": attention or (0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0),
        }
    unknown = [name for name, value in values.items() if value is not None]
    if kind not in ("linear", "llama3", "yarn") or unknown:
        what = f"{kind} with {unknown[0]}" if unknown else kind
        raise UnsupportedFeature(
            f"{fields.path.name} scales its rotary embedding by {what}; Cloister has linear, "
            "llama3 and yarn."
        )
    return RopeScaling(kind=kind, factor=factor, original_context=trained, **known)


def _windows(fields: _Fields, name: str, layers: int) -> dict[str, Any]:
    """The window, and the layers that have it."""
    window = fields.take("sliding_window", (int,), None)
    used = fields.take("use_sliding_window", (bool,), name not in (
        "Qwen2ForCausalLM", "Qwen3ForCausalLM", "SmolLM3ForCausalLM"
    ))
    first = fields.take("max_window_layers", (int,), layers)
    pattern = fields.take("sliding_window_pattern", (int,), None)
    pattern = fields.take("_sliding_window_pattern", (int,), pattern or 6)
    types = fields.take("layer_types", (list,), None)
    if types is not None:
        unknown = set(map(str, types)) - {"full_attention", "sliding_attention"}
        if unknown or len(types) != layers:
            raise UnsupportedFeature(
                f"{fields.path.name} has layer_types that Cloister does not know; choose another "
                "model."
            )
        chosen = [i for i, kind in enumerate(types) if kind == "sliding_attention"]
    elif name == "MistralForCausalLM":
        chosen = list(range(layers))
    elif name == "Gemma2ForCausalLM":
        chosen = [i for i in range(layers) if i % 2 == 0]
    elif name == "Gemma3ForCausalLM":
        chosen = [i for i in range(layers) if (i + 1) % pattern]
    else:
        chosen = list(range(first, layers))
    if window is None or not used:
        return {}
    return {"window": window, "windowed_layers": tuple(chosen)} if chosen else {}


def _no_rope(fields: _Fields, name: str, layers: int) -> tuple[int, ...]:
    interval = fields.take("no_rope_layer_interval", (int,), 4)
    rotary = fields.take("no_rope_layers", (list,), None)  # 1 where a layer is rotary
    if name != "SmolLM3ForCausalLM":
        return ()
    if rotary is None:
        rotary = [int((i + 1) % interval != 0) for i in range(layers)]
    return tuple(i for i, used in enumerate(rotary) if not used)


def import_huggingface(
    source: str | Path,
    out: str | Path,
    *,
    name: str | None = None,
    context: int | None = None,
    replace: bool = False,
    progress: Callable[[int, int, str], None] = lambda done, total, tensor: None,
) -> Checkpoint:
    """Read the Hugging Face directory `source` into the checkpoint `out`, tensor by tensor.

    Weights keep their type. Pickles are never read: convert them to safetensors first.

    Raises:
        UnsupportedArchitecture, UnsupportedFeature: see the module.
        TensorMismatch: a tensor is missing, unexpected, or of another shape or type.
        NonFiniteTensor: a tensor has a NaN or infinite entry.
        VocabularyMismatch: the tokenizer has ids beyond the embedding's rows.
        CheckpointError, OutputExists, NotEnoughDisk: see `CheckpointWriter`.
    """
    source = Path(source)
    config = read_config(source, context=context)
    _check_tokenizer(source, config.shape.vocab_size)
    where = {
        key: path for key, path in shards(source).items()
        if not key.endswith(("rotary_emb.inv_freq", "self_attn.rotary_emb.inv_freq"))
    }
    ours = {_rename(key, gemma=config.post_norms, source=source): key for key in where}
    if config.shape.tied and "head.weight" in ours:
        _check_tied(where, ours, source)
    wanted = expected_tensors(config)
    tensors: Plan = {}
    for tensor, shape in wanted.items():
        key = ours.pop(tensor, None)
        if key is None:
            raise TensorMismatch(f"{source.name} lacks the weights for {tensor}; copy it again.")
        with safe_open(where[key], framework="pt") as file:
            part = file.get_slice(key)
            kind, size = part.get_dtype(), tuple(part.get_shape())
        if size != shape or kind not in _DTYPES:
            raise TensorMismatch(
                f"Tensor {key} of {source.name} is {kind}{list(size)}, and its configuration "
                f"says {list(shape)} of F32, F16 or BF16; copy it again."
            )
        tensors[tensor] = _DTYPES[kind], shape
        where[tensor] = where.pop(key)
        ours[tensor] = key
    for tensor in sorted(set(ours) - set(wanted)):
        raise TensorMismatch(
            f"{source.name} has tensor {ours[tensor]}, which its configuration does not mention; "
            "choose another model."
        )
    bos, eos = _special(source)
    template = _template(source)
    with CheckpointWriter(
        out,
        metadata=Metadata(name=name or source.resolve().name, config=config, bos=bos, eos=eos),
        tensors=tensors, tokenizer=source / "tokenizer.json", template=template, replace=replace,
    ) as writer:
        for done, tensor in enumerate(tensors):
            progress(done, len(tensors), tensor)
            with safe_open(where[tensor], framework="pt") as file:
                value = file.get_tensor(ours[tensor])
            check_finite(value, ours[tensor], source)
            writer.add(tensor, value)
    return Checkpoint.open(out)


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


def _rename(key: str, *, gemma: bool, source: Path) -> str:
    if key in _TOP:
        return _TOP[key]
    match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)", key)
    names = _GEMMA_NAMES if gemma else _NAMES
    if match is None or match[2] not in names:
        raise TensorMismatch(
            f"{source.name} has tensor {key}, which Cloister does not know; choose another model."
        )
    return f"layers.{match[1]}.{names[match[2]]}.{match[3]}"


def _check_tied(where: dict[str, Path], ours: dict[str, str], source: Path) -> None:
    """Some files hold a shared matrix twice: fine if they are equal."""
    values = []
    for tensor in ("embed.weight", "head.weight"):
        with safe_open(where[ours[tensor]], framework="pt") as file:
            values.append(file.get_tensor(ours[tensor]))
    if not torch.equal(*values):
        raise TensorMismatch(
            f"{source.name} says that embedding and head are one matrix, and they differ; set "
            "tie_word_embeddings to false in its config.json if they should."
        )
    where.pop(ours.pop("head.weight"))


def _check_tokenizer(source: Path, rows: int) -> None:
    record = read_json(source / "tokenizer.json")
    model = record.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocabulary, dict):
        highest = max(vocabulary.values(), default=-1)
    elif isinstance(vocabulary, list):  # Unigram: pairs in order
        highest = len(vocabulary) - 1
    else:
        raise CheckpointError(f"The tokenizer of {source.name} has no vocabulary; copy it again.")
    added = record.get("added_tokens")
    for token in added if isinstance(added, list) else []:
        highest = max(highest, token.get("id", -1))
    if highest >= rows:
        raise VocabularyMismatch(
            f"The tokenizer of {source.name} has ids up to {highest} and the model {rows} rows; "
            "use the tokenizer that the model was trained with."
        )


def _special(source: Path) -> tuple[int | None, tuple[int, ...]]:
    """Begin and end token ids; generation_config.json knows better where there is one."""
    records = [read_json(source / "config.json")]
    if (source / "generation_config.json").exists():
        records.insert(0, read_json(source / "generation_config.json"))
    first: dict[str, Any] = {}
    for name in ("bos_token_id", "eos_token_id"):
        first[name] = next(
            (record[name] for record in records if record.get(name) is not None), None
        )
    eos = first["eos_token_id"]
    many = eos if isinstance(eos, list) else [] if eos is None else [eos]
    return first["bos_token_id"], tuple(many)


def _template(source: Path) -> Path | str | None:
    path = source / "chat_template.jinja"
    if path.exists():
        return path
    config = source / "tokenizer_config.json"
    template = read_json(config).get("chat_template") if config.exists() else None
    return template if isinstance(template, str) else None
