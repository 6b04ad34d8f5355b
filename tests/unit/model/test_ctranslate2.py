"""A Whisper encoder in a CTranslate2 file is that of transformers' files, or refused by name."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

transformers = pytest.importorskip("transformers")

from tests.unit.model import multimodal_models as theirs  # noqa: E402

from cloister.errors import (  # noqa: E402
    CheckpointError,
    CloisterError,
    TensorMismatch,
    UnsupportedFeature,
)
from cloister.model.encoder_import import import_encoder  # noqa: E402

TYPES = {torch.float32: 0, torch.int8: 1, torch.int16: 2, torch.float16: 4}


def text(value: str) -> bytes:
    return struct.pack("<H", len(value) + 1) + value.encode() + b"\0"


def write(path: Path, variables: dict[str, torch.Tensor], **head: Any) -> Path:
    """A file in CTranslate2's layout."""
    raw = struct.pack("<I", head.get("version", 6)) + text(head.get("layout", "WhisperSpec"))
    raw += struct.pack("<II", 3, head.get("count", len(variables)))
    for name, each in variables.items():
        data = each.contiguous().numpy().tobytes()
        raw += text(name) + struct.pack(f"<B{each.dim()}I", each.dim(), *each.shape)
        raw += struct.pack("<BI", TYPES[each.dtype], len(data)) + data
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(raw + struct.pack("<I", 0))
    return path.parent


def converted(source: Path) -> dict[str, torch.Tensor]:
    """The variables that CTranslate2's converter makes of a Whisper model."""
    given = {name.removeprefix("model."): each.half() for name, each in load_file(
        source / "model.safetensors").items() if name.startswith("model.encoder.")}
    named = {"encoder/num_heads": torch.tensor(4, dtype=torch.int16),
             "encoder/position_encodings/encodings": given["encoder.embed_positions.weight"],
             "decoder/embeddings/weight": torch.zeros(3, 3)}

    def linear(theirs_: str, ours: str) -> None:
        for kind in "weight", "bias":
            named[f"encoder/{ours}/{kind}"] = given[f"encoder.{theirs_}.{kind}"]

    def norm(theirs_: str, ours: str) -> None:
        named[f"encoder/{ours}/gamma"] = given[f"encoder.{theirs_}.weight"]
        named[f"encoder/{ours}/beta"] = given[f"encoder.{theirs_}.bias"]

    linear("conv1", "conv1")
    linear("conv2", "conv2")
    norm("layer_norm", "layer_norm")
    for layer in range(2):
        old, new = f"layers.{layer}.", f"layer_{layer}/"
        attention = f"encoder.{old}self_attn."
        q, k, v = (given[f"{attention}{part}_proj.weight"] for part in "qkv")
        bias = given[f"{attention}q_proj.bias"], given[f"{attention}v_proj.bias"]
        named[f"encoder/{new}self_attention/linear_0/weight"] = torch.cat((q, k, v))
        named[f"encoder/{new}self_attention/linear_0/bias"] = torch.cat(
            (bias[0], torch.zeros_like(bias[0]), bias[1]))
        linear(f"{old}self_attn.out_proj", f"{new}self_attention/linear_1")
        linear(f"{old}fc1", f"{new}ffn/linear_0")
        linear(f"{old}fc2", f"{new}ffn/linear_1")
        norm(f"{old}self_attn_layer_norm", f"{new}self_attention/layer_norm")
        norm(f"{old}final_layer_norm", f"{new}ffn/layer_norm")
    return named


@pytest.fixture(scope="module")
def whisper(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("whisper")
    theirs.save(directory, "whisper")
    return directory


def test_the_weights_are_those_of_transformers_files(whisper: Path, tmp_path: Path) -> None:
    source = write(tmp_path / "fast" / "model.bin", converted(whisper))
    fast = import_encoder(source, tmp_path / "fast.safetensors")
    plain = import_encoder(whisper, tmp_path / "plain.safetensors")
    assert fast.config == plain.config
    ours, wanted = fast.load().state_dict(), plain.load().state_dict()
    assert list(ours) == list(wanted)
    assert all(torch.equal(ours[name], each.half().float()) for name, each in wanted.items())


def test_what_cannot_be_read_is_refused_by_name(whisper: Path, tmp_path: Path) -> None:
    good, out = converted(whisper), tmp_path / "out.safetensors"
    weight = "encoder/layer_0/ffn/linear_0/weight"
    biased = good["encoder/layer_0/self_attention/linear_0/bias"] + 1
    lacking = {name: each for name, each in good.items() if name != weight}
    for variables, head, error, match in (
        (good, {"version": 4}, CheckpointError, "version 4"),
        (good, {"layout": "TransformerSpec"}, CheckpointError, "TransformerSpec"),
        (good, {"count": 10**6}, CheckpointError, "damaged"),
        (good, {"count": len(good) + 1}, CheckpointError, "damaged"),
        ({**good, weight: good[weight].char()}, {}, UnsupportedFeature, "int8"),
        ({**good, "encoder/layer_0/self_attention/linear_0/bias": biased}, {},
         UnsupportedFeature, "bias of its keys"),
        (lacking, {}, TensorMismatch, "lacks"),
        ({**good, "encoder/layer_1/ffn/linear_0/bias": torch.zeros(3)}, {}, TensorMismatch,
         r"\[3\]"),
        ({**good, "encoder/num_heads": torch.tensor(5, dtype=torch.int16)}, {}, CheckpointError,
         "multiple of 5"),
    ):
        source = write(tmp_path / "fast" / "model.bin", variables, **head)
        with pytest.raises(error, match=match):
            import_encoder(source, out)
    assert not out.exists()


def test_a_file_cut_off_anywhere_is_refused(whisper: Path, tmp_path: Path) -> None:
    source = write(tmp_path / "fast" / "model.bin", converted(whisper))
    whole = (source / "model.bin").read_bytes()
    for length in (0, 3, 11, 40, len(whole) // 3, len(whole) // 2, len(whole) - 5000):
        (source / "model.bin").write_bytes(whole[:length])
        with pytest.raises(CloisterError, match=r"damaged|holds"):
            import_encoder(source, tmp_path / "out.safetensors")
