"""Recordings keep their length and stay finite, whatever room, noise or microphone is drawn."""

import numpy as np
import pytest
import torch
from torch import Tensor

from cloister.errors import SettingError
from cloister.reference import acoustics, noises
from cloister.reference.speech import RATE

SPEECH = torch.sin(torch.arange(RATE) * 0.1) * torch.hann_window(RATE, periodic=False)
OTHERS = torch.stack([SPEECH, torch.where(torch.arange(RATE) < 5, SPEECH + 0.1, 0.0)])
CPU = torch.device("cpu")


def recorded(seed: int, length: int, *, rows: int = 1, before: int | None = None) -> Tensor:
    return acoustics.record(SPEECH.repeat(rows, 1), [RATE] * rows, length,
                            np.random.default_rng(seed), others=OTHERS, before=before)


@pytest.mark.parametrize("seed", range(20))
def test_recordings_have_the_length_asked_for_and_finite_samples_in_range(seed: int) -> None:
    length = RATE + int(np.random.default_rng(seed).integers(5 * RATE))
    made = recorded(seed, length, rows=4)
    assert made.shape == (4, length) and made.dtype == torch.float32
    assert torch.isfinite(made).all() and made.abs().max() <= 1
    assert (made.abs().amax(1) > 0.01).all()
    torch.testing.assert_close(made * 32767, (made * 32767).round(), rtol=0, atol=1e-2)


def test_the_same_generator_gives_the_same_samples() -> None:
    first, second, other = (recorded(seed, 2 * RATE, rows=8) for seed in (7, 7, 8))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    assert not torch.equal(first[0], first[1])


def test_speech_stands_where_it_is_put_with_silence_around_it() -> None:
    made = recorded(0, 4 * RATE, rows=30, before=3 * RATE).square()
    ratios = made[:, 3 * RATE:].mean(1) / made[:, :2 * RATE].mean(1).clamp(min=1e-12)
    assert ratios.median() > 1000 and ratios.min() > 1


def test_speech_that_does_not_fit_is_refused() -> None:
    for length, before in ((RATE - 1, None), (RATE, 1)):
        with pytest.raises(SettingError, match="does not fit"):
            recorded(0, length, before=before)


def test_a_row_is_as_loud_as_it_is_alone_whatever_else_is_in_the_batch() -> None:
    loud = SPEECH.repeat(100, 1)
    mixed = torch.cat([loud, 1e-3 * loud, torch.zeros(1, RATE), loud[:1]])
    lengths = [RATE] * 201 + [100]
    made = acoustics.record(mixed, lengths, 2 * RATE, np.random.default_rng(3))
    alone = recorded(4, 2 * RATE, rows=100)
    assert made.shape == (202, 2 * RATE) and torch.isfinite(made).all()
    peaks = [each.abs().amax(1).median() for each in (made[:100], made[100:200], alone)]
    assert max(peaks) / min(peaks) < 1.4


def test_recordings_are_as_often_muted_quiet_noisy_and_clipped_as_meant() -> None:
    made = recorded(5, 2 * RATE, rows=400, before=RATE).square()
    assert 0.01 < ((made == 1).sum(1) > 100).float().mean() < 0.15  # clipped
    before = made[:, RATE // 4:3 * RATE // 4].median(1).values  # few clicks change it
    assert 0.05 < (before == 0).float().mean() < 0.3  # muted, or quieter than 16 bits
    ratio = 10 * torch.log10(made[:, RATE:].mean(1) / before.clamp(min=1e-12))
    assert 0.05 < (ratio < 20).float().mean() < 0.35
    assert 35 < ratio.median() < 75


@pytest.mark.parametrize("kind", list(noises.NOISES))
@pytest.mark.parametrize("others", [None, OTHERS])
def test_noise_is_of_one_loudness(kind: str, others: Tensor | None) -> None:
    for length in (1, 100, 33_333):
        made = noises.noise(kind, 3, length, np.random.default_rng(1), CPU, others)
        assert made.shape == (3, length) and torch.isfinite(made).all()
    torch.testing.assert_close(made.square().mean(1), torch.ones(3), rtol=1e-3, atol=0)


def test_a_noise_that_is_not_known_is_refused() -> None:
    with pytest.raises(SettingError, match="not known"):
        noises.noise("rain", 1, 10, np.random.default_rng(0), CPU)


def test_a_room_leaves_length_and_peak_and_rings_after_a_click() -> None:
    click = torch.zeros(2, RATE)
    click[0, 100], click[1, 100] = 0.5, 0.25
    made = noises.room(click, np.random.default_rng(2))
    assert made.shape == click.shape
    torch.testing.assert_close(made.abs().amax(1), torch.tensor([0.5, 0.25]), rtol=1e-4, atol=0)
    assert (made[:, 200:2000].abs().amax(1) > 1e-4).all()
    assert made[:, :99].abs().max() < 1e-4


@pytest.mark.parametrize("factor", [0.8, 0.937, 1.0, 1.25])
def test_faster_speech_is_shorter_and_higher_by_the_factor(factor: float) -> None:
    x = torch.stack([SPEECH, torch.where(torch.arange(RATE) < 9_000, SPEECH, 0.0)])
    made, lengths = acoustics.at_speed(x, [RATE, 9_000], factor)
    assert lengths == pytest.approx([RATE / factor, 9_000 / factor], rel=1e-3)
    assert made.shape == (2, lengths[0]) and made.dtype == torch.float32
    assert not made[1, lengths[1]:].any()
    at = torch.arange(lengths[0])
    envelope = 0.5 - 0.5 * torch.cos(2 * torch.pi * at / lengths[0])
    wave = torch.sin(at * (0.1 * RATE / lengths[0])) * envelope
    assert (made[0] - wave).abs().max() < 0.02


def test_a_tone_above_the_band_is_cut_by_a_higher_speed() -> None:
    tone = torch.sin(torch.arange(RATE) * (2 * torch.pi * 7_500 / RATE))[None]
    made, _ = acoustics.at_speed(tone, [RATE], 1.2)
    assert made[:, 500:-500].abs().max() < 0.02


def test_everything_is_made_on_the_device_of_the_speech_and_nothing_waits_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def normal(draw: noises.Draw, length: int) -> Tensor:
        return torch.empty(draw.rows, length, device=draw.device)

    monkeypatch.setattr(noises.Draw, "normal", normal)  # there is no generator of "meta"
    x, others = torch.empty(64, 9_000, device="meta"), torch.empty(4, 8_000, device="meta")
    rng = np.random.default_rng(0)
    made, lengths = acoustics.at_speed(x, [8_000] * 64, 1.1)  # raises where a value is needed
    assert acoustics.record(made, lengths, RATE, rng, others=others).device == x.device
    for kind in noises.NOISES:
        assert noises.noise(kind, 2, RATE, rng, x.device, others).device == x.device
