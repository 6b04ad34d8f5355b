"""A field that a file lacks means what transformers takes it to mean; a bad one is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models

from cloister.errors import CheckpointError, SettingError, UnsupportedFeature
from cloister.model.config import ModelConfig, RopeScaling
from cloister.model.huggingface import read_config
from cloister.model.imports import import_model
from cloister.records import build

LENGTH = 48
SIZES = (
    "hidden_size", "intermediate_size", "max_position_embeddings", "num_attention_heads",
    "num_hidden_layers", "vocab_size",
)
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
# Every optional field holds a value that is not its default and that changes the logits.
PLAIN: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4,
    "num_attention_heads": 8, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "head_dim": 16, "rms_norm_eps": 0.01, "rope_theta": 300.0, "tie_word_embeddings": True,
    "hidden_act": "gelu_pytorch_tanh", **TOKENS,
}
BIASES = {"attention_bias": True, "mlp_bias": True}
QWEN = {
    "num_attention_heads": 32, "sliding_window": 8, "use_sliding_window": True,
    "max_window_layers": 1,
}
GEMMA: dict[str, Any] = {
    "tie_word_embeddings": False, "hidden_act": "silu", "hidden_activation": "silu",
    "attention_bias": True, "query_pre_attn_scalar": 24,
    "final_logit_softcapping": 1.5, "sliding_window": 8,
}
TYPES = ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]
LAYOUTS: dict[str, dict[str, Any]] = {
    "Llama": {**PLAIN, **BIASES},
    "Mistral": {**PLAIN, "sliding_window": 8},
    "Qwen2": {**PLAIN, **QWEN},
    "Qwen3": {**PLAIN, **QWEN, "attention_bias": True},
    "Gemma2": {**PLAIN, **GEMMA, "attn_logit_softcapping": 2.0},
    "Gemma3": {
        **PLAIN, **GEMMA, "rope_local_base_freq": 50.0, "sliding_window_pattern": 3,
        "num_hidden_layers": 6,
    },
    "SmolLM3": {
        **PLAIN, **BIASES, "tie_word_embeddings": False, "no_rope_layer_interval": 3,
        "use_sliding_window": True, "sliding_window": 8,
    },
}
LAYERED = {
    "Qwen2": {"layer_types": TYPES}, "Qwen3": {"layer_types": TYPES},
    "Gemma2": {"layer_types": TYPES}, "Gemma3": {"layer_types": TYPES, "num_hidden_layers": 4},
    "SmolLM3": {"no_rope_layers": [0, 1, 0, 1], "layer_types": TYPES},
}
LINEAR = {"rope_type": "linear", "factor": 4.0}
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.5, "high_freq_factor": 3.0,
    "original_max_position_embeddings": 32,
}
YARN = {
    # An original context in which even the default of beta_fast, 32 turns, is a part of the ramp.
    "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096,
    "beta_fast": 4.0, "beta_slow": 0.5, "attention_factor": 1.5, "truncate": False,
}


def without(config: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in keys}


def write(directory: Path, kind: str, config: dict[str, Any]) -> Path:
    directory.mkdir(exist_ok=True)
    config = {"architectures": [f"{kind}ForCausalLM"], **config}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


@torch.inference_mode()
def check_parity(directory: Path, kind: str, config: dict[str, Any]) -> None:
    """Our logits are those of the model that transformers builds from `config`."""
    transformers = pytest.importorskip("transformers")
    theirs = getattr(transformers, f"{kind}TextConfig" if kind == "Gemma3" else f"{kind}Config")
    settings = theirs.from_dict(json.loads(json.dumps(config)), attn_implementation="eager")
    torch.manual_seed(3)
    model = getattr(transformers, f"{kind}ForCausalLM")(settings).eval()
    for key, parameter in model.named_parameters():
        # Small embeddings show the norm's epsilon; norms and biases begin at values that hide
        # a mistake in them.
        parameter.normal_(std=0.05 if "embed" in key else 0.15 if parameter.dim() == 2 else 0.3)
        if "norm" in key and "Gemma" not in kind:
            parameter += 1.0
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    if settings.tie_word_embeddings:
        del weights["lm_head.weight"]
    save_file(weights, write(directory, kind, config) / "model.safetensors")
    vocabulary = {chr(0x4E00 + i): i for i in range(config["vocab_size"])}
    Tokenizer(models.WordLevel(vocabulary, unk_token=chr(0x4E00))).save(
        str(directory / "tokenizer.json")
    )
    ours = import_model(directory, directory / "ours").load()
    tokens = torch.randint(3, 64, (1, LENGTH), generator=torch.Generator().manual_seed(5))
    expected = model(tokens).logits
    assert (ours(tokens) - expected).abs().max() <= 2e-5 * expected.abs().max()


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "key"), [
    (kind, key) for kind, config in LAYOUTS.items()
    for key in (None, *without(config, *SIZES, *TOKENS))
])
def test_a_missing_field_has_the_default_of_its_architecture(
    tmp_path: Path, kind: str, key: str | None
) -> None:
    config = LAYOUTS[kind] if key is None else without(LAYOUTS[kind], key)
    check_parity(tmp_path / "hub", kind, config)


@pytest.mark.parametrize(("kind", "key"), [
    (kind, key) for kind in LAYERED for key in (None, "layer_types")
] + [("SmolLM3", "no_rope_layers")])
def test_a_missing_list_of_layers_has_the_default_of_its_architecture(
    tmp_path: Path, kind: str, key: str | None
) -> None:
    config = without({**LAYOUTS[kind], **LAYERED[kind]}, *([] if key is None else [key]))
    check_parity(tmp_path / "hub", kind, config)


def test_defaults_too_large_to_show_in_a_short_text_are_those_of_their_architecture(
    tmp_path: Path,
) -> None:
    long = {"num_hidden_layers": 30, "max_position_embeddings": 8192}
    for kind, layers in (
        ("Mistral", tuple(range(30))), ("Qwen2", (28, 29)), ("Qwen3", (28, 29)),
        ("Gemma2", tuple(range(0, 30, 2))),
        ("Gemma3", tuple(i for i in range(30) if i % 6 != 5)),
    ):
        config = {**LAYOUTS[kind], **long}
        reduced = without(
            config, "sliding_window", "max_window_layers", "sliding_window_pattern"
        )
        got = read_config(write(tmp_path / kind, kind, reduced))
        assert (got.window, got.windowed_layers) == (4096, layers)


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("key", SIZES)
def test_a_missing_size_is_refused_by_name(tmp_path: Path, kind: str, key: str) -> None:
    with pytest.raises(CheckpointError, match=f"lacks {key}"):
        read_config(write(tmp_path, kind, without(LAYOUTS[kind], key)))


@pytest.mark.parametrize(("kind", "key"), [
    ("Gemma2", "attn_logit_softcapping"), ("Gemma2", "final_logit_softcapping"),
    ("Mistral", "sliding_window"), ("Llama", "head_dim"), ("Qwen2", "num_key_value_heads"),
])
def test_null_is_not_the_default_where_it_is_a_value(
    tmp_path: Path, kind: str, key: str
) -> None:
    check_parity(tmp_path, kind, {**LAYOUTS[kind], key: None})


@pytest.mark.slow
@pytest.mark.parametrize("scaling", [LINEAR, LLAMA3, YARN], ids=["linear", "llama3", "yarn"])
@pytest.mark.parametrize("spelling", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("key", [None, *sorted({*LINEAR, *LLAMA3, *YARN} - {"rope_type"})])
def test_a_missing_rotary_entry_has_its_default_or_is_refused_by_name(
    tmp_path: Path, scaling: dict[str, Any], spelling: str, key: str | None
) -> None:
    config = {**LAYOUTS["Llama"], spelling: without(scaling, *([] if key is None else [key]))}
    if key in ("factor", "low_freq_factor", "high_freq_factor") and key in scaling:
        with pytest.raises(CheckpointError, match=f"lacks {key}"):
            read_config(write(tmp_path, "Llama", config))
    else:
        check_parity(tmp_path, "Llama", config)


@pytest.mark.parametrize(("drop", "change"), [
    ((), {}), (("full_attention",), {}), (("sliding_attention",), {}),
    ((), {"full_attention": LINEAR}), ((), {"sliding_attention": {"rope_type": "default"}}),
    ((), {"full_attention": None}),
])
def test_gemma_3_has_its_own_defaults_for_each_type_of_layer(
    tmp_path: Path, drop: tuple[str, ...], change: dict[str, Any]
) -> None:
    nested = {
        "full_attention": {**LINEAR, "rope_theta": 300.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 50.0}, **change,
    }
    config = without(LAYOUTS["Gemma3"], "rope_theta", "rope_local_base_freq")
    check_parity(tmp_path, "Gemma3", {**config, "rope_parameters": without(nested, *drop)})


@pytest.mark.parametrize(("kind", "changes", "match"), [
    ("Llama", {"rope_scaling": LINEAR, "rope_parameters": LINEAR}, "both"),
    ("Llama", {"rope_scaling": {"factor": 2.0}}, "factor"),
    ("Llama", {"rope_scaling": {**YARN, "mscale": 1.0}}, "mscale"),
    ("Llama", {"rope_scaling": {**LINEAR, "partial_rotary_factor": 0.5}}, "partial_rotary"),
    ("Llama", {"rope_parameters": {"full_attention": LINEAR}}, "full_attention"),
    ("Gemma3", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, "rope_theta"),
    ("Gemma3", {"rope_parameters": {"sliding_attention": LINEAR}}, "windowed"),
    ("Llama", {"layer_types": TYPES}, "layer_types"),
    ("Mistral", {"layer_types": TYPES}, "layer_types"),
    ("Qwen2", {"layer_types": TYPES[:3]}, "layer_types"),
    ("Qwen2", {"layer_types": [["full_attention"]] * 4}, "layer_types"),
    ("Qwen2", {"layer_types": TYPES, "use_sliding_window": False}, "sliding_window"),
    ("Gemma2", {"sliding_window": None}, "sliding_window"),
    ("Llama", {"no_rope_layers": [0, 1, 1, 1]}, "no_rope_layers"),
    ("Llama", {"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
    ("Gemma3", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
    ("Mistral", {"mlp_bias": True}, "mlp_bias"),
    ("Qwen2", {"attention_bias": True}, "attention_bias"),
    ("Gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
])
def test_what_an_architecture_does_not_read_is_refused_by_name(
    tmp_path: Path, kind: str, changes: dict[str, Any], match: str
) -> None:
    with pytest.raises(UnsupportedFeature, match=match):
        read_config(write(tmp_path, kind, {**LAYOUTS[kind], **changes}))


def test_neutral_values_and_bookkeeping_are_let_through(tmp_path: Path) -> None:
    for kind, extra in (
        ("Llama", {"is_llama_config": True, "rope_interleaved": False, "max_window_layers": 28,
                   "sliding_window": 8, "use_sliding_window": True,
                   "partial_rotary_factor": 1.0, "layer_types": ["full_attention"] * 4,
                   "rope_parameters": {"rope_type": "default", "partial_rotary_factor": 1.0}}),
        ("Mistral", {"layer_types": ["sliding_attention"] * 4, "use_sliding_window": False}),
        ("SmolLM3", {"max_window_layers": 2, "no_rope_layers": None}),
    ):
        plain = read_config(write(tmp_path, kind, LAYOUTS[kind]))
        assert read_config(write(tmp_path, kind, {**LAYOUTS[kind], **extra})) == plain


NUMBERS = ("8", None, math.nan, math.inf, -1.0, 0, 10**400, True, [8.0], {})
FIELDS = {
    "Llama": ("rms_norm_eps", "rope_theta"),
    "Gemma2": ("query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping"),
    "Gemma3": ("rope_local_base_freq",),
}
ENTRIES = (
    (LINEAR, "factor"), (LLAMA3, "factor"), (LLAMA3, "low_freq_factor"),
    (LLAMA3, "high_freq_factor"), (YARN, "beta_fast"), (YARN, "beta_slow"),
    (YARN, "attention_factor"), (YARN, "rope_theta"),
)
NULLABLE = (
    "attention_factor", "attn_logit_softcapping", "beta_fast", "beta_slow",
    "final_logit_softcapping",
)


@pytest.mark.parametrize("bad", NUMBERS, ids=lambda bad: str(bad)[:8])
def test_a_bad_number_is_refused_by_name(tmp_path: Path, bad: Any) -> None:
    cases = [
        (kind, key, {**LAYOUTS[kind], key: bad}) for kind, keys in FIELDS.items() for key in keys
    ]
    for spelling in ("rope_scaling", "rope_parameters"):
        cases += [
            ("Llama", key, {**LAYOUTS["Llama"], spelling: {**scaling, key: bad}})
            for scaling, key in ENTRIES
        ]
    cases += [
        ("Gemma3", "rope_theta", {**LAYOUTS["Gemma3"], "rope_parameters": {part: {
            "rope_theta": bad}}})
        for part in ("full_attention", "sliding_attention")
    ]
    for kind, key, config in cases:
        if bad is None and key in NULLABLE:
            continue
        with pytest.raises(CheckpointError, match=f"{key} .* must be a finite number above 0"):
            read_config(write(tmp_path, kind, config))


@pytest.mark.parametrize(("kind", "changes", "match"), [
    ("Llama", {"rope_scaling": "linear"}, "rope_scaling .* an object"),
    ("Llama", {"rope_parameters": [LINEAR]}, "rope_parameters .* an object"),
    ("Gemma3", {"rope_parameters": {"full_attention": 1}}, "full_attention .* an object"),
    ("Llama", {"rope_scaling": {**LINEAR, "rope_type": None}}, "rope_type .* a text"),
    ("Llama", {"rope_scaling": {"type": ["linear"]}}, "type .* a text"),
    ("Llama", {"rope_scaling": {**YARN, "truncate": 1}}, "truncate .* true or false"),
    *(("Llama", {"rope_scaling": {**LLAMA3, "original_max_position_embeddings": bad}},
       "original_max_position_embeddings .* a whole number")
      for bad in ("32", None, 32.5, 0, -1, True, 2**40)),
    ("Llama", {"tie_word_embeddings": None}, "tie_word_embeddings .* true or false"),
    ("Llama", {"attention_bias": "no"}, "attention_bias .* true or false"),
    ("Llama", {"hidden_act": 3}, "hidden_act .* a text"),
    ("Llama", {"hidden_size": 0}, "hidden_size .* a whole number"),
    ("Llama", {"num_attention_heads": 0}, "num_attention_heads .* a whole number"),
    ("Llama", {"max_position_embeddings": 10**30}, "max_position_embeddings .* a whole number"),
    ("Qwen3", {"head_dim": None}, "head_dim .* a whole number"),
    ("Qwen2", {"max_window_layers": -1}, "max_window_layers .* from 0"),
    ("Mistral", {"sliding_window": 0}, "sliding_window .* from 1"),
    ("Gemma3", {"sliding_window_pattern": 0}, "sliding_window_pattern .* a whole number"),
    ("SmolLM3", {"no_rope_layer_interval": 0}, "no_rope_layer_interval .* a whole number"),
    ("SmolLM3", {"no_rope_layers": [1, 0]}, "no_rope_layers .* each layer"),
    ("SmolLM3", {"no_rope_layers": ["1", "0", "1", "1"]}, "no_rope_layers .* each layer"),
    ("SmolLM3", {"no_rope_layers": 4}, "no_rope_layers .* a list"),
])
def test_a_field_that_is_not_what_it_must_be_is_refused_by_name(
    tmp_path: Path, kind: str, changes: dict[str, Any], match: str
) -> None:
    with pytest.raises(CheckpointError, match=match):
        read_config(write(tmp_path, kind, {**LAYOUTS[kind], **changes}))


@pytest.mark.parametrize(("changes", "match"), [
    ({"rope_theta": 1.0}, "rope_theta is 1.0"),
    ({"rope_scaling": {**LINEAR, "factor": 0.5}}, "factor is 0.5"),
    ({"rope_scaling": {**LLAMA3, "low_freq_factor": 3.0}}, "high_freq_factor"),
    ({"rope_scaling": {**YARN, "beta_slow": 5.0}}, "beta_fast"),
])
def test_numbers_without_a_meaning_are_refused_by_name(
    tmp_path: Path, changes: dict[str, Any], match: str
) -> None:
    with pytest.raises(SettingError, match=match):
        read_config(write(tmp_path, "Llama", {**LAYOUTS["Llama"], **changes}))


def test_special_tokens_that_are_no_ids_are_refused(tmp_path: Path) -> None:
    directory = tmp_path / "hub"
    check_parity(directory, "Llama", LAYOUTS["Llama"])
    for key in ("bos_token_id", "eos_token_id"):
        for bad in (["2"], "</s>", -1, True, {"id": 2}):
            write(directory, "Llama", {**LAYOUTS["Llama"], key: bad})
            with pytest.raises(CheckpointError, match=key):
                import_model(directory, tmp_path / "out")
            assert not (tmp_path / "out").exists()


def test_a_tokenizer_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    check_parity(tmp_path, "Llama", LAYOUTS["Llama"])
    for bad in ({}, {"model": {"vocab": {"a": "1"}}}, {"model": [], "added_tokens": [3]}):
        (tmp_path / "tokenizer.json").write_text(json.dumps(bad))
        with pytest.raises(CheckpointError, match="tokenizer"):
            import_model(tmp_path, tmp_path / "out")


@pytest.mark.parametrize("bad", [
    {"rope_theta": math.nan}, {"rope_theta": "1e4"}, {"rope_theta": None}, {"norm_eps": -1.0},
    {"norm_eps": None}, {"final_softcap": 0.0}, {"attention_softcap": True},
    {"rope_scaling": {"factor": "4"}}, {"rope_scaling": {"factor": math.inf}},
    {"rope_scaling": {"low_freq_factor": None}}, {"rope_scaling": {"beta_fast": [32]}},
    {"rope_scaling": {"original_context": 8.5}}, {"rope_scaling": {"truncate": 1}},
    {"shape": {"layers": 2.0}},
], ids=str)
def test_a_stored_configuration_with_a_bad_value_is_refused(
    tmp_path: Path, bad: dict[str, Any]
) -> None:
    source = write(tmp_path, "Llama", {**LAYOUTS["Llama"], "rope_scaling": LLAMA3})
    record = msgspec.to_builtins(read_config(source))
    assert build(record, ModelConfig, refuse=CheckpointError) == read_config(source)
    for key, value in bad.items():
        old = record[key]
        record[key] = {**old, **value} if isinstance(old, dict) else value
    with pytest.raises(CheckpointError, match=next(iter(bad))):
        build(record, ModelConfig, refuse=CheckpointError)


def test_a_ramp_that_falls_is_refused() -> None:
    with pytest.raises(SettingError, match="high_freq_factor is 4"):
        RopeScaling(kind="llama3", factor=8.0, low_freq_factor=4.0)
