"""One process, or several under torchrun that shard the weights of a model (FSDP2)."""

from __future__ import annotations

import ctypes
import zlib
from typing import TYPE_CHECKING, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from cloister.model.blocks import Blocks
from cloister.model.checkpoint import check_finite
from cloister.model.device import device
from cloister.model.transformer import Decoder
from cloister_kernels.reference import dequantize

if TYPE_CHECKING:
    from collections.abc import Callable

    from cloister.model.checkpoint import Checkpoint

__all__ = ["Parallel", "Sharded", "read_plain"]

_T = TypeVar("_T")


def _return_freed_memory() -> None:
    """Let glibc give large blocks back to the system once they are freed.

    Otherwise it soon keeps all below 32 MB (M_MMAP_THRESHOLD in mallopt(3)), and layers that are
    gathered and dropped one after the other stay in pieces: a process in four had more than one.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(-3, 1 << 18)  # M_MMAP_THRESHOLD, bytes


class Parallel:
    """The processes of a run; without torchrun there is one."""

    def __init__(self) -> None:
        cuda = torch.cuda.is_available()
        self.rank, self.world = 0, 1
        self._mesh = None
        if dist.is_torchelastic_launched():
            if not dist.is_initialized():
                dist.init_process_group("nccl" if cuda else "gloo")
            self.rank, self.world = dist.get_rank(), dist.get_world_size()
            self._mesh = init_device_mesh("cuda" if cuda else "cpu", (self.world,))
            if not cuda:
                _return_freed_memory()
        if cuda:
            torch.cuda.set_device(self.rank % torch.cuda.device_count())
        self.device = device()

    @property
    def random_devices(self) -> list[torch.device]:
        """Devices beside the processor whose random state a run uses."""
        return [self.device] if self.device.type == "cuda" else []

    def shard(self, module: nn.Module) -> None:
        """Keep this process's shard of the weights of `module` that are not sharded yet."""
        if self._mesh is None:
            module.to(self.device)
        else:
            fully_shard(module, mesh=self._mesh)

    def sum(self, values: torch.Tensor) -> list[float]:
        """Return the sums over all processes of float32[N]."""
        values = values.detach()
        if self._mesh is not None:
            dist.all_reduce(values)
        return [float(value) for value in values]

    def wait(self) -> None:
        """Wait for every process (a barrier)."""
        if self._mesh is not None:
            dist.barrier()

    def full(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a tensor gathered whole, if it is sharded; every process has to call it."""
        return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def read_plain(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    """Read a tensor, dequantized where it is stored so; a tied head is its embedding.

    Raises:
        CheckpointError: it cannot be read.
        NonFiniteTensor: it has a NaN or infinite entry.
    """
    if name == "head.weight" and checkpoint.metadata.config.shape.tied:
        name = "embed.weight"
    schemes = checkpoint.metadata.schemes
    scheme = None if schemes is None else schemes.scheme_of(name)
    if isinstance(scheme, Blocks):
        return scheme.dequantize(checkpoint.tensor(f"{name}.blocks"))
    if scheme is not None:
        return dequantize(*(checkpoint.tensor(f"{name}.{part}") for part in ("q", "scale")))
    tensor = checkpoint.tensor(name)
    check_finite(tensor, name, checkpoint.path)
    return tensor


class Sharded(nn.Module):
    """A decoder whose weights are spread over the processes of a run, or lie in the only one.

    Use it inside a call, `model(lambda: model.decoder(tokens))`: meanwhile each layer has its
    weights whole while it needs them. Every process has to make the same calls.
    """

    def __init__(
        self, decoder: Decoder, parallel: Parallel, *, identity: str | None = None,
        fill: Callable[[str, nn.Module], None] = lambda prefix, module: None,
    ) -> None:
        """Shard `decoder`; `fill(prefix, module)` sets a module's weights just before."""
        super().__init__()
        self.identity = _fingerprint(decoder) if identity is None else identity
        self.decoder, self.parallel = decoder, parallel
        for number, layer in enumerate(decoder.layers):
            fill(f"layers.{number}.", layer)
            parallel.shard(layer)
        fill("", decoder)
        parallel.shard(self)

    @classmethod
    def load(
        cls, checkpoint: Checkpoint, parallel: Parallel, *, dtype: torch.dtype = torch.float32,
        prepare: Callable[[Decoder], Decoder] = lambda decoder: decoder,
    ) -> Sharded:
        """Read a checkpoint by `read_plain`, layer by layer; no process has more than one whole.

        `prepare` may change the modules of the decoder, which has no weights yet.
        """
        with torch.device("meta"):
            decoder = prepare(Decoder(checkpoint.metadata.config))

        def fill(prefix: str, module: nn.Module) -> None:
            for name, parameter in module.named_parameters():
                if parameter.is_meta:
                    value = read_plain(checkpoint, prefix + name).to(
                        parallel.device, dtype, copy=True)
                    torch.utils.swap_tensors(parameter, nn.Parameter(value))  # keeps ties

        return cls(decoder, parallel, identity=checkpoint.identity, fill=fill).eval()

    def forward(self, use: Callable[[], _T]) -> _T:
        """Return what `use` returns; while it runs, the weights that it needs are here."""
        return use()

    def release(self) -> None:
        """Drop the gathered embedding, head and last norm, which stay so after a call."""
        if isinstance(self, FSDPModule):
            self.reshard()


def _fingerprint(decoder: Decoder) -> str:
    """Return a checksum of a little of every weight, by which decoders are told apart."""
    some = [weight.detach().flatten()[:64].float().cpu() for weight in decoder.parameters()]
    return f"{zlib.crc32(torch.cat(some).numpy().tobytes()):08x}"
