"""Weights as the operators read them: tiles of 16 rows, see `Format` in `cpu/kernels.h`.

Shapes: N rows (outputs), K inputs, S tiles, C groups of 32 inputs, J quads of 4 inputs of a group.
"""

from __future__ import annotations

from enum import IntEnum

import torch
from torch.nn import functional

__all__ = ["GROUP", "TILE", "Format", "pack", "pack_gguf", "tile_bytes"]

TILE, GROUP, SUPER = 16, 32, 256


class Format(IntEnum):
    """How a packed matrix is laid out; the numbers are those of `cpu/kernels.h`."""

    W4 = 0
    W8 = 1
    Q4_0 = 2
    Q4_1 = 3
    Q8_0 = 4
    Q4_K = 5
    Q6_K = 6


_GROUP_BYTES = {Format.W4: 288, Format.W8: 512, Format.Q4_0: 288, Format.Q4_1: 320,
                Format.Q8_0: 544}
_SUPER_BYTES = {Format.Q4_K: 148 * TILE, Format.Q6_K: 210 * TILE}


def tile_bytes(form: Format, inputs: int) -> int:
    """Return the bytes of a tile.

    Raises:
        ValueError: the format cannot hold so many inputs.
    """
    block = SUPER if form in _SUPER_BYTES else 1 if form is Format.W8 else GROUP
    if inputs < 1 or inputs % block:
        raise ValueError(f"{inputs} inputs are no multiple of {block}")
    if form in _SUPER_BYTES:
        return inputs // SUPER * _SUPER_BYTES[form]
    groups = -(-inputs // GROUP)
    return groups * _GROUP_BYTES[form] + (4 * TILE if form is Format.W8 else 0)


def pack(q_NK: torch.Tensor, scale_NC: torch.Tensor) -> tuple[Format, torch.Tensor]:
    """Return a checkpoint's matrix in tiles, uint8[S, bytes].

    With one scale a row it has 8 bits, else 4, and its groups are multiples of 32.
    """
    rows, inputs = q_NK.shape
    q_NK, scale_NC = (functional.pad(each, (0, 0, 0, -rows % TILE)) for each in (q_NK, scale_NC))
    if scale_NC.dtype is torch.float32:
        q_NK = functional.pad(q_NK, (0, -inputs % GROUP)).view(torch.uint8) ^ 128
        scales = scale_NC.view(-1, TILE).view(torch.uint8)
        return Format.W8, torch.cat((scales, _bytes(q_NK).flatten(1)), dim=1)
    scale_NC = scale_NC.repeat_interleave(inputs // GROUP // scale_NC.shape[1], dim=1)
    return Format.W4, torch.cat((
        _halves(scale_NC), _nibbles((q_NK + 8).view(torch.uint8))), dim=2).flatten(1)


def _tiles(u_NK: torch.Tensor) -> torch.Tensor:
    """Return uint8[S, C, J, TILE, 4] of uint8[N, K]."""
    return u_NK.view(-1, TILE, u_NK.shape[1] // GROUP, GROUP // 4, 4).permute(0, 2, 3, 1, 4)


def _bytes(u_NK: torch.Tensor) -> torch.Tensor:
    return _tiles(u_NK).flatten(2)


def _nibbles(u_NK: torch.Tensor) -> torch.Tensor:
    """Return two quads a byte, uint8[S, C, 256]."""
    quads = _tiles(u_NK)
    return (quads[:, :, ::2] | quads[:, :, 1::2] << 4).flatten(2)


def _halves(scale_NC: torch.Tensor) -> torch.Tensor:
    """Return the bytes of 16-bit scales, uint8[S, C, 32]."""
    return scale_NC.view(-1, TILE, scale_NC.shape[1]).transpose(1, 2).contiguous().view(torch.uint8)


def pack_gguf(form: Format, blocks_NB: torch.Tensor, inputs: int) -> torch.Tensor:
    """Return a matrix of a GGUF file in tiles, its own integers and scales: uint8[S, bytes].

    `blocks_NB` are the file's rows of blocks, uint8[N, bytes].
    """
    rows = blocks_NB.shape[0]
    padded = functional.pad(blocks_NB, (0, 0, 0, -rows % TILE))
    blocks = padded.view(padded.shape[0], inputs // (SUPER if form in _SUPER_BYTES else GROUP), -1)
    return _GGUF[form](blocks).flatten(1)


def _rows(integers: torch.Tensor) -> torch.Tensor:
    """Return uint8[N, K] of uint8[N, blocks, inputs of one]."""
    return integers.flatten(1)


def _scales(blocks: torch.Tensor, first: int) -> torch.Tensor:
    """Return a float16 of each block with those of the tile's rows side by side."""
    return _halves(blocks[..., first:first + 2].contiguous().view(torch.int16).squeeze(-1))


def _split(packed: torch.Tensor) -> torch.Tensor:
    """Return nibbles, the low ones first."""
    return torch.cat((packed & 15, packed >> 4), dim=-1)


def _q4_0(blocks: torch.Tensor) -> torch.Tensor:
    return torch.cat((_scales(blocks, 0), _nibbles(_rows(_split(blocks[..., 2:])))), dim=2)


def _q4_1(blocks: torch.Tensor) -> torch.Tensor:
    minima = blocks[..., 2:4].contiguous().view(torch.int16).squeeze(-1) ^ -0x8000
    return torch.cat((
        _scales(blocks, 0), _halves(minima), _nibbles(_rows(_split(blocks[..., 4:])))), dim=2)


def _q8_0(blocks: torch.Tensor) -> torch.Tensor:
    return torch.cat((_scales(blocks, 0), _bytes(_rows(blocks[..., 2:] ^ 128))), dim=2)


def _q4_k(blocks: torch.Tensor) -> torch.Tensor:
    packed = blocks[..., 4:16]  # 6 bits each of 8 scales and 8 minima
    first, second, rest = packed[..., :4], packed[..., 4:8], packed[..., 8:]
    scales = torch.cat((first & 63, rest & 15 | first >> 6 << 4), dim=-1)
    minima = torch.cat((second & 63, rest >> 4 | second >> 6 << 4), dim=-1)
    nibbles = _split(blocks[..., 16:].unflatten(-1, (4, 32)))
    groups = torch.cat((_each(scales), _each(minima), _nibbles(_rows(nibbles.flatten(2)))), dim=2)
    return torch.cat((
        _scales(blocks, 0), _scales(blocks, 2), groups.unflatten(1, (-1, 8)).flatten(2)), dim=2)


def _each(values: torch.Tensor) -> torch.Tensor:
    """Return a byte of each group with those of the tile's rows side by side."""
    return values.flatten(1).view(-1, TILE, values.flatten(1).shape[1]).transpose(1, 2)


def _q6_k(blocks: torch.Tensor) -> torch.Tensor:
    low = blocks[..., :128].unflatten(-1, (2, 64))
    high = blocks[..., 128:192].unflatten(-1, (2, 32))
    scales = blocks[..., 192:208]
    # Of each 128 inputs: low nibbles of 64, high ones of the other 64; pairs of bits of 32 each.
    nibbles = torch.cat((low & 15, low >> 4), dim=-1)
    pairs = torch.cat([high >> 2 * part & 3 for part in range(4)], dim=-1)
    quads_of = [_tiles(_rows(each.flatten(2))).unflatten(2, (2, 4)) for each in (nibbles, pairs)]
    fours, twos = quads_of  # [S, C, 2, 4, TILE, 4]
    nibble = (fours[:, :, :, ::2] | fours[:, :, :, 1::2] << 4).flatten(3)
    pair = (twos[:, :, :, 0] | twos[:, :, :, 1] << 2 | twos[:, :, :, 2] << 4
            | twos[:, :, :, 3] << 6).flatten(3)
    halves = _each(scales).unflatten(1, (-1, 2)).flatten(2)
    groups = torch.cat((halves, torch.cat((nibble, pair), dim=-1).flatten(2)), dim=2)
    return torch.cat((
        _scales(blocks, 208), groups.unflatten(1, (-1, 8)).flatten(2)), dim=2)


_GGUF = {Format.Q4_0: _q4_0, Format.Q4_1: _q4_1, Format.Q8_0: _q8_0, Format.Q4_K: _q4_k,
         Format.Q6_K: _q6_k}
