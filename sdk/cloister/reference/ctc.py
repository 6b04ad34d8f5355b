"""An encoder with two readings on top: of letters, and of the tokens that a tier reads.

Letters are connectionist temporal classification (Graves et al., ICML 2006), and serve to train
the encoder and to measure it. So are tokens, or they are spelled of the letters. They become a
tier's projector (`token_sense`).

    FOLDER/audio.safetensors, or vision.safetensors    the encoder, a sense without a projector
    FOLDER/heads.safetensors                           both readings

Shapes: B batch, N samples, C channels, R rows, W columns, P positions, S symbols, V tokens.
"""

from __future__ import annotations

import hashlib
from contextlib import nullcontext
from dataclasses import replace
from itertools import groupby
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from safetensors.torch import save
from torch import nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from cloister.errors import SettingError, TrainingError
from cloister.files import whole_file
from cloister.model import sense_file
from cloister.model.device import multiplies_bfloat16
from cloister.model.projector import ProjectorKind, ProjectorShape, TokenProjector
from cloister.model.sense import Sense, SenseConfig
from cloister.model.sense_file import SenseKind
from cloister.model.spelling import Spelling
from cloister.model.tensor_file import opened

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

__all__ = ["CtcModel", "decode", "identity", "load", "token_sense", "write"]

_HEADS = "heads.safetensors"


class CtcModel(nn.Module):
    """A sense without a projector, a layer of the symbols of `alphabet`, and tokens.

    Tokens are a layer of their own, or with the bytes of each in `pieces` what the symbols spell.
    Of symbols the blank is number 0, of tokens it is the last.
    """

    def __init__(
        self, config: SenseConfig, alphabet: str, vocabulary: int, seed: int = 0, *,
        pieces: Sequence[bytes] = ()
    ) -> None:
        super().__init__()
        size = config.encoder.hidden_size
        self.alphabet, self.vocabulary, self.spelled = alphabet, vocabulary, bool(pieces)
        self.sense = Sense(config)
        self.sense.encoder.initialize(seed)
        self._numbers = {symbol: number for number, symbol in enumerate(alphabet, 1)}
        rng = torch.Generator().manual_seed(seed)
        if self.spelled:
            self.spelling = Spelling(alphabet, size, vocabulary)
            self.spelling.initialize(rng, pieces)
            return
        self.symbols = nn.Linear(size, 1 + len(alphabet))
        self.norm, self.tokens = nn.LayerNorm(size), nn.Linear(size, vocabulary + 1)
        with torch.no_grad():
            for head in (self.symbols, self.tokens):
                head.weight.normal_(std=0.02, generator=rng)
                head.bias.zero_()

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.sense.encoder.positions.device

    @property
    def blocks(self) -> tuple[str, ...]:
        """The submodules of layers."""
        return ("sense.encoder.layers", *(("spelling.layers",) if self.spelled else ()))

    def freeze(self, layers: int) -> None:
        """Train neither what comes before the encoder's first `layers` layers nor these.

        Raises:
            SettingError: the encoder has not more layers than that.
        """
        encoder = self.sense.encoder
        if not 1 <= layers < len(encoder.layers):
            raise SettingError(
                f"{layers} layers cannot be frozen; from 1 to {len(encoder.layers) - 1} can.")
        encoder.positions.requires_grad_(False)
        for part in (encoder.stem, *encoder.layers[:layers]):
            part.requires_grad_(False)

    def features(self, x: torch.Tensor) -> torch.Tensor:
        """Return what the encoder reads, float32[B, C, R, W]; nothing in it is trained.

        `x` is recordings float32[B, N], or grey pictures uint8[B, R, W]. The mel spectrum keeps
        what is 80 dB below the loudest, which TF32 does not.
        """
        x = x.unsqueeze(1)
        if self.sense.config.pixels is not None:
            x = x.expand(-1, 3, -1, -1)
        with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            return self.sense.read(x)

    def encode(self, x_BCRW: torch.Tensor) -> torch.Tensor:
        """Return the encoder's vectors, float32[B, P, D].

        Products are in bfloat16 where the device has them. On processors, attention is computed
        without fused kernels: the backward pass of torch's (2.13) takes half of a step.
        """
        plain = sdpa_kernel(SDPBackend.MATH) if x_BCRW.device.type == "cpu" else nullcontext()
        with self._fast(), plain:
            out_BPD: torch.Tensor = self.sense.encoder(x_BCRW)
        return out_BPD.float()

    def letters(self, x_BPD: torch.Tensor) -> torch.Tensor:
        """Return the log-probabilities of symbols, float32[B, P, S]."""
        layer = self.spelling.symbols if self.spelled else self.symbols
        out_BPS: torch.Tensor = layer(x_BPD).log_softmax(-1)
        return out_BPS

    def loss(
        self, x_BCRW: torch.Tensor, texts: Sequence[str], tokens: Sequence[Sequence[int]],
        spelled: Sequence[bytes] = (),
    ) -> torch.Tensor:
        """Return nats of the texts, a symbol, and of the tokens.

        Those are the tokens that the texts are written in, a symbol, or with a spelling whether
        one ends at each byte of `spelled`, a byte.

        Raises:
            TrainingError: the model spells and nothing is spelled, or the other way round.
        """
        if bool(spelled) != self.spelled:
            raise TrainingError(
                "An encoder of lines spells tokens and one of sound does not; begin from one of "
                "the same kind, or anew.")
        x_BPD = self.encode(x_BCRW)
        symbols = [[self._numbers[symbol] for symbol in text] for text in texts]
        size = max(1, sum(map(len, texts)))
        nats = _nats(self.letters(x_BPD), symbols, 0) / size
        if self.spelled:
            return nats + self._spelling_nats(spelled, tokens)
        log_p_BPV = self.tokens(self.norm(x_BPD)).log_softmax(-1)
        return nats + _nats(log_p_BPV, tokens, self.vocabulary) / size

    def read(self, x: torch.Tensor) -> list[str]:
        """Return what stands in grey pictures, or is heard in recordings of one length."""
        with torch.inference_mode():
            log_p_BPS = self.letters(self.encode(self.features(x.to(self.device))))
            return [decode(log_p_PS, self.alphabet) for log_p_PS in log_p_BPS]

    def _fast(self) -> torch.autocast:
        return torch.autocast(
            self.device.type, torch.bfloat16, enabled=multiplies_bfloat16(self.device))

    def _spelling_nats(
        self, spelled: Sequence[bytes], tokens: Sequence[Sequence[int]]
    ) -> torch.Tensor:
        rows_BK = nn.utils.rnn.pad_sequence(
            [torch.tensor(list(each)) for each in spelled], batch_first=True, padding_value=-1
        ).to(self.device)
        there_BK = rows_BK >= 0
        letters_BKD = self.spelling.letters(rows_BK.clamp(min=0)) * there_BK.unsqueeze(-1)
        with self._fast():
            ends_BK1 = self.spelling.hidden(letters_BKD)
        targets = torch.tensor(
            [float(end) for each in tokens for end in each], device=self.device)
        return functional.binary_cross_entropy_with_logits(
            ends_BK1.float().squeeze(-1)[there_BK], targets)


