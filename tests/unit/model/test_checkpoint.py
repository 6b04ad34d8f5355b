"""A checkpoint reads back as it was written, and a damaged one is refused by name."""

from __future__ import annotations

import errno
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from cloister.errors import (
    CheckpointError,
    GroupSizeError,
    NonFiniteTensor,
    NotEnoughDisk,
    OutputExists,
    QuantizationError,
    SettingError,
    TensorMismatch,
)
from cloister.model.checkpoint import Checkpoint, Metadata, plan
from cloister.model.config import ModelConfig, RopeScaling
from cloister.model.recipe import RECIPES, Recipe
from cloister.model.transformer import Decoder
from cloister.model.writer import CheckpointWriter
from cloister.quantize.apply import quantize
from cloister.tiers import Shape

SHAPE = Shape(
    vocab_size=300, hidden_size=128, layers=2, heads=4, kv_heads=2, head_size=32,
    feed_forward=256, context=64, tied=True,
)
CONFIG = ModelConfig(
    shape=SHAPE, rope_scaling=RopeScaling(kind="llama3", factor=2.0), window=8,
    windowed_layers=(1,), qkv_bias=True,
)


def write(path: Path, tokenizer_dir: Path, config: ModelConfig = CONFIG, **options: Any) -> Decoder:
    decoder = Decoder(config)
    decoder.initialize(0)
    tensors, values = plan(config, None), decoder.state_dict()
    with CheckpointWriter(
        path, metadata=Metadata(name="tiny", config=config, eos=(0,)), tensors=tensors,
        tokenizer=tokenizer_dir / "tokenizer.json",
        template=tokenizer_dir / "chat_template.jinja", **options,
    ) as writer:
        for name in tensors:
            writer.add(name, values[name])
    return decoder.eval()


@pytest.fixture
def checkpoint(tmp_path: Path, tokenizer_dir: Path) -> Path:
    write(tmp_path / "tiny", tokenizer_dir)
    return tmp_path / "tiny"


def change(path: Path, edit: Any) -> None:
    tensors = load_file(path / "model.safetensors")
    edit(tensors)
    save_file(tensors, path / "model.safetensors")


@torch.inference_mode()
def test_what_was_written_reads_back_and_computes_the_same(
    tmp_path: Path, tokenizer_dir: Path
) -> None:
    decoder = write(tmp_path / "tiny", tokenizer_dir)
    again = Checkpoint.open(tmp_path / "tiny")
    tokens = torch.arange(20)[None]
    assert again.metadata.config == CONFIG
    assert torch.equal(again.load()(tokens), decoder(tokens))
    assert "head.weight" not in load_file(tmp_path / "tiny" / "model.safetensors")


def test_a_large_checkpoint_is_sharded_and_reads_back(tmp_path: Path, tokenizer_dir: Path) -> None:
    write(tmp_path / "one", tokenizer_dir)
    write(tmp_path / "many", tokenizer_dir, shard_bytes=200_000)
    shards = sorted(path.name for path in (tmp_path / "many").glob("*.safetensors"))
    assert len(shards) > 2
    assert (tmp_path / "many" / "model.safetensors.index.json").exists()
    one, many = (Checkpoint.open(tmp_path / name).load() for name in ("one", "many"))
    for name, value in one.state_dict().items():
        assert torch.equal(many.state_dict()[name], value)


def test_a_shard_that_is_missing_is_refused(tmp_path: Path, tokenizer_dir: Path) -> None:
    write(tmp_path / "many", tokenizer_dir, shard_bytes=200_000)
    next((tmp_path / "many").glob("model-00002*")).unlink()
    with pytest.raises(CheckpointError):
        Checkpoint.open(tmp_path / "many")


def test_the_identity_changes_with_any_file(checkpoint: Path) -> None:
    before = Checkpoint.open(checkpoint).identity
    assert Checkpoint.open(checkpoint).identity == before
    (checkpoint / "chat_template.jinja").write_text("x")
    assert Checkpoint.open(checkpoint).identity != before


def test_a_missing_tensor_is_refused_by_name(checkpoint: Path) -> None:
    change(checkpoint, lambda tensors: tensors.pop("layers.1.mlp.up.weight"))
    with pytest.raises(TensorMismatch, match=r"layers\.1\.mlp\.up\.weight"):
        Checkpoint.open(checkpoint)


