"""Rotations folded into the weights, after which a model computes the same and rounds better.

An orthogonal matrix between two layers spreads what stands out in a few channels over all of them,
and 8 bits a row then lose less (QuaRot, arXiv 2404.00456; SpinQuant, arXiv 2405.16406). The hidden
state is rotated as a whole, the values of each head by themselves; the gains of the norms move into
the weights behind them first. Nothing is left to do when the model runs.

Shapes: D hidden size, K head size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from cloister.errors import QuantizationError

if TYPE_CHECKING:
    from collections.abc import Callable

    from cloister.model.config import ModelConfig

__all__ = ["Rotation", "can_rotate", "orthogonal"]

_NORMS = {"attn.qkv": "attn_norm", "mlp.gate": "mlp_norm", "mlp.up": "mlp_norm"}


def can_rotate(config: ModelConfig) -> bool:
    """Whether a rotation of the hidden state can be folded into the weights of `config`.

    Norms after attention and feed-forward (Gemma) scale channels where it would have to pass.
    """
    return not config.post_norms


def orthogonal(size: int, rng: torch.Generator) -> torch.Tensor:
    """Return a random orthogonal matrix, float64[size, size].

    A Hadamard matrix of the largest power of two that divides `size`, beside a random rotation of
    the rest, its rows of random sign.
    """
    power = size & -size
    hadamard = torch.ones(1, 1, dtype=torch.float64)
    while len(hadamard) < power:
        hadamard = torch.cat((
            torch.cat((hadamard, hadamard), 1), torch.cat((hadamard, -hadamard), 1)))
    rest = torch.linalg.qr(
        torch.randn(size // power, size // power, generator=rng, dtype=torch.float64)).Q
    signs = torch.randint(0, 2, (size,), generator=rng) * 2.0 - 1
    return torch.kron(rest.contiguous(), hadamard / power**0.5) * signs.double()


class Rotation:
    """A rotated model's tensors, each made when it is read.

    Raises:
        QuantizationError: the layout cannot be rotated; see `can_rotate`.
    """

    def __init__(
        self, config: ModelConfig, read: Callable[[str], torch.Tensor], *, seed: int = 0,
        device: torch.device | None = None,
    ) -> None:
        """Rotate what `read` gives by name, an untied float32 model on `device`."""
        if not can_rotate(config):
            raise QuantizationError("A model with norms behind its layers cannot be rotated.")
        shape, rng = config.shape, torch.Generator().manual_seed(seed)
        self._config, self._read = config, read
        self._hidden_DD = orthogonal(shape.hidden_size, rng).to(device)
        self._heads_KK = [orthogonal(shape.head_size, rng).to(device) for _ in range(shape.layers)]

    def __call__(self, name: str) -> torch.Tensor:
        """Return the rotated tensor called `name`, float32."""
        if name.endswith("norm.weight") and not name.endswith(("q_norm.weight", "k_norm.weight")):
            size = self._config.shape.hidden_size
            return self._hidden_DD.new_full(
                (size,), 1.0 - self._config.norm_offset, dtype=torch.float32)
        value = self._read(name).float().double()
        owner, _, kind = name.rpartition(".")
        if owner == "embed":
            return (value @ self._hidden_DD).float()
        if owner == "head":
            return self._behind_norm(value, "norm.weight").float()
        _, number, part = owner.split(".", 2)
        gained = next((norm for begin, norm in _NORMS.items() if part.startswith(begin)), None)
        if gained is not None and kind == "weight":
            value = self._behind_norm(value, f"layers.{number}.{gained}.weight")
        if part == "attn.qkv.v":
            heads = value.unflatten(0, (-1, self._config.shape.head_size))
            turned = torch.einsum("gk...,kj->gj...", heads, self._heads_KK[int(number)])
            value = turned.flatten(0, 1)
        if part == "attn.o" and kind == "weight":
            heads = value.unflatten(1, (-1, self._config.shape.head_size))
            value = (heads @ self._heads_KK[int(number)]).flatten(1)
        if part in ("attn.o", "mlp.down"):  # a bias is added to the hidden state, too
            value = self._hidden_DD.T @ value
        return value.float()

    def _behind_norm(self, value: torch.Tensor, norm: str) -> torch.Tensor:
        gain = self._read(norm).float().double() + float(self._config.norm_offset)
        return (value * gain) @ self._hidden_DD
