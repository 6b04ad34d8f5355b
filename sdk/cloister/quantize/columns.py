"""The rounding of one matrix for what it reads.

What counts is not how far the weights are moved, but how far the outputs are: for an error E of the
weights the trace of E H E^T, H the second moments of the inputs. The scales are searched, the
columns rounded one by one, each error spread over those to come (GPTQ, arXiv 2210.17323), and then
scales and integers improved in turns: the scales of a row by least squares, each integer by what
the others leave (coordinate descent, as in QuantEase, arXiv 2309.01885).

Moments of the loss's gradient at the outputs as a second factor (YAQA, arXiv 2505.22988) were
tried: on SmolLM2-135M they took a third of the time and did not lower the divergence beyond
`calibrate.LARGEST`.

Shapes: N outputs, K inputs, C groups.
"""

from __future__ import annotations

import torch

from cloister_kernels.reference import LEAST_SCALE

__all__ = ["Moments", "damped", "improve", "round_columns", "search_scales"]

DAMPING = 0.01  # of the mean of the moments' diagonal, added to it
TURNS = 2  # of scales and integers; the second lowers a layer's error by 1.3 %, a third by 0.4
_FACTORS = [0.5 + 0.025 * step for step in range(29)]  # of the scale by the largest entry
_COLUMNS = 96  # rounded between two updates of all columns to come
_ROWS = 512  # whose scales are fitted at a time, for memory


class Moments:
    """The second moments of a matrix's inputs, damped, and what follows of them."""

    def __init__(self, moments_KK: torch.Tensor) -> None:
        """Take in the sums; a constant factor changes nothing."""
        self.moments_KK = damped(moments_KK, DAMPING)
        # What is read most is rounded first, while there are others to make up for it.
        self.order_K = self.moments_KK.diagonal().argsort(descending=True)
        # The upper factor of the inverse is the inverse of the upper factor, found from behind.
        behind_K = self.order_K.flip(0)
        behind_KK = self.moments_KK[behind_K[:, None], behind_K]
        upper_KK = torch.linalg.cholesky(behind_KK.double()).flip(0, 1)
        self.factor_KK = torch.linalg.solve_triangular(
            upper_KK, torch.eye(len(upper_KK)).to(upper_KK), upper=True).float()
        # What an error of one column costs after the columns behind it have made up for it.
        self.cost_K = self.factor_KK.new_empty(len(moments_KK))
        self.cost_K[self.order_K] = self.factor_KK.diagonal() ** -2


def damped(moments_KK: torch.Tensor, share: float) -> torch.Tensor:
    """Return moments with a `share` of their diagonal's mean added to it, float32[K, K]."""
    damped_KK = moments_KK.clone()
    diagonal = damped_KK.diagonal()
    diagonal += share * diagonal.mean().clamp(min=LEAST_SCALE)
    return damped_KK


def search_scales(weight_NK: torch.Tensor, cost_K: torch.Tensor, group: int) -> torch.Tensor:
    """Return the scale of least weighted square error of each group, bfloat16[N, C]."""
    groups_NCG = weight_NK.unflatten(1, (-1, group))
    cost_CG = cost_K.view(-1, group)
    largest_NC: torch.Tensor = groups_NCG.abs().amax(-1) / 7.5
    best_NC = torch.full_like(largest_NC, torch.inf)
    scale_NC = largest_NC
    for factor in _FACTORS:
        tried_NC = (largest_NC * factor).clamp(min=LEAST_SCALE).bfloat16().float()
        rounded_NCG = (groups_NCG / tried_NC[..., None]).round_().clamp_(-8, 7)
        rounded_NCG *= tried_NC[..., None]
        error_NC = (rounded_NCG.sub_(groups_NCG).square_() * cost_CG).sum(-1)
        better_NC = error_NC < best_NC
        best_NC = torch.where(better_NC, error_NC, best_NC)
        scale_NC = torch.where(better_NC, tried_NC, scale_NC)
    return scale_NC.bfloat16()


