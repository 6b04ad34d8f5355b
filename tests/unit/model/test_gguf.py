"""A GGUF file gives the model that it was made from, or one sentence that says why not."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from tests.unit.model import gguf_files as files
from tokenizers import Tokenizer

from cloister.errors import (
    CheckpointError,
    CloisterError,
    TensorMismatch,
    UnsupportedArchitecture,
    UnsupportedFeature,
)
from cloister.model import gguf as cloister_gguf
from cloister.model import gguf_file
from cloister.model.imports import import_model
from cloister.quantize.apply import quantize

LENGTH = 48
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192, "rope_theta": 500_000.0,
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    files.write(path)
    return path


@torch.inference_mode()
def check_parity(path: Path, model: Any) -> None:
    ours = import_model(path, path.with_name("ours")).load()
    tokens = torch.randint(3, 400, (1, LENGTH), generator=torch.Generator().manual_seed(5))
    expected = model(tokens).logits
    assert (ours(tokens) - expected).abs().max() <= 2e-5 * expected.abs().max()


@pytest.mark.parametrize(("architecture", "changes"), [
    ("llama", {}), ("llama", {"tie_word_embeddings": False, "num_key_value_heads": 4}),
    ("llama", {"attention_bias": True, "mlp_bias": True}),
    ("qwen2", {"tie_word_embeddings": False}), ("qwen3", {}), ("qwen3", {"head_dim": 32}),
    ("gemma2", {}), ("gemma3", {"num_hidden_layers": 7}), ("smollm3", {"num_hidden_layers": 5}),
])
def test_logits_are_those_of_the_model_that_the_file_was_made_from(
    tmp_path: Path, architecture: str, changes: dict[str, Any]
) -> None:
    check_parity(tmp_path / "a.gguf", files.write(tmp_path / "a.gguf", architecture, **changes))


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_the_frequency_factors_of_llama_3_are_its_scaling(tmp_path: Path, factor: float) -> None:
    scaling = {**LLAMA3, "factor": factor}
    model, config = files.tiny(rope_parameters=scaling, head_dim=64, max_position_embeddings=16384)
    plain = 500_000.0 ** -(torch.arange(0, 64, 2) / 64)
    writer = files.begin(tmp_path / "a.gguf", "llama", config)
    files.add_byte_level(writer, config["vocab_size"])
    files.add_tensors(writer, "llama", model, config)
    writer.add_tensor("rope_freqs.weight", (plain / model.model.rotary_emb.inv_freq).numpy())
    files.end(writer)
    check_parity(tmp_path / "a.gguf", model)


def test_other_frequency_factors_are_refused(tmp_path: Path) -> None:
    model, config = files.tiny()
    writer = files.begin(tmp_path / "a.gguf", "llama", config)
    files.add_byte_level(writer, config["vocab_size"])
    files.add_tensors(writer, "llama", model, config)
    writer.add_tensor("rope_freqs.weight", np.linspace(1, 3, 8, dtype=np.float32))
    files.end(writer)
    with pytest.raises(UnsupportedFeature, match="rope_freqs"):
        import_model(tmp_path / "a.gguf", tmp_path / "out")


@pytest.mark.parametrize(("entries", "scaling"), [
    ({"type": "linear", "factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
    ({"factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
    ({"type": "none"}, {"rope_type": "default"}),
    ({"type": "yarn", "factor": 4.0, "original_context_length": 64},
     {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}),
], ids=["linear", "without a name", "none", "yarn"])
@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_scaled_rotary_embeddings_are_those_of_the_metadata(
    tmp_path: Path, architecture: str, entries: dict[str, Any], scaling: dict[str, Any]
) -> None:
    model, config = files.tiny(architecture, rope_parameters={**scaling, "rope_theta": 500.0})
    writer = files.begin(tmp_path / "a.gguf", architecture, config)
    for key, value in entries.items():
        name = f"{architecture}.rope.scaling.{key}"
        add = {str: writer.add_string, float: writer.add_float32, int: writer.add_uint32}
        add[type(value)](name, value)
    files.add_byte_level(writer, config["vocab_size"])
    files.add_tensors(writer, architecture, model, config)
    files.end(writer)
    check_parity(tmp_path / "a.gguf", model)


def readable() -> list[gguf.GGMLQuantizationType]:
    """Every type that the library dequantizes."""
    kinds = []
    for kind in gguf.GGMLQuantizationType:
        try:
            gguf.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
            kinds.append(kind)
        except NotImplementedError:
            pass
    return kinds


def test_every_type_of_tensor_has_the_values_that_the_library_gives_it(tmp_path: Path) -> None:
    kinds = readable()
    assert {"F32", "F16", "BF16", "Q4_0", "Q4_1", "Q8_0", "Q2_K", "Q4_K", "Q6_K", "IQ1_S",
            "IQ4_XS", "MXFP4"} <= {kind.name for kind in kinds}
    rng = np.random.default_rng(7)
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "qwen2")
    raw = {}
    for kind in kinds:
        block, size = gguf.GGML_QUANT_SIZES[kind]
        raw[kind] = rng.integers(0, 64, (3, 512 // block * size), np.uint8)
        writer.add_tensor(f"{kind.name}.weight", raw[kind], raw_dtype=kind)
    files.end(writer)
    stored = cloister_gguf.stored(gguf_file.read(tmp_path / "a.gguf"))
    for kind in kinds:
        each = stored[f"{kind.name}.weight (unknown)"]
        value = each.read()
        assert (each.kind, each.shape, each.dtype) == (kind.name, (3, 512), value.dtype)
        assert value.shape == (3, 512)
        wanted = torch.from_numpy(gguf.dequantize(raw[kind], kind))
        assert torch.equal(value.float(), wanted), kind.name
        plain = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
        assert value.dtype == plain.get(kind.name, torch.float32)


def test_a_quantized_file_is_kept_exactly_and_the_checkpoint_says_what_it_was(
    tmp_path: Path,
) -> None:
    model, config = files.tiny()
    writer = files.begin(tmp_path / "a.gguf", "llama", config)
    files.add_byte_level(writer, config["vocab_size"])
    kinds = {"attn_v": gguf.GGMLQuantizationType.Q4_1, "ffn_up": gguf.GGMLQuantizationType.F16}
    exact = {}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 3)
    for key, value in model.state_dict().items():
        if key == "lm_head.weight":
            continue
        name = names.get_name(key, try_suffixes=(".weight",))
        kind = kinds.get(name.split(".")[-2], gguf.GGMLQuantizationType.F32)
        data = gguf.quantize(value.numpy(), kind)
        exact[name] = torch.from_numpy(gguf.dequantize(data, kind))
        writer.add_tensor(name, data, raw_dtype=kind)
    files.end(writer)
    checkpoint = import_model(tmp_path / "a.gguf", tmp_path / "out")
    for layer in range(3):
        value = checkpoint.tensor(f"layers.{layer}.attn.qkv.v.weight")
        assert value.dtype is torch.float32
        assert torch.equal(value, exact[f"blk.{layer}.attn_v.weight"])
        assert checkpoint.tensor(f"layers.{layer}.mlp.up.weight").dtype is torch.float16
    types = {"F16": 3, "F32": len(exact) - 6, "Q4_1": 3}
    origin = checkpoint.metadata.origin
    assert origin is not None and (origin.format, origin.types) == ("gguf", types)
    assert checkpoint.report is not None and checkpoint.report.to_dict()["types"] == types
    again = quantize(checkpoint, tmp_path / "quantized", "8da4w-g32")
    assert again.metadata.origin == origin  # which an export writes into the receipt


def test_a_split_file_is_read_from_any_of_its_parts(tmp_path: Path) -> None:
    model, config = files.tiny()
    writer = files.begin(tmp_path / "a.gguf", "llama", config, split_max_tensors=10)
    files.add_byte_level(writer, config["vocab_size"])
    files.add_tensors(writer, "llama", model, config)
    files.end(writer)
    parts = sorted(tmp_path.glob("a-*.gguf"))
    assert len(parts) == 3
    check_parity(parts[1], model)
    parts[2].unlink()
    with pytest.raises(CheckpointError, match=r"3 files and a-00003-of-00003\.gguf is not there"):
        import_model(parts[0], tmp_path / "out")
    parts[0].rename(tmp_path / "model.gguf")
    with pytest.raises(CheckpointError, match="one of 3 parts"):
        import_model(tmp_path / "model.gguf", tmp_path / "out")


@pytest.mark.parametrize("share", [0.0, 1e-4, 0.01, 0.05, 0.1, 0.3, 0.6, 0.9, 0.9999])
def test_a_truncated_file_is_refused_as_such(tmp_path: Path, whole: Path, share: float) -> None:
    raw = whole.read_bytes()
    (tmp_path / "a.gguf").write_bytes(raw[:int(len(raw) * share)])
    with pytest.raises(CheckpointError, match=r"truncated|no GGUF file"):
        import_model(tmp_path / "a.gguf", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("version", "match"), [
    (4, "version 4 .* newer Cloister"), (1, "version 1 .* newer llama.cpp"),
    (3 << 24, "big-endian"),
])
def test_another_version_or_byte_order_is_refused_by_name(
    tmp_path: Path, whole: Path, version: int, match: str
) -> None:
    raw = whole.read_bytes()
    (tmp_path / "a.gguf").write_bytes(raw[:4] + struct.pack("<I", version) + raw[8:])
    with pytest.raises(CheckpointError, match=match):
        import_model(tmp_path / "a.gguf", tmp_path / "out")


def test_a_file_that_was_written_big_endian_is_refused_as_such(tmp_path: Path) -> None:
    model, config = files.tiny()
    writer = files.begin(tmp_path / "a.gguf", "llama", config, endianess=gguf.GGUFEndian.BIG)
    files.add_byte_level(writer, config["vocab_size"])
    files.add_tensors(writer, "llama", model, config)
    files.end(writer)
    with pytest.raises(CheckpointError, match="big-endian"):
        import_model(tmp_path / "a.gguf", tmp_path / "out")


@pytest.mark.parametrize(("kind", "match"), [(99, "type 99"), (26, "type I32")])
def test_a_tensor_of_an_unknown_type_is_refused_by_name(
    tmp_path: Path, whole: Path, kind: int, match: str
) -> None:
    raw = bytearray(whole.read_bytes())
    at = raw.index(b"blk.1.attn_norm.weight") + len("blk.1.attn_norm.weight") + 4 + 8
    assert raw[at:at + 4] == struct.pack("<I", 0)
    raw[at:at + 4] = struct.pack("<I", kind)
    (tmp_path / "a.gguf").write_bytes(raw)
    with pytest.raises(UnsupportedFeature, match=rf"attn_norm.*{match}"):
        import_model(tmp_path / "a.gguf", tmp_path / "out")


def test_a_tensor_that_lies_elsewhere_than_behind_the_one_before_is_refused(
    tmp_path: Path, whole: Path
) -> None:
    raw = bytearray(whole.read_bytes())
    at = raw.index(b"blk.1.attn_norm.weight") + len("blk.1.attn_norm.weight") + 4 + 8 + 4
    raw[at:at + 8] = bytes(8)  # it would read the first tensor's values
    (tmp_path / "a.gguf").write_bytes(raw)
    with pytest.raises(CheckpointError, match="damaged"):
        import_model(tmp_path / "a.gguf", tmp_path / "out")


def test_damage_anywhere_in_a_header_is_an_error_of_ours(tmp_path: Path, whole: Path) -> None:
    raw = whole.read_bytes()
    rng = np.random.default_rng(11)
    for at in rng.integers(4, gguf_file.read(whole).tensors["token_embd.weight"].offset, 150):
        damaged = bytearray(raw)
        damaged[at] ^= 1 << int(rng.integers(8))
        damaged[at + 1] = 0xFF
        (tmp_path / "a.gguf").write_bytes(damaged)
        try:
            header = gguf_file.read(tmp_path / "a.gguf")
            cloister_gguf.configuration(header)
        except CloisterError:
            continue


@pytest.mark.parametrize("start", [b"lmgg", b"version https://git-lfs.github.com/spec/v1\n", b"PK"])
def test_what_is_no_gguf_file_is_refused_as_such(tmp_path: Path, start: bytes) -> None:
    (tmp_path / "a.gguf").write_bytes(start + bytes(100))
    with pytest.raises(CheckpointError, match=r"no GGUF file|git lfs pull"):
        import_model(tmp_path / "a.gguf", tmp_path / "out")


def rewritten(path: Path, **entries: Any) -> Path:
    """Write a tiny model with other metadata; None leaves an entry out."""
    model, config = files.tiny()
    writer = files.begin(path, "llama", config)
    files.add_byte_level(writer, config["vocab_size"])
    files.add_tensors(writer, "llama", model, config)
    held = writer.kv_data[0]
    for key, value in entries.items():
        held.pop(key, None)
        if isinstance(value, list):
            writer.add_array(key, value)
        elif value is not None:
            add = {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32,
                   bool: writer.add_bool}
            add[type(value)](key, value)
    files.end(writer)
    return path


@pytest.mark.parametrize(("entries", "error", "match"), [
    ({"general.architecture": "mamba"}, UnsupportedArchitecture, "mamba"),
    ({"general.architecture": None}, UnsupportedArchitecture, "None"),
    ({"llama.expert_count": 8}, UnsupportedFeature, r"llama\.expert_count"),
    ({"llama.rope.dimension_count": 8}, UnsupportedFeature, r"llama\.rope\.dimension_count"),
    ({"llama.attention.value_length": 32}, UnsupportedFeature, "value_length"),
    ({"llama.rope.scaling.type": "longrope"}, UnsupportedFeature, "longrope"),
    ({"general.architecture": ["llama"]}, UnsupportedArchitecture, "llama"),
    ({"llama.attention.head_count": [4, 4, 2]}, UnsupportedFeature, "num_attention_heads .* each"),
    ({"llama.attention.head_count": 0}, CheckpointError, "num_attention_heads .* above 0"),
    ({"llama.block_count": "3"}, CheckpointError, "num_hidden_layers .* number"),
    ({"llama.rope.freq_base": "10000"}, CheckpointError, "rope_theta .* number"),
    ({"llama.block_count": None}, CheckpointError, r"llama\.block_count"),
    ({"llama.block_count": 4}, TensorMismatch, r"layers\.3"),
    ({"llama.embedding_length": 32}, CheckpointError, "shape|says"),
    ({"llama.attention.layer_norm_rms_epsilon": None}, CheckpointError, "rms_epsilon"),
    ({"tokenizer.ggml.model": "rwkv"}, UnsupportedFeature, "rwkv"),
    ({"tokenizer.ggml.model": "bert"}, UnsupportedFeature, "bert"),
    ({"tokenizer.ggml.model": None}, CheckpointError, r"tokenizer\.ggml\.model"),
    ({"tokenizer.ggml.pre": "new-kind"}, UnsupportedFeature, "new-kind"),
    ({"tokenizer.ggml.pre": None}, UnsupportedFeature, "does not say"),
    ({"tokenizer.ggml.tokens": None}, CheckpointError, r"tokenizer\.ggml\.tokens"),
    ({"tokenizer.ggml.tokens": ["a", "b"]}, CheckpointError, r"tokenizer\.ggml\.tokens"),
    ({"tokenizer.ggml.merges": ["x"]}, CheckpointError, "merges"),
    ({"tokenizer.ggml.merges": ["qqq zzz"]}, CheckpointError, "vocabulary"),
    ({"tokenizer.ggml.eos_token_id": 10**6}, CheckpointError, "eos_token_id"),
])
def test_what_is_unknown_or_missing_is_refused_by_name(
    tmp_path: Path, entries: dict[str, Any], error: type[Exception], match: str
) -> None:
    path = rewritten(tmp_path / "a.gguf", **entries)
    with pytest.raises(error, match=match):
        import_model(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_entries_that_change_nothing_pass_and_others_where_the_user_says_so(
    tmp_path: Path,
) -> None:
    path = rewritten(tmp_path / "a.gguf", **{
        "llama.rope.dimension_count": 16, "llama.expert_count": 0, "llama.vocab_size": 416,
        "llama.tensor_data_layout": "Meta AI original pth", "general.anything": "else",
        "llama.novelty": 3,
    })
    with pytest.raises(UnsupportedFeature, match=r"--ignore llama\.novelty"):
        import_model(path, tmp_path / "out")
    origin = import_model(path, tmp_path / "out", ignore=["llama.novelty"]).metadata.origin
    assert origin is not None and origin.ignored == ("llama.novelty",)


def test_template_and_special_tokens_are_those_of_the_metadata(tmp_path: Path) -> None:
    path = rewritten(tmp_path / "a.gguf", **{
        "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.eot_token_id": 0, "tokenizer.ggml.add_bos_token": True,
    })
    checkpoint = import_model(path, tmp_path / "out")
    assert checkpoint.template_path is not None
    assert checkpoint.template_path.read_text() == files.TEMPLATE
    assert (checkpoint.metadata.bos, checkpoint.metadata.eos) == (1, (2, 0))
    assert checkpoint.metadata.special_tokens == {
        "bos_token": "<|user|>", "eos_token": "<|assistant|>"}
    tokenizer = Tokenizer.from_file(str(checkpoint.tokenizer_path))
    assert tokenizer.encode("the<|end|>").ids == [1, *tokenizer.encode(
        "the", add_special_tokens=False).ids, 0]


@pytest.mark.parametrize("types", [None, [1] * 416, [0] * 416])
def test_control_tokens_that_a_file_calls_words_are_control_tokens(
    tmp_path: Path, types: list[int] | None
) -> None:
    path = rewritten(tmp_path / "a.gguf", **{"tokenizer.ggml.token_type": types})
    checkpoint = import_model(path, tmp_path / "out")
    tokenizer = Tokenizer.from_file(str(checkpoint.tokenizer_path))
    assert tokenizer.encode("<|user|>the<|end|>").ids == [1, tokenizer.token_to_id("the"), 0]


def test_a_name_that_is_not_the_formats_is_never_taken_for_a_tensor_of_ours(tmp_path: Path) -> None:
    model, config = files.tiny()
    writer = files.begin(tmp_path / "a.gguf", "llama", config)
    files.add_byte_level(writer, config["vocab_size"])
    files.add_tensors(writer, "llama", model, config)
    writer.add_tensor("norm.weight", np.ones(64, np.float32))
    files.end(writer)
    with pytest.raises(TensorMismatch, match=r"has tensor norm\.weight"):
        import_model(tmp_path / "a.gguf", tmp_path / "out")
