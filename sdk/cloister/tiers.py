"""The ladder Ultra, Pro, Nano-2, Nano-1, at two scales.

Google published the sizes of the two Nano tiers only: 1.8 B and 3.25 B parameters, "made by
distilling larger models and quantized to 4 bits" (Gemini: A Family of Highly Capable Multimodal
Models, arXiv 2312.11805, section 2). The full-size shapes of Pro and Ultra are ours: about
7 B and 30 B, the sizes at which open decoders are common. The reference shapes are the same
ladder at 1:1000 for the Nano tiers, small enough to train and run anywhere.

Standard library only.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from cloister.backend import KV
from cloister.errors import SettingError

__all__ = ["DEVICES", "Ladder", "Scale", "Shape", "Tier", "ladder"]

_GIB = 2**30
DEVICES = {
    "phone 4 GB": 2 * _GIB, "phone 6 GB": 3 * _GIB, "phone 8 GB": 4 * _GIB, "phone 12 GB": 6 * _GIB,
    "laptop 16 GB": 12 * _GIB, "desktop 64 GB": 56 * _GIB,
}
"""What a foreground app may take on a common device: about half of a phone's memory."""


class Tier(StrEnum):
    """A rung of the ladder, most capable first."""

    ULTRA = "ultra"
    PRO = "pro"
    NANO_2 = "nano-2"
    NANO_1 = "nano-1"

    @property
    def four_bit(self) -> bool:
        """Whether the tier ships in 4 bits; the larger two ship in 8."""
        return self in (Tier.NANO_1, Tier.NANO_2)


class Scale(StrEnum):
    """The two sizes of the ladder."""

    REFERENCE = "reference"
    FULL = "full"


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Dimensions of a decoder with gated feed-forward layers and grouped-query attention.

    Raises:
        SettingError: a dimension is not positive, or `heads` is no multiple of `kv_heads`.
    """

    vocab_size: int
    hidden_size: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    feed_forward: int
    context: int  # tokens
    tied: bool  # embedding and head share one matrix before quantization

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden_size", "layers", "heads", "kv_heads", "head_size",
                     "feed_forward", "context"):
            if getattr(self, name) < 1:
                raise SettingError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        if self.heads % self.kv_heads:
            raise SettingError(
                f"{self.heads} query heads cannot share {self.kv_heads} KV heads evenly; "
                "make heads a multiple of kv_heads."
            )
        if self.head_size % 2:
            raise SettingError(
                f"head_size is {self.head_size}; rotary embeddings need an even number."
            )

    @property
    def body_parameters(self) -> int:
        """Parameters of the linear layers between embedding and head."""
        q = self.heads * self.head_size
        kv = self.kv_heads * self.head_size
        attention = self.hidden_size * (2 * q + 2 * kv)
        return self.layers * (attention + 3 * self.hidden_size * self.feed_forward)

    @property
    def norm_parameters(self) -> int:
        """Parameters of the norms."""
        return (2 * self.layers + 1) * self.hidden_size

    @property
    def embedding_parameters(self) -> int:
        """Parameters of the embedding, and of the head where it has its own."""
        return self.vocab_size * self.hidden_size

    @property
    def parameters(self) -> int:
        """All parameters, a shared matrix counted once."""
        matrices = 1 if self.tied else 2
        return self.body_parameters + self.norm_parameters + matrices * self.embedding_parameters

    def weight_bytes(self, *, body_bits: float = 4.5, head_bits: float = 8.0,
                     embedding_bits: float = 8.0) -> int:
        """Return the bytes of the quantized weights, group scales included in `body_bits`.

        The default is recipe `8da4w-g32`: 4 bits and a 16-bit scale for each group of 32.
        Quantizing unties embedding and head, so both count. Norms, and one 32-bit scale a row of
        head and embedding, stay in 32 bits.
        """
        bits = (
            self.body_parameters * body_bits
            + self.embedding_parameters * (head_bits + embedding_bits)
            + (self.norm_parameters + 2 * self.vocab_size) * 32
        )
        return int(bits) // 8

    def kv_bytes_per_token(self, kv: KV = KV.FLOAT32) -> int:
        """Return the bytes that one position adds to the KV cache."""
        return 2 * self.layers * self.kv_heads * kv.head_bytes(self.head_size)


@dataclass(frozen=True, kw_only=True)
class Ladder:
    """The four tiers at one scale."""

    scale: Scale
    shapes: dict[Tier, Shape]

    def __getitem__(self, tier: Tier | str) -> Shape:
        """Return the shape of `tier`.

        Raises:
            SettingError: no tier of that name.
        """
        try:
            return self.shapes[Tier(tier)]
        except ValueError:
            names = ", ".join(Tier)
            raise SettingError(f"No tier is named {str(tier)!r}; choose one of {names}.") from None


_FULL = Ladder(scale=Scale.FULL, shapes={
    Tier.ULTRA: Shape(vocab_size=32000, hidden_size=6144, layers=64, heads=48, kv_heads=8,
                      head_size=128, feed_forward=20480, context=8192, tied=False),
    Tier.PRO: Shape(vocab_size=32000, hidden_size=4096, layers=36, heads=32, kv_heads=8,
                    head_size=128, feed_forward=12288, context=4096, tied=False),
    Tier.NANO_2: Shape(vocab_size=32000, hidden_size=2560, layers=32, heads=20, kv_heads=4,
                       head_size=128, feed_forward=10496, context=2048, tied=False),
    Tier.NANO_1: Shape(vocab_size=32000, hidden_size=2048, layers=28, heads=16, kv_heads=2,
                       head_size=128, feed_forward=8192, context=2048, tied=False),
})

# Every width of Nano-1 and Pro is a multiple of 128, of Nano-2 a multiple of 64, so that each
# group size of the recipes can be tried on them.
_REFERENCE = Ladder(scale=Scale.REFERENCE, shapes={
    Tier.ULTRA: Shape(vocab_size=4096, hidden_size=320, layers=6, heads=10, kv_heads=5,
                      head_size=32, feed_forward=896, context=1024, tied=True),
    Tier.PRO: Shape(vocab_size=4096, hidden_size=256, layers=6, heads=8, kv_heads=4,
                    head_size=32, feed_forward=640, context=1024, tied=True),
    Tier.NANO_2: Shape(vocab_size=4096, hidden_size=192, layers=6, heads=8, kv_heads=4,
                       head_size=32, feed_forward=448, context=1024, tied=True),
    Tier.NANO_1: Shape(vocab_size=4096, hidden_size=128, layers=6, heads=4, kv_heads=4,
                       head_size=32, feed_forward=384, context=1024, tied=True),
})


def ladder(scale: Scale | str = Scale.REFERENCE) -> Ladder:
    """Return the ladder at `scale`.

    Raises:
        SettingError: no scale of that name.
    """
    try:
        return _FULL if Scale(scale) is Scale.FULL else _REFERENCE
    except ValueError:
        names = ", ".join(Scale)
        raise SettingError(f"No scale is named {str(scale)!r}; choose one of {names}.") from None