def round_columns(
    weight_NK: torch.Tensor, scale_NC: torch.Tensor, moments: Moments
) -> torch.Tensor:
    """Round column by column, each error spread over those to come; integers, float32[N, K]."""
    order, factor_KK, inputs = moments.order_K, moments.factor_KK, weight_NK.shape[1]
    left_NK = weight_NK[:, order]
    scale_KN = _spread(scale_NC, inputs).T[order]
    q_KN = torch.empty_like(scale_KN)
    for begin in range(0, inputs, _COLUMNS):
        end = min(begin + _COLUMNS, inputs)
        columns = left_NK[:, begin:end].T.contiguous()  # a column's entries side by side
        factor, errors = factor_KK[begin:end, begin:end], torch.empty_like(columns)
        for at, scale_N in enumerate(scale_KN[begin:end]):
            q_N = (columns[at] / scale_N).round_().clamp_(-8, 7)
            errors[at] = (columns[at] - q_N * scale_N) / factor[at, at]
            columns[at + 1:].addr_(factor[at, at + 1:], errors[at], alpha=-1)
            q_KN[begin + at] = q_N
        left_NK[:, end:] -= errors.T @ factor_KK[begin:end, end:]
    q_NK = torch.empty_like(left_NK)
    q_NK[:, order] = q_KN.T
    return q_NK


def improve(
    weight_NK: torch.Tensor, q_NK: torch.Tensor, scale_NC: torch.Tensor, moments: Moments
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return better integers, float32[N, K], and scales, bfloat16[N, C], for `weight_NK`."""
    wanted_NK = weight_NK @ moments.moments_KK
    for _ in range(TURNS):
        scale_NC = torch.cat([
            _fitted(*rows, moments.moments_KK) for rows in zip(
                wanted_NK.split(_ROWS), q_NK.split(_ROWS), scale_NC.split(_ROWS), strict=True)])
        q_NK = _descended(weight_NK, q_NK, scale_NC, moments.moments_KK)
    return q_NK, scale_NC


def _fitted(
    wanted_NK: torch.Tensor, q_NK: torch.Tensor, scale_NC: torch.Tensor, moments_KK: torch.Tensor
) -> torch.Tensor:
    """Return the scales of least error for the integers, each within a factor 2 of what it was.

    `wanted_NK` are the weights times the moments.
    """
    groups = scale_NC.shape[1]
    group = q_NK.shape[1] // groups
    wanted_NC = (q_NK * wanted_NK).unflatten(1, (groups, group)).sum(-1)
    products_NCC = wanted_NC.new_empty(len(q_NK), groups, groups, dtype=torch.float64)
    for c, at in enumerate(range(0, q_NK.shape[1], group)):  # symmetric
        later_NK = q_NK[:, at:at + group] @ moments_KK[at:at + group, at:] * q_NK[:, at:]
        later_NC = later_NK.unflatten(1, (-1, group)).sum(-1)
        products_NCC[:, c, c:] = products_NCC[:, c:, c] = later_NC
    diagonal = products_NCC.diagonal(dim1=1, dim2=2)
    diagonal += 1e-6 * diagonal.mean(-1, keepdim=True).clamp(min=LEAST_SCALE)
    fitted_NC = torch.linalg.solve(products_NCC, wanted_NC.double()).float()
    before_NC = scale_NC.float()
    usable_NC = (fitted_NC > before_NC / 2) & (fitted_NC < before_NC * 2)
    return torch.where(usable_NC, fitted_NC, before_NC).bfloat16()


def _descended(
    weight_NK: torch.Tensor, q_NK: torch.Tensor, scale_NC: torch.Tensor, moments_KK: torch.Tensor
) -> torch.Tensor:
    """Round each entry once more to what serves best beside all others as they are."""
    inputs = q_NK.shape[1]
    scale_KN, q_KN = _spread(scale_NC, inputs).T.contiguous(), q_NK.T.contiguous()
    gradient_KN = moments_KK @ (q_KN * scale_KN - weight_NK.T)
    for begin in range(0, inputs, _COLUMNS):
        end = min(begin + _COLUMNS, inputs)
        moments, gradient = moments_KK[begin:end, begin:end], gradient_KN[begin:end]
        moved = torch.empty_like(gradient)
        for at, scale_N in enumerate(scale_KN[begin:end]):
            q_N = q_KN[begin + at]
            better_N = (q_N - gradient[at] / (scale_N * moments[at, at])).round_().clamp_(-8, 7)
            moved[at] = (better_N - q_N) * scale_N
            gradient[at + 1:].addr_(moments[at, at + 1:], moved[at])
            q_KN[begin + at] = better_N
        gradient_KN[end:] += moments_KK[end:, begin:end] @ moved
    return q_KN.T


def _spread(scale_NC: torch.Tensor, inputs: int) -> torch.Tensor:
    """Return each input's scale, float32[N, K]."""
    return scale_NC.float().repeat_interleave(inputs // scale_NC.shape[1], 1)
