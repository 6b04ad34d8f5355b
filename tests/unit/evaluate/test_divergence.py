"""Divergences are those of the definitions, and come with their uncertainty."""

import math

import pytest
import torch

from cloister.evaluate.divergence import compare


def logits(seed: int, rows: int = 400) -> torch.Tensor:
    return torch.randn(rows, 30, generator=torch.Generator().manual_seed(seed)) * 2


def test_every_figure_is_that_of_its_definition() -> None:
    one, two = logits(1), logits(1) + 0.5 * logits(2)
    labels = torch.randint(30, (400,), generator=torch.Generator().manual_seed(3))
    cut = (100, 250, 50)
    found = compare(
        zip(one.split(cut), two.split(cut), strict=True), labels.split(cut))
    p, q = one.double().softmax(-1), two.double().softmax(-1)
    kld = sorted((p * (p / q).log()).sum(-1).tolist())
    assert found.n == 400
    assert found.mean_kld == pytest.approx(sum(kld) / 400)
    alone = compare([(one, two)])
    assert alone.mean_kld_se == pytest.approx(torch.tensor(kld).std().item() / 20)
    assert found.median_kld == pytest.approx((kld[199] + kld[200]) / 2)
    assert kld[394] <= found.p99_kld <= kld[396]
    assert kld[398] <= found.p999_kld <= kld[399] == pytest.approx(found.max_kld)
    same = (one.argmax(-1) == two.argmax(-1)).double()
    assert found.top1 == pytest.approx(same.mean().item())
    assert alone.top1_se == pytest.approx(same.std().item() / 20)
    perplexity = [
        math.exp(-m.gather(-1, labels[:, None]).log().mean().item()) for m in (p, q)
    ]
    assert found.ppl_ratio == pytest.approx(perplexity[1] / perplexity[0])
    assert found.relative_error == pytest.approx(((one - two).norm() / one.norm()).item(), rel=1e-5)


def test_a_model_does_not_diverge_from_itself() -> None:
    found = compare([(logits(1), logits(1))], [torch.zeros(400, dtype=torch.int64)])
    assert (found.mean_kld, found.max_kld, found.top1, found.ppl_ratio) == (0, 0, 1, 1)


def test_without_true_tokens_no_perplexity_is_claimed() -> None:
    found = compare([(logits(1), logits(2))])
    assert found.ppl_ratio is None
    assert "ppl_ratio" not in found.to_dict()


def test_tokens_of_one_text_are_not_taken_for_independent() -> None:
    """Each text's tokens all alike: as many texts say as much as as many tokens."""
    one, two = logits(1), logits(1) + logits(2)
    single = compare(zip(one.split(1), two.split(1), strict=True))
    alike = compare(
        (a.expand(9, -1), b.expand(9, -1)) for a, b in zip(one.split(1), two.split(1), strict=True))
    assert alike.n == 9 * single.n
    assert alike.mean_kld_se == pytest.approx(single.mean_kld_se)
    assert single.mean_kld_se == pytest.approx(compare([(one, two)]).mean_kld_se)


def test_the_standard_error_is_that_of_repeats() -> None:
    means = [compare([(logits(s), logits(s) + logits(s + 500))]).mean_kld for s in range(60)]
    spread = torch.tensor(means).std().item()
    stated = compare([(logits(0), logits(0) + logits(500))]).mean_kld_se
    assert 0.6 < stated / spread < 1.6
