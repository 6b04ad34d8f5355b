"""Where sound begins and ends is found by its energy, in noise too, and never within it."""

from __future__ import annotations

import numpy as np
import pytest
from tests.unit.media.files import RATE, sine

from cloister.media.silence import sound_span


def recording(noise: float, level: float = 1.0, offset: float = 0.0) -> np.ndarray:
    """A second of sound after two of noise, and before three."""
    rng = np.random.default_rng(0)
    samples = offset + noise * rng.standard_normal(6 * RATE)
    samples[2 * RATE:3 * RATE] += level * sine()
    return samples.astype(np.float32)


@pytest.mark.parametrize("noise", [0.0, 1e-4, 0.01, 0.05])
@pytest.mark.parametrize("offset", [0.0, 0.2])
def test_sound_is_kept_with_a_margin(noise: float, offset: float) -> None:
    begin, end = sound_span(recording(noise, offset=offset), RATE)
    assert 1.8 * RATE < begin <= 1.86 * RATE
    assert 3.24 * RATE <= end < 3.3 * RATE


def test_a_soft_voice_is_sound_too() -> None:
    begin, end = sound_span(recording(1e-4, level=0.01), RATE)
    assert (begin < 2 * RATE, end > 3 * RATE, end - begin < 1.5 * RATE) == (True,) * 3


def test_a_soft_end_is_not_lost() -> None:
    samples = recording(1e-4)
    samples[3 * RATE:4 * RATE] += 0.05 * sine()
    assert sound_span(samples, RATE)[1] > 4 * RATE


def test_a_click_is_no_sound() -> None:
    samples = recording(1e-4)
    samples[RATE // 2:RATE // 2 + 20] = 0.9
    assert sound_span(samples, RATE)[0] > 1.8 * RATE


@pytest.mark.parametrize("samples", [
    np.zeros(RATE, np.float32), np.full(RATE, 0.5, np.float32), np.zeros(3, np.float32),
    sine(), 0.3 * np.random.default_rng(0).standard_normal(RATE).astype(np.float32)])
def test_what_has_no_silence_or_no_sound_is_left_whole(samples: np.ndarray) -> None:
    assert sound_span(samples, RATE) == (0, len(samples))
