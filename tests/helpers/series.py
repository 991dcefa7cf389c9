"""Series with spikes put in by hand, and the definitions that are to find them."""

from __future__ import annotations

import numpy as np
import pytest

from empirics.spike_definitions import DEFINITIONS

EVERY = pytest.mark.parametrize("definition", DEFINITIONS.values(), ids=DEFINITIONS)
twice_median = DEFINITIONS["twice-median"].find
robust_deviation = DEFINITIONS["robust-deviation"].find


def series(length: int = 100, level: float = 1.0, wobble: float = 0.01, **values: float) -> np.ndarray:
    """A level that wobbles by -1, 1/2, -1/2, 1 times `wobble`, with `at<step>` values put in.

    Over whole periods the mean and median are the level, the median absolute deviation is 3/4 of the wobble and the
    standard deviation sqrt(5/8) of it.
    """
    made = level + wobble * np.resize([-1.0, 0.5, -0.5, 1.0], length)
    for name, value in values.items():
        made[int(name.removeprefix("at"))] = value
    return made


def spike(length: int, high: int, *, at: int = 100, end: float | None = None) -> np.ndarray:
    """A spike at step `at` that lasts for `high` steps; `end` is put last."""
    made = series(length)
    made[at : at + high] = 5.0
    if end is not None:
        made[-1] = end
    return made
