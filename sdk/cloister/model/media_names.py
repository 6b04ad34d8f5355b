"""The tensors of foreign encoders and projectors by our names.

One table serves all, since no two layouts give one name to different things.
"""

from __future__ import annotations

import re

__all__ = ["name_of"]

_BLOCK = (  # of a layer
    (r"self_attn\.(q|k|v)_proj", r"attn.\1"), (r"self_attn\.out_proj", "attn.o"),
    (r"(?:layer_norm1|self_attn_layer_norm)", "attn_norm"),
    (r"(?:layer_norm2|final_layer_norm)", "mlp_norm"),
    (r"(?:mlp\.)?fc1", "mlp.up"), (r"(?:mlp\.)?fc2", "mlp.down"),
)
_ENCODER = (  # beside its layers
    (r"(?:vision_model\.)?embeddings\.patch_embedding", "stem.convolution"),
    (r"(?:vision_model\.)?post_layernorm", "norm"),
    ("conv1", "stem.first"), ("conv2", "stem.second"), ("layer_norm", "norm"),
)
_PROJECTOR = (
    (r"multi_modal_projector\.mm_soft_emb_norm", "vision.projector.norm"),
    (r"connector\.modality_projection\.proj", "vision.projector.linear"),
    (r"multi_modal_projector\.linear_1", "audio.projector.up"),
    (r"multi_modal_projector\.linear_2", "audio.projector.down"),
)
_TOWERS = (
    (r"vision_(?:tower|model)\.", "vision"), (r"(?:audio_tower|encoder)\.", "audio"),
)
# Parts that an encoder's makers trained and a decoder does not read: the pooled output of SigLIP,
# and Whisper's own decoder.
_UNREAD = re.compile(
    r"(?:vision_tower|vision_model)\.(?:vision_model\.)?head\..+|decoder\..+|proj_out\..+")
_TEXT = (
    (r"(?:language_model|text_model)\.(?:model\.)?((?:embed_tokens|layers|norm)\..+)", r"model.\1"),
    (r"(?:language_model\.)?(lm_head\..+)", r"\1"),
)


def name_of(key: str) -> tuple[str, str] | None:
    """Return whose tensor `key` is, and its name there; None for one that nothing reads.

    That is `text` and the name in a decoder's own files, or `vision` or `audio` and the name in a
    sense. One that is not known is the text's, which refuses it.
    """
    key = key.removeprefix("model.")
    if _UNREAD.fullmatch(key):
        return None
    for pattern, name in _TEXT:
        if re.fullmatch(pattern, key):
            return "text", re.sub(pattern, name, key)
    if key == "multi_modal_projector.mm_input_projection_weight":
        return "vision", "projector.linear.weight"
    owner, _, kind = key.rpartition(".")
    for pattern, name in _PROJECTOR:
        if re.fullmatch(pattern, owner):
            sense, _, rest = name.partition(".")
            return sense, f"{rest}.{kind}"
    for prefix, sense in _TOWERS:
        if found := re.match(prefix, key):
            name_ = _encoder(owner[found.end():])
            if name_ is not None:
                return sense, f"encoder.{name_}" + ("" if name_ == "positions" else f".{kind}")
    return "text", key


def _encoder(owner: str) -> str | None:
    if re.fullmatch(r"(?:vision_model\.)?embeddings\.position_embedding|embed_positions", owner):
        return "positions"
    for pattern, name in _ENCODER:
        if re.fullmatch(pattern, owner):
            return name
    layer = re.fullmatch(r"(?:vision_model\.)?(?:encoder\.)?layers\.(\d+)\.(.+)", owner)
    for pattern, name in _BLOCK if layer else ():
        if layer and re.fullmatch(pattern, layer[2]):
            return f"layers.{layer[1]}.{re.sub(pattern, name, layer[2])}"
    return None
