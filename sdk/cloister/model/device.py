"""The device that eager models compute on."""

from __future__ import annotations

import torch

__all__ = ["device", "multiplies_bfloat16"]


def device() -> torch.device:
    """Return this process's CUDA device, or without one the processor."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def multiplies_bfloat16(device: torch.device) -> bool:
    """Return whether `device` has products in bfloat16; without, they take 100 times as long."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