def test_an_extra_tensor_is_refused_by_name(checkpoint: Path) -> None:
    change(checkpoint, lambda tensors: tensors.update(surprise=torch.zeros(1)))
    with pytest.raises(TensorMismatch, match="surprise"):
        Checkpoint.open(checkpoint)


@pytest.mark.parametrize("value", [torch.zeros(5), torch.zeros(128, dtype=torch.int8)])
def test_a_tensor_of_another_shape_or_type_is_refused(checkpoint: Path, value: Any) -> None:
    change(checkpoint, lambda tensors: tensors.update({"norm.weight": value}))
    with pytest.raises(TensorMismatch, match=r"norm\.weight"):
        Checkpoint.open(checkpoint)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_tensor_that_is_not_finite_is_refused_by_name(checkpoint: Path, bad: float) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors["layers.0.attn.o.weight"][3, 4] = bad

    change(checkpoint, spoil)
    source = Checkpoint.open(checkpoint)
    with pytest.raises(NonFiniteTensor, match=r"layers\.0\.attn\.o"):
        source.load()
    with pytest.raises(NonFiniteTensor, match=r"layers\.0\.attn\.o"):
        quantize(source, checkpoint.parent / "q", Recipe.parse("8da8w"))
    assert sorted(path.name for path in checkpoint.parent.iterdir()) == ["tiny"]


@pytest.mark.parametrize("keep", [0, 4, 1000, -1])
def test_truncated_weights_are_refused(checkpoint: Path, keep: int) -> None:
    path = checkpoint / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError):
        Checkpoint.open(checkpoint).load()


@pytest.mark.parametrize("record", [
    {"format": 2}, {"name": 1}, {"config": None}, {"eos": "x"}, {"bos": 0.5}, {"recipe": "3bit"},
    {"recipe": 5}, {"parent": 1}, {"bos": True}, {"bos": -1}, {"eos": [1.0]}, {"surprise": 1},
])
def test_a_configuration_with_a_wrong_value_is_refused(
    checkpoint: Path, record: dict[str, object]
) -> None:
    path = checkpoint / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **record}))
    with pytest.raises(CheckpointError):
        Checkpoint.open(checkpoint)


@pytest.mark.parametrize("field", [
    {"surprise": 1}, {"activation": "relu"}, {"windowed_layers": [7]}, {"window": None},
    {"rope_scaling": {"kind": "magic", "factor": 2}}, {"shape": {"layers": 1}}, {"qk_norm": 1},
    {"norm_eps": "small"},
])
def test_a_model_configuration_with_a_wrong_value_is_refused(
    checkpoint: Path, field: dict[str, object]
) -> None:
    path = checkpoint / "config.json"
    record = json.loads(path.read_text())
    record["config"].update(field)
    path.write_text(json.dumps(record))
    with pytest.raises(CheckpointError):
        Checkpoint.open(checkpoint)


@pytest.mark.parametrize("text", [
    "", "{", "[]", "[" * 100_000, '{"format": 1, "format": 1}', '{"format": 1, "name": NaN}',
])
def test_a_configuration_that_is_no_json_object_is_refused(checkpoint: Path, text: str) -> None:
    (checkpoint / "config.json").write_text(text)
    with pytest.raises(CheckpointError):
        Checkpoint.open(checkpoint)


def test_a_configuration_that_is_a_pipe_is_refused_at_once(checkpoint: Path) -> None:
    (checkpoint / "config.json").unlink()
    os.mkfifo(checkpoint / "config.json")
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        Checkpoint.open(checkpoint)


@pytest.mark.parametrize("index", [
    {}, {"weight_map": []}, {"weight_map": {"x": 1}}, {"weight_map": {"x": "../y.safetensors"}},
    {"weight_map": {"embed.weight": "/etc/passwd"}},
    {"weight_map": {"surprise": "weights.safetensors"}},
])
def test_a_weight_index_that_is_malformed_or_leaves_the_directory_is_refused(
    checkpoint: Path, index: dict[str, object]
) -> None:
    (checkpoint / "model.safetensors").rename(checkpoint / "weights.safetensors")
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError):
        Checkpoint.open(checkpoint)


def test_a_private_checkpoint_is_its_owners_alone(tmp_path: Path, tokenizer_dir: Path) -> None:
    write(tmp_path / "mine", tokenizer_dir, private=True)
    assert (tmp_path / "mine").stat().st_mode & 0o077 == 0
    assert Checkpoint.open(str(tmp_path / "mine")).report is None


