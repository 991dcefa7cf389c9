"""What counts as a spike: named definitions, always applied side by side.

A definition takes a series (one number a step) and gives the steps at which an event begins. It looks only
at earlier steps, so that it could have been applied while training.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Series = NDArray[np.float64]
REFRACTORY = 10  # steps after an event's last high value during which it is still the same event


def _events(high: NDArray[np.bool_]) -> tuple[int, ...]:
    """First steps of runs of high values, runs closer than `REFRACTORY` merged."""
    events: list[int] = []
    last = -REFRACTORY - 1
    for step in np.flatnonzero(high):
        if step - last > REFRACTORY:
            events.append(int(step))
        last = int(step)
    return tuple(events)


def twice_median(series: Series, window: int = 50) -> tuple[int, ...]:
    """Above twice the median of the last 50 steps (at least 10 of them)."""
    high = np.zeros(series.size, dtype=bool)
    for step in range(10, series.size):
        high[step] = series[step] > 2 * np.median(series[max(0, step - window) : step])
    return _events(high)


def robust_deviation(series: Series, window: int = 50, factor: float = 7.0) -> tuple[int, ...]:
    """Above the median of the last 50 steps by 7 times 1.4826 MAD (7 standard deviations if normal)."""
    high = np.zeros(series.size, dtype=bool)
    for step in range(20, series.size):
        past = series[max(0, step - window) : step]
        median = np.median(past)
        spread = 1.4826 * np.median(np.abs(past - median))
        high[step] = series[step] - median > factor * spread
    return _events(high)


def six_sigma(series: Series, window: int = 128) -> tuple[int, ...]:
    """Above the mean of the last 128 steps by 6 of their standard deviations (at least 20 steps)."""
    high = np.zeros(series.size, dtype=bool)
    for step in range(20, series.size):
        past = series[max(0, step - window) : step]
        high[step] = series[step] > past.mean() + 6 * past.std()
    return _events(high)


DEFINITIONS: dict[str, Callable[[Series], tuple[int, ...]]] = {
    "twice-median": twice_median,
    "robust-deviation": robust_deviation,
    "six-sigma": six_sigma,
}


def paired_difference(series: Series, reference: Series) -> Series:
    """A loss less a reference run's loss on the same batches: hard batches cancel."""
    length = min(series.size, reference.size)
    return series[:length] - reference[:length]


def paired_ratio(series: Series, reference: Series) -> Series:
    """A gradient norm over a reference run's on the same batches, times the reference's median."""
    length = min(series.size, reference.size)
    return series[:length] / reference[:length] * float(np.median(reference[:length]))
