"""Momentum is orthogonalised, in the numbers that were asked for."""

from __future__ import annotations

import pytest
import torch

from cloister.distill import optimizer
from cloister.distill.optimizer import Muon, orthogonal


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
def test_singular_values_come_near_one(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonal(matrix.unsqueeze(0))[0])
    assert values.min() > 0.5
    assert values.max() < 1.3


@pytest.mark.parametrize(("autocast", "dtype"), [(False, torch.float32), (True, torch.bfloat16)])
def test_products_are_in_bfloat16_only_where_they_may_be(
    autocast: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    monkeypatch.setattr(optimizer, "multiplies_bfloat16", lambda _: True)
    monkeypatch.setattr(
        optimizer, "orthogonal", lambda matrix: seen.append(matrix.dtype) or matrix)
    weight = torch.nn.Parameter(torch.ones(4, 6))
    weight.grad = torch.ones(4, 6)
    Muon([weight], rate=0.1, weight_decay=0.0, autocast=autocast).step()
    assert seen == [dtype]
    assert weight.dtype == torch.float32
    assert not torch.equal(weight, torch.ones(4, 6))