def test_an_existing_output_is_kept_unless_replacing_is_asked_for(
    checkpoint: Path, tokenizer_dir: Path
) -> None:
    with pytest.raises(OutputExists):
        write(checkpoint, tokenizer_dir)
    write(checkpoint, tokenizer_dir, config=replace(CONFIG, norm_eps=1e-6), replace=True)
    assert Checkpoint.open(checkpoint).metadata.config.norm_eps == 1e-6
    assert sorted(path.name for path in checkpoint.parent.iterdir()) == ["tiny"]


def test_replacing_never_removes_what_is_no_checkpoint(
    tmp_path: Path, tokenizer_dir: Path
) -> None:
    diary = tmp_path / "documents" / "diary.txt"
    diary.parent.mkdir()
    diary.write_text("dear diary")
    with pytest.raises(OutputExists, match="no checkpoint"):
        write(diary.parent, tokenizer_dir, replace=True)
    assert diary.read_text() == "dear diary"


def test_a_failure_leaves_nothing_behind(tmp_path: Path, tokenizer_dir: Path) -> None:
    tensors = plan(CONFIG, None)
    for error, expected in (
        (KeyboardInterrupt(), KeyboardInterrupt), (RuntimeError("x"), RuntimeError),
    ):
        with pytest.raises(expected), CheckpointWriter(
            tmp_path / "new", metadata=Metadata(name="x", config=CONFIG), tensors=tensors,
            tokenizer=tokenizer_dir / "tokenizer.json", template=None,
        ) as writer:
            name, (_, shape) = next(iter(tensors.items()))
            writer.add(name, torch.zeros(shape))
            raise error
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_is_named_and_leaves_nothing(
    tmp_path: Path, tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(NotEnoughDisk):
        write(tmp_path / "new", tokenizer_dir)
    assert list(tmp_path.iterdir()) == []


def test_too_little_disk_is_refused_before_anything_is_written(
    tmp_path: Path, tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(NotEnoughDisk, match="GB"):
        write(tmp_path / "new", tokenizer_dir)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("recipe", RECIPES)
def test_quantizing_covers_every_matrix_and_reports_the_bytes_on_disk(
    checkpoint: Path, recipe: str
) -> None:
    out = checkpoint.parent / "q"
    report = quantize(Checkpoint.open(checkpoint), out, Recipe.parse(recipe)).report
    matrices = [row for row in report.rows if len(row.shape) == 2]
    assert {row.bits for row in matrices} <= {4, 8}
    assert "head.weight" in {row.tensor for row in matrices}  # untied
    held = load_file(out / "model.safetensors")
    assert report.size_bytes == sum(
        -(-tensor.numel() // 2) if name.endswith(".q") and tensor.abs().max() <= 8
        else tensor.nbytes for name, tensor in held.items()
    )
    quantized = Checkpoint.open(out)
    assert quantized.metadata.parent == Checkpoint.open(checkpoint).identity
    with pytest.raises(QuantizationError, match="already"):
        quantize(quantized, checkpoint.parent / "r", Recipe.parse(recipe))


@torch.inference_mode()
def test_more_bits_lose_less(checkpoint: Path) -> None:
    source = Checkpoint.open(checkpoint)
    tokens = torch.arange(40)[None]
    expected, errors = source.load()(tokens), []
    for recipe in ("8da8w", "8da4w-g32", "8da4w-g128"):
        out = checkpoint.parent / recipe
        quantize(source, out, Recipe.parse(recipe))
        errors.append(float((Checkpoint.open(out).load()(tokens) - expected).norm()))
    assert 0 < errors[0] < errors[1] < errors[2]
    assert errors[1] < 0.2 * float(expected.norm())


def test_a_group_that_does_not_divide_is_refused_by_layer_and_nothing_is_written(
    tmp_path: Path, tokenizer_dir: Path
) -> None:
    shape = replace(SHAPE, feed_forward=96)
    write(tmp_path / "tiny", tokenizer_dir, config=replace(CONFIG, shape=shape))
    with pytest.raises(GroupSizeError, match=r"layers\.0\.mlp\.down has 96 inputs.*64"):
        quantize(Checkpoint.open(tmp_path / "tiny"), tmp_path / "q", Recipe.parse("8da4w-g64"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tiny"]


@pytest.mark.parametrize("name", ["", "8da4w", "8da4w-g16", "4bit", "8da4w-g32-e8"])
def test_an_unknown_recipe_is_refused_with_the_known_ones(name: str) -> None:
    with pytest.raises(SettingError, match="8da4w-g32"):
        Recipe.parse(name)
