"""The optimizers, and the weights that each updates."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from cloister.distill.schedule import Kind, Schedule
from cloister.model.device import multiplies_bfloat16

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch import nn

__all__ = ["Muon", "Optimizer", "orthogonal"]


class Optimizer:
    """AdamW, or Muon and AdamW as one.

    Muon reaches in 250 steps of the reference mixture a loss of 2.8 where AdamW is at 4.1 (Nano-1,
    one learning rate each of a few tried).
    """

    def __init__(
        self, model: nn.Module, schedule: Schedule, *, blocks: Sequence[str] = ("layers",)
    ) -> None:
        """`blocks` names the submodules whose matrices Muon updates; what is frozen stays so."""
        matrices = [
            parameter for name in blocks for parameter in model.get_submodule(name).parameters()
            if parameter.dim() == 2 and schedule.optimizer is Kind.MUON and parameter.requires_grad
        ]
        chosen = set(matrices)
        rest = [parameter for parameter in model.parameters()
                if parameter.requires_grad and parameter not in chosen]
        self._parts: list[torch.optim.Optimizer] = [torch.optim.AdamW(
            rest, lr=schedule.peak, betas=(0.9, 0.95), weight_decay=schedule.weight_decay)]
        if matrices:
            self._parts.append(Muon(
                matrices, rate=schedule.peak, weight_decay=schedule.weight_decay,
                autocast=schedule.autocast))
        # The optimizer state of each weight, by its name in a saved state.
        self.tensors: dict[str, torch.Tensor] = {}
        names = {parameter: name for name, parameter in model.named_parameters()}
        for part in self._parts:
            # There from the start, so that a state can be read into it.
            keys = ("momentum_buffer",) if isinstance(part, Muon) else ("exp_avg", "exp_avg_sq")
            for parameter in part.param_groups[0]["params"]:
                state = part.state[parameter]
                state.update({key: torch.zeros_like(parameter) for key in keys})
                if not isinstance(part, Muon):
                    state["step"] = torch.zeros(())
                self.tensors |= {
                    f"optimizer.{names[parameter]}.{key}": value for key, value in state.items()}

    def step(self, rate: float) -> None:
        """Update every weight, and drop its gradient."""
        for part in self._parts:
            for group in part.param_groups:
                group["lr"] = rate
            part.step()
            part.zero_grad(set_to_none=True)


class Muon(torch.optim.Optimizer):
    """Momentum whose singular values are all brought near one (arXiv 2502.16982), for matrices.

    An entry moves by about 0.2 times the rate, as with AdamW, so that one rate serves both. As
    torch.optim.Muon, which always computes in bfloat16 (torch/optim/_muon.py, 2.13): on a processor
    that has no such products a step of an 11 M decoder took 30 s there, and takes one second here.
    With `autocast`, products are in bfloat16 on a device that has them.
    """

    def __init__(
        self, matrices: Iterable[torch.Tensor], *, rate: float, weight_decay: float,
        momentum: float = 0.95, autocast: bool = True,
    ) -> None:
        super().__init__(matrices, {"lr": rate, "weight_decay": weight_decay, "momentum": momentum})
        self._autocast = autocast

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """Update every matrix that has a gradient."""
        for group in self.param_groups:
            rate, momentum = group["lr"], group["momentum"]
            shapes: dict[torch.Size, list[torch.Tensor]] = {}
            for matrix in group["params"]:
                if matrix.grad is not None:
                    shapes.setdefault(matrix.shape, []).append(matrix)
            for shape, matrices in shapes.items():  # at once: a GPU waits for each to be asked for
                made = orthogonal(torch.stack(
                    [self._direction(matrix, momentum) for matrix in matrices]))
                for matrix, direction in zip(matrices, made.to(matrices[0].dtype), strict=True):
                    matrix.mul_(1 - rate * group["weight_decay"])
                    matrix.add_(direction, alpha=-rate * 0.2 * max(shape) ** 0.5)

    def _direction(self, matrix: torch.Tensor, momentum: float) -> torch.Tensor:
        assert matrix.grad is not None
        state = self.state[matrix]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(matrix)
        average = state["momentum_buffer"].lerp_(matrix.grad, 1 - momentum)
        direction: torch.Tensor = matrix.grad.lerp(average, momentum)
        bfloat16 = self._autocast and multiplies_bfloat16(matrix.device)
        return direction.to(torch.bfloat16) if bfloat16 else direction


def orthogonal(matrices: torch.Tensor) -> torch.Tensor:
    """Return about U V^T of each matrix U S V^T, [B, N, K] -> [B, N, K].

    Five Newton-Schulz steps with the coefficients of https://kellerjordan.github.io/posts/muon/,
    which bring singular values to between 0.7 and 1.2 rather than to one.
    """
    if matrices.shape[1] > matrices.shape[2]:
        return orthogonal(matrices.mT).mT
    x: torch.Tensor = matrices / matrices.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = torch.baddbmm(
            x, torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x
