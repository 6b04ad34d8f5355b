"""The operators within a program of ExecuTorch: what they compute, and what they refuse."""

from __future__ import annotations

import ctypes
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from executorch import exir
from executorch.exir.passes import MemoryPlanningPass
from executorch.extension.pybindings import _portable_lib
from torch.export import Dim, export
from torch.nn import Module

from cloister.runtime.program import Operators, own_operators
from cloister_kernels import ops, pack, reference

HEADS, KV_HEADS, SIZE, CONTEXT, WIDTH = 4, 2, 16, 12, 64
Call = Callable[..., list[torch.Tensor]]


class Net(Module):
    """Embedding, queries and keys, attention, a layer behind a norm; wrong where told to be."""

    cut: int = 0  # bytes that the first matrix lacks
    start = 0  # added to where a call begins
    form = 0

    def __init__(self, cache: torch.dtype = torch.float16) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(1)
        width = (HEADS + 2 * KV_HEADS) * SIZE

        def drawn(rows: int, inputs: int) -> tuple[torch.Tensor, torch.Tensor]:
            q = torch.randint(-8, 8, (rows, inputs), dtype=torch.int8, generator=random)
            return q, torch.full((rows, inputs // 32), 0.05).bfloat16()

        self.drawn = [drawn(40, WIDTH), drawn(width, WIDTH), drawn(WIDTH, HEADS * SIZE)]
        for name, each in zip("eqo", self.drawn, strict=True):
            self.register_buffer(name, pack.pack(*each)[1])
        self.register_buffer("norm", torch.rand(HEADS * SIZE, generator=random))
        size = (1, CONTEXT, KV_HEADS, SIZE + (4 if cache is torch.int8 else 0))
        self.register_buffer("k_cache", torch.zeros(size, dtype=cache))
        self.register_buffer("v_cache", torch.zeros(size, dtype=cache))

    def forward(self, tokens: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        start: Any = at[0].item()
        torch._check(start >= 0)
        torch._check(start + tokens.shape[1] <= CONTEXT)
        run: Any = torch.ops.cloister
        weights = self.q[:, :self.q.shape[1] - self.cut]
        x = run.embedding(tokens, self.e, 0, 40, WIDTH)
        qkv = run.linear(
            x, weights, self.form, self.drawn[1][0].shape[0], 0, None, 0.0, None, None, False)
        out = run.attention(
            qkv, self.k_cache, self.v_cache, start + self.start, None, None, None, None,
            HEADS, 0.0, SIZE ** -0.5, 0.0, 0)
        out = run.linear(
            out, self.o, 0, WIDTH, ops.Input.NORMED, self.norm, 1e-5, None, x, False)
        return run.norm(out, self.norm, 1e-5, out)  # type: ignore[no-any-return]

    def expected(self, tokens: torch.Tensor) -> torch.Tensor:
        e, q, o = (reference.dequantize(*each) for each in self.drawn)
        x = e[tokens[0]]
        qkv = (reference.round_groups(x) @ q.T).view(len(x), -1, SIZE)
        parts = qkv.split((HEADS, KV_HEADS, KV_HEADS), dim=1)
        out = reference.attention(*parts, 0, scale=SIZE ** -0.5).flatten(1)
        size = (HEADS * SIZE,)
        normed = torch.nn.functional.rms_norm(out, size, self.norm, 1e-5)
        out = reference.round_groups(normed) @ o.T + x
        return torch.nn.functional.rms_norm(out, size, self.norm, 1e-5) + out


@pytest.fixture(scope="module", autouse=True)
def loaded(tmp_path_factory: pytest.TempPathFactory) -> None:
    found = own_operators()
    assert isinstance(found, Operators)
    ctypes.CDLL(shutil.copy(found.path, tmp_path_factory.mktemp("copy")))  # those loaded stay


def program(net: Net, path: Path) -> Call:
    traced = export(
        net, (torch.zeros(1, 2, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)),
        dynamic_shapes=({1: Dim("T", min=1, max=CONTEXT)}, None), strict=False)
    edge = exir.to_edge(traced, compile_config=exir.EdgeCompileConfig(_check_ir_validity=False))
    manager = edge.to_executorch(exir.ExecutorchBackendConfig(
        memory_planning_pass=MemoryPlanningPass(alloc_graph_input=False)))
    path.write_bytes(manager.buffer)
    held = _portable_lib._load_program(str(path))
    method = held.load_method("forward")
    return lambda tokens, start: (held, method([tokens, torch.tensor([start])]))[1]


@pytest.mark.parametrize(("cache", "bound"), [
    (torch.float32, 1e-5), (torch.float16, 2e-3), (torch.int8, 0.05)])
def test_a_program_of_them_computes_what_they_mean(
    tmp_path: Path, cache: torch.dtype, bound: float
) -> None:
    net = Net(cache)
    run = program(net, tmp_path / "p.pte")
    tokens = torch.tensor([[3, 39, 0, 17, 5, 5, 21]])
    expected = net.expected(tokens)
    whole = run(tokens, 0)[0][0].clone()
    steps = torch.stack([run(tokens[:, at:at + 1], at)[0][0, 0].clone() for at in range(7)])
    for got in (whole, steps):
        assert float((got - expected).norm() / expected.norm()) < bound


@pytest.mark.parametrize(("change", "tokens", "start"), [
    ({"cut": 1}, [1], 0), ({"cut": 288}, [1], 0), ({"form": 1}, [1], 0), ({"form": 7}, [1], 0),
    ({"form": -1}, [1], 0), ({"start": CONTEXT}, [1], 0), ({"start": -3}, [1], 1), ({}, [40], 0),
    ({}, [-1], 0)])
def test_what_is_not_possible_is_refused(
    tmp_path: Path, change: dict[str, int], tokens: list[int], start: int
) -> None:
    net = Net()
    for name, value in change.items():
        setattr(net, name, value)
    run = program(net, tmp_path / "p.pte")
    with pytest.raises(RuntimeError, match="0x12"):
        run(torch.tensor([tokens]), start)
