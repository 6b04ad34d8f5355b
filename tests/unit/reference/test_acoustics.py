"""Recordings keep their length and stay finite, whatever room, noise or microphone is drawn."""

import numpy as np
import pytest

from cloister.errors import SettingError
from cloister.reference import acoustics
from cloister.reference.speech import RATE

SPEECH = np.sin(np.arange(RATE, dtype=np.float32) * np.float32(0.1)) * np.hanning(RATE).astype(
    np.float32)


@pytest.mark.parametrize("seed", range(40))
def test_a_recording_has_the_length_asked_for_and_finite_samples_in_range(seed: int) -> None:
    rng = np.random.default_rng(seed)
    length = RATE + int(rng.integers(5 * RATE))
    made = acoustics.record(SPEECH, length, rng, others=[SPEECH])
    assert made.shape == (length,) and made.dtype == np.float32
    assert np.isfinite(made).all() and np.abs(made).max() <= 1
    assert np.abs(made).max() > 0.01


def test_the_same_generator_gives_the_same_samples() -> None:
    first, second, other = (
        acoustics.record(SPEECH, 2 * RATE, np.random.default_rng(seed)) for seed in (7, 7, 8))
    np.testing.assert_array_equal(first, second)
    assert not np.array_equal(first, other)


def test_speech_stands_where_it_is_put_with_silence_around_it() -> None:
    ratios = []
    for seed in range(30):
        made = np.square(acoustics.record(
            SPEECH, 4 * RATE, np.random.default_rng(seed), before=3 * RATE))
        ratios.append(made[3 * RATE:].mean() / max(1e-12, made[:2 * RATE].mean()))
    assert np.median(ratios) > 1000 and min(ratios) > 1


def test_speech_that_does_not_fit_is_refused() -> None:
    with pytest.raises(SettingError, match="does not fit"):
        acoustics.record(SPEECH, RATE - 1, np.random.default_rng(0))
    with pytest.raises(SettingError, match="does not fit"):
        acoustics.record(SPEECH, RATE, np.random.default_rng(0), before=1)


@pytest.mark.parametrize("kind", list(acoustics.NOISES))
@pytest.mark.parametrize("others", [(), (SPEECH, SPEECH[:5])])
def test_noise_is_of_one_loudness(kind: str, others: tuple[np.ndarray, ...]) -> None:
    for length in (1, 100, 33_333):
        made = acoustics.noise(kind, length, np.random.default_rng(1), others)
        assert made.shape == (length,) and np.isfinite(made).all()
    assert np.square(made).mean() == pytest.approx(1, rel=1e-3)


def test_a_noise_that_is_not_known_is_refused() -> None:
    with pytest.raises(SettingError, match="not known"):
        acoustics.noise("rain", 10, np.random.default_rng(0))


def test_a_room_leaves_length_and_peak_and_rings_after_a_click() -> None:
    click = np.zeros(RATE, np.float32)
    click[100] = 0.5
    made = acoustics.room(click, np.random.default_rng(2))
    assert made.shape == click.shape and np.abs(made).max() == pytest.approx(0.5, rel=1e-4)
    assert np.abs(made[200:2000]).max() > 1e-4
    assert np.abs(made[:99]).max() < 1e-4


@pytest.mark.parametrize("factor", [0.8, 1.0, 1.25])
def test_faster_speech_is_shorter_by_the_factor(factor: float) -> None:
    made = acoustics.at_speed(SPEECH, factor)
    assert len(made) == pytest.approx(RATE / factor, abs=2)
    assert made.dtype == np.float32
