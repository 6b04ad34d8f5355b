"""A GGUF file's own blocks are kept as they are, or one sentence says why not."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from tests.unit.model import gguf_files as files
from torch import nn

from cloister.cli import main
from cloister.distill.parallel import read_plain
from cloister.errors import (
    CheckpointError,
    CloisterError,
    NonFiniteTensor,
    QuantizationError,
    SettingError,
    UnsupportedFeature,
)
from cloister.model import gguf_file
from cloister.model.blocks import HALVES, Blocks, FileTypes
from cloister.model.checkpoint import Checkpoint, expected_tensors
from cloister.model.imports import import_model
from cloister.quantize.apply import quantize
from cloister_kernels import reference
from cloister_kernels.pack import Format

MIXED = {"": "Q4_K", "attn_v": "Q6_K", "ffn_up": "Q8_0", "ffn_down": "Q4_1", "token_embd": "Q6_K",
         "output": "Q8_0", "blk.1.attn_k.weight": "Q4_0"}


def both(path: Path, kinds: dict[str, str], *given: str, **changes: Any) -> list[Checkpoint]:
    """What is imported of one file: its own blocks, and their values."""
    files.write_blocks(path, kinds, *given, **changes)
    return [import_model(path, path.with_name("kept"), keep_quantization=True),
            import_model(path, path.with_name("plain"))]


def matrices(checkpoint: Checkpoint) -> list[str]:
    return [name for name, shape in expected_tensors(checkpoint.metadata.config).items()
            if len(shape) == 2]


@pytest.mark.parametrize("kind", HALVES)
def test_blocks_of_every_type_hold_the_values_that_an_import_of_values_gives(
    tmp_path: Path, kind: str
) -> None:
    kept, plain = both(tmp_path / "a.gguf", {"": kind})
    assert kept.metadata.recipe == f"gguf-{kind.lower()}" and Format[kind]
    assert kept.metadata.types == dict.fromkeys(matrices(kept), kind)
    for name in matrices(kept):
        assert torch.equal(read_plain(kept, name), plain.tensor(name)), name
    norm = "layers.1.mlp_norm.weight"
    assert torch.equal(kept.tensor(norm), plain.tensor(norm))


def test_they_are_the_bytes_of_the_file_rows_of_queries_and_keys_in_our_order(
    tmp_path: Path
) -> None:
    kept, _ = both(tmp_path / "a.gguf", MIXED)
    raw = (tmp_path / "a.gguf").read_bytes()
    held = gguf_file.read(tmp_path / "a.gguf").tensors
    for theirs, ours in (("blk.0.ffn_down", "layers.0.mlp.down"), ("token_embd", "embed")):
        each, blocks = held[f"{theirs}.weight"], kept.tensor(f"{ours}.weight.blocks")
        assert bytes(blocks.numpy().data) == raw[each.offset:each.offset + each.size_bytes]
    each, blocks = held["blk.0.attn_q.weight"], kept.tensor("layers.0.attn.qkv.q.weight.blocks")
    theirs = np.frombuffer(raw, np.uint8, each.size_bytes, each.offset).reshape(blocks.shape)
    assert np.array_equal(files.permuted(blocks.numpy(), 4), theirs)


@pytest.mark.parametrize("tied", [True, False])
@torch.inference_mode()
def test_the_decoder_computes_with_their_values_and_rounded_activations(
    tmp_path: Path, tied: bool
) -> None:
    kept, plain = both(tmp_path / "a.gguf", MIXED, "qwen2", tie_word_embeddings=tied)
    assert kept.metadata.recipe == (
        "gguf-q4_k-q6_k-q4_1-q8_0-q4_0" if tied else "gguf-q4_k-q6_k-q8_0-q4_1-q4_0-eq6_k")
    expected = plain.load()
    for module in expected.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(lambda _, given: (
                reference.round_groups(given[0].flatten(0, -2)).view_as(given[0]),))
    tokens = torch.randint(3, 400, (2, 24), generator=torch.Generator().manual_seed(5))
    got, wanted = kept.load()(tokens).flatten(0, 1), expected(tokens).flatten(0, 1)
    off = (got - wanted).norm(dim=1) / wanted.norm(dim=1)
    # Where an activation lies on the edge between two steps, it is rounded either way.
    assert off.max() < 0.02 and off.quantile(0.9) < 1e-5


@pytest.mark.parametrize(("kinds", "match"), [
    ({"": "Q4_0", "ffn_up": "Q5_1"}, r"blk\.0\.ffn_up\.weight of a\.gguf is of type Q5_1"),
    ({"": "Q4_0", "token_embd": "F16"}, r"token_embd\.weight of a\.gguf is of type F16"),
    ({"": "BF16"}, "type BF16, and Cloister computes with Q4_0, Q4_1, Q8_0, Q4_K, Q6_K"),
])
def test_a_matrix_that_no_operator_computes_with_is_refused_by_name(
    tmp_path: Path, kinds: dict[str, str], match: str
) -> None:
    path = files.write_blocks(tmp_path / "a.gguf", kinds)
    with pytest.raises(UnsupportedFeature, match=match):
        import_model(path, tmp_path / "out", keep_quantization=True)
    assert not (tmp_path / "out").exists()
    assert import_model(path, tmp_path / "out").metadata.recipe is None


def test_of_what_is_no_gguf_file_nothing_is_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SettingError, match="is no GGUF file"):
        import_model(tmp_path, tmp_path / "out", keep_quantization=True)
    assert main(["import", str(tmp_path), "-o", str(tmp_path / "a.safetensors"),
                 "--keep-quantization"]) == 1
    assert "An encoder has no" in capsys.readouterr().err


def test_they_are_not_quantized_again_and_the_command_says_what_they_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = files.write_blocks(tmp_path / "a.gguf", {"": "Q4_0", "token_embd": "Q8_0"})
    assert main(["import", str(path), "-o", str(tmp_path / "kept"), "--keep-quantization",
                 "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["recipe"] == "gguf-q4_0-q8_0"
    kept = Checkpoint.open(tmp_path / "kept")
    assert dict(kept.summary())["recipe"] == "gguf-q4_0-q8_0"
    with pytest.raises(QuantizationError, match=r"\(gguf-q4_0-q8_0\); import the GGUF file with"):
        quantize(kept, tmp_path / "again")


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize(("kind", "half"), [
    (kind, half) for kind, halves in HALVES.items() for half in halves])
def test_a_scale_that_is_not_finite_is_refused_at_import_and_when_it_is_read(
    tmp_path: Path, kind: str, half: int, value: float
) -> None:
    path = files.write_blocks(tmp_path / "a.gguf", {"": kind}, num_hidden_layers=1)
    kept = import_model(path, tmp_path / "kept", keep_quantization=True)
    blocks = bytes(kept.tensor("layers.0.mlp.up.weight.blocks").numpy().data)
    size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][1]
    for file in (path, kept.path / "model.safetensors"):
        raw = bytearray(file.read_bytes())
        at = raw.index(blocks) + 7 * size + half
        raw[at:at + 2] = struct.pack("<e", value)
        file.write_bytes(raw)
    with pytest.raises(NonFiniteTensor, match=r"blk\.0\.ffn_up\.weight of a\.gguf"):
        import_model(path, tmp_path / "out", keep_quantization=True)
    with pytest.raises(NonFiniteTensor, match=r"layers\.0\.mlp\.up\.weight\.blocks of kept"):
        Checkpoint.open(kept.path).load()


@pytest.mark.parametrize(("change", "match"), [
    ({"types": None}, "cannot be used"),
    ({"recipe": "gguf-q4_0"}, "not those of its recipe"),
    ({"layers.0.mlp.up.weight": "Q8_0"}, "not those of its recipe"),
    ({"layers.0.mlp.up.weight": None, "recipe": "gguf-q4_1"}, "says the type of|lacks tensor"),
    ({"layers.9.mlp.up.weight": "Q4_1", "recipe": "gguf-q4_1"}, r"type of layers\.9\.mlp\.up"),
    ({"norm.weight": "Q4_1", "recipe": "gguf-q4_1"}, "says the type of norm.weight"),
    ({"head.weight": "Q4_1", "recipe": "gguf-q4_1-eq4_1"}, "says the type of head.weight"),
    ({"layers.0.mlp.up.weight": "Q4_0", "recipe": "gguf-q4_1-q4_0"}, r"U8\[512, 160\], not U8"),
    ({"layers.0.mlp.up.weight": "Q5_1", "recipe": "gguf-q4_1-q5_1"}, "type Q5_1 have no operators"),
])
def test_a_checkpoint_whose_types_are_not_its_tensors_is_refused(
    tmp_path: Path, change: dict[str, Any], match: str
) -> None:
    path = files.write_blocks(tmp_path / "a.gguf", {"": "Q4_1"}, num_hidden_layers=1)
    kept = import_model(path, tmp_path / "kept", keep_quantization=True)
    record = json.loads((kept.path / "config.json").read_text())
    for name, value in change.items():
        within = record if name in record else record["types"]
        within[name] = value
        if value is None:
            del within[name]
    (kept.path / "config.json").write_text(json.dumps(record))
    with pytest.raises((CheckpointError, SettingError), match=match):
        Checkpoint.open(kept.path)


def test_rows_that_do_not_divide_into_blocks_are_refused() -> None:
    with pytest.raises(SettingError, match="row of 576 inputs does not divide into Q4_K's blocks"):
        Blocks(kind="Q4_K").row_bytes(576)
    assert FileTypes(by_tensor={}).scheme_of("head.weight") is None


def test_damage_anywhere_in_a_header_is_an_error_of_ours_or_harmless(tmp_path: Path) -> None:
    whole = files.write_blocks(tmp_path / "whole.gguf", {"": "Q4_0"}, num_hidden_layers=1)
    raw, path = whole.read_bytes(), tmp_path / "a.gguf"
    first = min(each.offset for each in gguf_file.read(whole).tensors.values())
    table = raw.index(b"token_embd.weight")
    rng, refused = np.random.default_rng(11), 0
    for at in (*rng.integers(4, table, 30), *rng.integers(table, first, 90)):
        damaged = bytearray(raw)
        damaged[at] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        try:
            import_model(path, tmp_path / "out", keep_quantization=True, replace=True).load()
        except CloisterError:
            refused += 1
    assert refused > 50


@pytest.mark.parametrize("share", [0.3, 0.6, 0.9999])
def test_a_truncated_file_is_refused_as_such(tmp_path: Path, share: float) -> None:
    path = files.write_blocks(tmp_path / "a.gguf", {"": "Q6_K"}, num_hidden_layers=1)
    path.write_bytes(path.read_bytes()[:int(path.stat().st_size * share)])
    with pytest.raises(CheckpointError, match="truncated"):
        import_model(path, tmp_path / "out", keep_quantization=True)
    assert not (tmp_path / "out").exists()
