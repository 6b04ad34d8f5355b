"""Losses are what their names say, and memory is bounded without changing them."""

import math

import pytest
import torch
from torch.nn import functional

from cloister.distill import losses
from cloister.distill.losses import Divergence, Objective, divergence
from cloister.errors import SettingError


def logits(seed: int, rows: int = 5, vocabulary: int = 7) -> torch.Tensor:
    return torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed)) * 2


def kl(p: torch.Tensor, q: torch.Tensor) -> float:
    """By the definition."""
    return sum(
        float(a) * math.log(float(a) / float(b)) for a, b in zip(p.flatten(), q.flatten(),
                                                                 strict=True)
    )


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_divergences_are_those_of_the_definitions(temperature: float) -> None:
    student, teacher = logits(1), logits(2)
    q, p = ((x.double() / temperature).softmax(-1) for x in (student, teacher))
    mean = (p + q) / 2
    wanted = {
        Divergence.FORWARD_KL: kl(p, q), Divergence.REVERSE_KL: kl(q, p),
        Divergence.JENSEN_SHANNON: 0.5 * (kl(p, mean) + kl(q, mean)),
    }
    for kind, value in wanted.items():
        got = divergence(student.log_softmax(-1), teacher, Objective(
            divergence=kind, temperature=temperature))
        assert float(got) == pytest.approx(value * temperature**2, rel=1e-4)


@pytest.mark.parametrize("kind", Divergence)
def test_a_student_like_its_teacher_has_no_divergence_and_no_gradient(kind: Divergence) -> None:
    student = logits(1).requires_grad_()
    got = divergence(student.log_softmax(-1), logits(1), Objective(divergence=kind))
    torch.autograd.backward(got)
    assert abs(float(got)) < 1e-5
    assert student.grad is not None
    assert student.grad.abs().max() < 1e-6


def test_the_gradient_at_a_higher_temperature_stays_of_the_same_size() -> None:
    """That is what the square of the temperature is for (arXiv 1503.02531)."""
    norms = []
    for temperature in (1.0, 20.0):
        student = (logits(1) * 0.01).requires_grad_()
        torch.autograd.backward(
            divergence(student.log_softmax(-1), logits(2) * 0.01, Objective(
                temperature=temperature)))
        assert student.grad is not None
        norms.append(float(student.grad.norm()))
    assert norms[1] == pytest.approx(norms[0], rel=0.05)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 100])
def test_in_slices_a_loss_and_its_gradients_are_the_same(
    size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(losses, "CHUNK_BYTES", size * 4 * 7)
    labels = torch.tensor([1, 2, 3, 4, 5])
    results = []
    for chunked in (False, True):
        rows = logits(3, 5, 4).requires_grad_()
        head = logits(4, 7, 4).requires_grad_()

        def loss(
            at: slice, rows: torch.Tensor = rows, head: torch.Tensor = head
        ) -> tuple[torch.Tensor, torch.Tensor]:
            out = rows[at] @ head.T
            return (functional.cross_entropy(out, labels[at], reduction="sum"),
                    divergence(out.log_softmax(-1), logits(5)[at], Objective()))

        one, two = losses.chunked(loss, 5, 7) if chunked else loss(slice(0, 5))
        torch.autograd.backward(one + 2 * two)
        results.append((one, two, rows.grad, head.grad))
    for plain, sliced in zip(*results, strict=True):
        torch.testing.assert_close(plain, sliced)


def test_no_two_slices_of_logits_exist_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "CHUNK_BYTES", 8 * 4 * 7)
    rows = logits(3, 64, 4).requires_grad_()
    saved: list[tuple[int, ...]] = []

    def loss(at: slice) -> tuple[torch.Tensor, torch.Tensor]:
        out = rows[at] @ logits(4, 7, 4).T
        return out.logsumexp(-1).sum(), out.new_zeros(())

    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: saved.append(tuple(x.shape)) or x, lambda x: x
    ):
        one, _ = losses.chunked(loss, 64, 7)
    assert not [shape for shape in saved if shape[-1:] == (7,)]
    torch.autograd.backward(one)
    assert rows.grad is not None


@pytest.mark.parametrize("values", [
    {"hard": -0.1}, {"hard": 1.1}, {"hard": math.nan}, {"temperature": 0.0},
    {"temperature": math.inf}, {"temperature": math.nan},
])
def test_an_objective_outside_its_bounds_is_refused_by_name(values: dict[str, float]) -> None:
    with pytest.raises(SettingError, match=f"{next(iter(values))} is"):
        Objective(**values)  # type: ignore[arg-type]
