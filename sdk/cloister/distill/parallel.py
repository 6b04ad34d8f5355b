"""One process, or several under torchrun that share a model (FSDP2)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, distribute_tensor

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from torch import nn

    from cloister.distill.optimizer import Optimizer

__all__ = ["Parallel", "multiplies_bfloat16"]


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether `device` has products in bfloat16; a processor without is 100 times slower in it."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


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
        if cuda:
            torch.cuda.set_device(self.rank % torch.cuda.device_count())
        self.device = torch.device("cuda", torch.cuda.current_device()) if cuda else (
            torch.device("cpu"))

    @property
    def random_devices(self) -> list[torch.device]:
        """Devices whose random state a run uses, the processor's apart."""
        return [self.device] if self.device.type == "cuda" else []

    def shard(self, module: nn.Module, layers: Iterable[nn.Module]) -> None:
        """Move `module` to this process's device, and spread it over all processes."""
        module.to(self.device)
        if self._mesh is not None:
            from torch.distributed.fsdp import fully_shard

            for layer in layers:
                fully_shard(layer, mesh=self._mesh)
            fully_shard(module, mesh=self._mesh)

    def sum(self, values: torch.Tensor) -> list[float]:
        """Sums over all processes of float32[N]."""
        values = values.detach()
        if self._mesh is not None:
            dist.all_reduce(values)
        return [float(value) for value in values]

    def wait(self) -> None:
        """Until every process is here."""
        if self._mesh is not None:
            dist.barrier()

    def full(self, tensor: torch.Tensor) -> torch.Tensor:
        """The whole of a tensor that may be spread over processes."""
        return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

    def gather(self, module: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
        """Weights, and the optimizer's state by the weights' names, on the processor.

        They do not depend on the number of processes.
        """
        named = dict(module.named_parameters())
        return {
            "weights": {name: self.full(value.detach()).cpu() for name, value in named.items()},
            "optimizer": {
                name: {key: self.full(held).cpu() for key, held in optimizer.state(value).items()}
                for name, value in named.items()
            },
        }

    def scatter(
        self, held: Mapping[str, Any], module: nn.Module, optimizer: Optimizer
    ) -> None:
        """Put back what `gather` gave."""
        for name, parameter in module.named_parameters():
            with torch.no_grad():
                parameter.copy_(_like(held["weights"][name], parameter))
            optimizer.state(parameter).update({
                key: _like(value, parameter) if value.dim() else value
                for key, value in held["optimizer"][name].items()
            })


def _like(value: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    if isinstance(parameter, DTensor):
        return distribute_tensor(
            value.to(parameter.device), parameter.device_mesh, parameter.placements)
    return value.to(parameter.device)
