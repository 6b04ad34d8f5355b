"""Find where a recording has sound, by its energy."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["sound_span"]

_HOP_S, _FRAMES = 0.01, 3  # sound lasts that many frames or more; a click does not
_BEFORE_S, _AFTER_S = 0.15, 0.25  # kept around it: soft first and last sounds
_SILENT_DB = -70.0  # below full scale
_BELOW_LOUDEST_DB, _ABOVE_NOISE_DB, _NOISE_SHARE = 35.0, 10.0, 0.1
_LEAST_DB = 15.0  # below the loudest frame: noise louder than that hides where sound begins


def sound_span(samples_T: NDArray[np.float32], rate: int) -> tuple[int, int]:
    """Return the first sample and the one behind the last of what is not quiet, with a margin.

    Frames of 10 ms count as sound from 10 dB above the quietest tenth of them, within 35 and 15 dB
    below the loudest one. A constant offset is no sound. A recording without any is left whole.
    """
    hop = max(1, round(_HOP_S * rate))
    count = len(samples_T) // hop
    whole = (0, len(samples_T))
    if count < _FRAMES:
        return whole
    frames_NT = samples_T[:count * hop].reshape(count, hop)
    level_N = 10 * np.log10(frames_NT.var(axis=1, dtype=np.float64) + 1e-12)
    loudest = float(level_N.max())
    if loudest < _SILENT_DB:
        return whole
    noise = float(np.sort(level_N)[int(_NOISE_SHARE * count)])
    threshold = min(
        max(loudest - _BELOW_LOUDEST_DB, noise + _ABOVE_NOISE_DB), loudest - _LEAST_DB)
    lasting = np.convolve(level_N > threshold, np.ones(_FRAMES), "valid") == _FRAMES
    found = np.flatnonzero(lasting)
    if not len(found):
        return whole
    begin = int(found[0]) * hop - round(_BEFORE_S * rate)
    end = (int(found[-1]) + _FRAMES) * hop + round(_AFTER_S * rate)
    return max(0, begin), min(len(samples_T), end)