def _nats(
    log_p_BPS: torch.Tensor, coded: Sequence[Sequence[int]], blank: int
) -> torch.Tensor:
    device = log_p_BPS.device
    lengths = torch.tensor([len(each) for each in coded])
    targets = torch.tensor([symbol for each in coded for symbol in each], device=device)
    positions = torch.full_like(lengths, log_p_BPS.shape[1])
    return functional.ctc_loss(
        log_p_BPS.transpose(0, 1), targets, positions, lengths, blank=blank, reduction="sum",
        zero_infinity=True)


def decode(log_p_PS: torch.Tensor, alphabet: str) -> str:
    """Return the text of the best symbol at each position, without spaces around it or doubled."""
    best = [symbol for symbol, _ in groupby(log_p_PS.argmax(-1).tolist())]
    return " ".join("".join(alphabet[symbol - 1] for symbol in best if symbol).split())


def token_sense(model: CtcModel, size: int) -> Sense:
    """Return the sense of a decoder of hidden size `size`, its correction still 0."""
    config = replace(model.sense.config, projector=ProjectorShape(
        kind=ProjectorKind.TOKENS, size=size, vocabulary=model.vocabulary,
        alphabet=model.alphabet if model.spelled else ""))
    sense = Sense(config)
    sense.encoder.load_state_dict(model.sense.encoder.state_dict())
    assert isinstance(sense.projector, TokenProjector)
    if model.spelled:
        sense.projector.spelling.load_state_dict(model.spelling.state_dict())
    else:
        sense.projector.norm.load_state_dict(model.norm.state_dict())
        sense.projector.head.load_state_dict(model.tokens.state_dict())
    return sense.eval()


def write(model: CtcModel, folder: Path, dtype: torch.dtype = torch.float32) -> None:
    """Write the encoder and the two readings, in `dtype`.

    Raises:
        NotEnoughDisk, OutputUnwritable: see `cloister.files.disk_errors`.
    """
    kind = SenseKind.AUDIO if model.sense.config.pixels is None else SenseKind.VISION
    config = model.sense.config
    sense_file.write(folder / kind.file, config, (
        (name, value.to("cpu", dtype)) for name, value in model.sense.state_dict().items()
    ), sense_file.plan(config, dtype))
    heads = {name: value.to("cpu", dtype) for name, value in model.state_dict().items()
             if not name.startswith("sense.")}
    with whole_file(folder / _HEADS) as file:
        file.write(save(heads, {"alphabet": model.alphabet}))


def load(folder: Path) -> CtcModel:
    """Read what `write` wrote; it is the same model.

    Raises:
        CheckpointError: the encoder cannot be read.
        TrainingError: the two readings cannot be read, or there is no encoder.
    """
    sense = sense_file.SenseFile.open(_encoder(folder)).load()
    try:
        with opened(folder / _HEADS) as file:
            alphabet = (file.metadata() or {})["alphabet"]
            heads = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
        if "tokens.bias" in heads:
            model = CtcModel(sense.config, alphabet, len(heads["tokens.bias"]) - 1)
        else:
            vocabulary = heads["spelling.pieces_JV"].shape[1]
            model = CtcModel(sense.config, alphabet, vocabulary, pieces=[b""] * vocabulary)
        model.sense = sense
        model.load_state_dict(heads | model.sense.state_dict(prefix="sense."))
    except (OSError, SafetensorError, RuntimeError, KeyError):
        raise TrainingError(
            f"{_HEADS} of {folder.name} cannot be read; train the encoder again.") from None
    return model.eval()


def identity(folder: Path) -> str:
    """Return the sha256 of the encoder that `write` wrote, in hex.

    Raises:
        TrainingError: there is none.
    """
    return hashlib.sha256(_encoder(folder).read_bytes()).hexdigest()


def _encoder(folder: Path) -> Path:
    paths = [path for kind in SenseKind if (path := folder / kind.file).exists()]
    if len(paths) != 1:
        raise TrainingError(f"{folder.name} holds no encoder that was trained; train it first.")
    return paths[0]
