"""Edges in numbers: where the height z(q) is least, how it bends there, and norms averaged over many small draws.

The minimum and the bend are found here by search and by finite differences, so that they check the closed forms of
`theory.random_matrix` and `theory.residual_edges`. The draws have the slopes of a layer at given places and independent
normal weights alone: what varies is then the largest singular value, and the mean of many shows the offset, which one
draw does not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from theory.derivations_numeric import Array, Rng, opnorm

WIDTH, UNITS, DRAWS = 64, 128, 200
NEXT_ORDER = (
    f"for the mean of {DRAWS} draws at width {WIDTH}: three standard errors and the law's next order, which is a "
    "quarter to a third of the offset there; without the offset it is beyond"
)


class Least(NamedTuple):
    """A minimum with the heights a step h to both sides."""

    place: float
    height: float
    step: float
    below: float
    above: float


def least(height: Callable[[float], float], low: float, high: float) -> Least:
    """Minimum of a convex function, by a bounded search."""
    from scipy.optimize import minimize_scalar

    found: Any = minimize_scalar(height, bounds=(low, high), method="bounded", options={"xatol": 1e-10 * high})
    place = float(found.x)
    step = 1e-3 * min(place - low, high - place)
    return Least(place, height(place), step, height(place - step), height(place + step))


def slopes(squares: Array, weights: Array) -> Array:
    """D of UNITS units: at squared slopes of equal weight, or the share of an atom of slope 1."""
    if len(squares) == 1:
        return (np.arange(UNITS) < round(UNITS * float(weights[0]))).astype(float)
    return np.sqrt(squares)


def hidden_sum(w: float, D: Array, width: int = WIDTH) -> float:
    """t(w), the sum of w D_i^2/(1 - w D_i^2) over hidden units, over the width."""
    return float(np.sum(w * D**2 / (1 - w * D**2))) / width


def mean_norm(rng: Rng, D: Array, strength: float, *, shortcut: bool) -> float:
    """Mean of |I + strength W_2 D W_1 / d|, or without I, over draws of standard normal W_1 and W_2."""
    one = np.eye(WIDTH) if shortcut else np.zeros((WIDTH, WIDTH))
    norms = [
        opnorm(one + strength / WIDTH * rng.normal(0, 1, (WIDTH, UNITS)) * D @ rng.normal(0, 1, (UNITS, WIDTH)))
        for _ in range(DRAWS)
    ]
    return float(np.mean(norms))
