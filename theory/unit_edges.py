r"""Norms of ReLU-squared layers: slopes have no largest value, so the largest of a layer's units decide.

At the slopes' law itself the edge would be infinite. A layer has d_ffn slopes, and the steepest few stand apart from
the rest: they are drawn, and the others put at their quantiles. Besides, the sub-layer's Jacobian sees its own input:
along u a unit's row has the size of its pre-activation, which is largest where the slope is.
"""

from __future__ import annotations

import math
import statistics
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from theory.arguments import require_sizes
from theory.random_matrix import elementwise, product_edge

Array = NDArray[np.float64]

DRAWS = 256  # stratified: the mean is then known to 0.1 %
LARGEST = 16  # units drawn
REST = 2048  # places that stand for the others
FEWEST = 2 * LARGEST
GATED_REST = 512
GATED_DRAWS = 512  # plain ones, of a norm that varies by some fifteen per cent: the mean is known to 0.7 %


def largest_units(units: int) -> Array:
    """(DRAWS, LARGEST) probabilities below the largest, second largest, ... of `units` equal draws, by a fixed seed.

    Each is u_k = u_(k-1) v^(1/(units - k + 1)) with uniform v, which takes one value in each of DRAWS equal intervals.
    """
    middles = (np.arange(DRAWS) + 0.5) / DRAWS
    v = np.random.default_rng(0).permuted(np.tile(middles, (LARGEST, 1)), axis=1).T
    return np.cumprod(v ** (1 / (units - np.arange(LARGEST))), axis=1).astype(np.float64, copy=False)


@lru_cache(maxsize=64)
def relu_squared_opnorm(d: int, units: int) -> float:
    """Mean of |W_2 diag(F'(z)) W_1| / (sigma_1^2 sigma_2 d^(3/2)) for F(z) = relu(z)^2 at width d.

    Raises:
        ValueError: too few units to draw the largest of.
    """
    from scipy.special import ndtri

    if units < FEWEST:
        raise ValueError(f"d_ffn={units} is too narrow to draw the largest units; use {FEWEST} or more")
    count = min(units - LARGEST, REST)
    places = (np.arange(count) + 0.5) / count
    weights = np.concatenate([np.full(LARGEST, 1 / units), np.full(count, (1 - LARGEST / units) / count)])
    norms: list[float] = []
    for drawn in largest_units(units):
        z = ndtri(np.concatenate([drawn, drawn[-1] * places]))
        open_, squares = z > 0, 4 * z**2
        norms.append(_conditional(squares[open_], (squares * z**2)[open_], weights[open_], units / d, d))
    return float(np.mean(norms))


@lru_cache(maxsize=64)
def gated_relu_squared_opnorm(d: int, units: int) -> float:
    """Mean of |J_u| / (sigma_1^2 sigma_2 sigma_3 d^2) for relu(z_1)^2 z_3 at width d.

    Given z_1 and z_3 a unit's row is normal off u with D^2 = (2 z_1 z_3)^2 + z_1^4, both of variance 1 here, and
    3 z_1^2 z_3 along u. All units are drawn, by a fixed seed.

    Raises:
        ValueError: too few units.
    """
    if units < FEWEST:
        raise ValueError(f"d_ffn={units} is too narrow for its largest units to decide; use {FEWEST} or more")
    rng, norms = np.random.default_rng(0), list[float]()
    for _ in range(GATED_DRAWS):
        z_1, z_3 = rng.standard_normal((2, units))
        z_1, z_3 = z_1[z_1 > 0], z_3[z_1 > 0]
        squares, along = z_1**2 * (4 * z_3**2 + z_1**2), 9 * z_1**4 * z_3**2
        order = np.argsort(-squares)
        weights = np.full(len(order), 1 / units)
        if len(order) > LARGEST + GATED_REST:  # of the many others, evenly spaced ones stand for all
            count = len(order) - LARGEST
            places = LARGEST + ((np.arange(GATED_REST) + 0.5) / GATED_REST * count).astype(np.int64)
            order = np.concatenate([order[:LARGEST], order[places]])
            weights = np.concatenate([np.full(LARGEST, 1.0), np.full(GATED_REST, count / GATED_REST)]) / units
        norms.append(_conditional(squares[order], along[order], weights, units / d, d))
    return float(np.mean(norms))


def _conditional(squares: Array, along: Array, weights: Array, ratio: float, d: int) -> float:
    """Mean norm at given squared slopes D^2, the largest first: of the others' edge and an outlier, the larger.

    With q the resolvent, w = q^2 and t(w) of the others as in `product_edge`, the edge is the minimum of
    z(q) = (1 + t)/q. The largest unit and the column c along u make an outlier at z(q) where
    ratio E[w c^2 / (1 - w D^2)] = 1 + t, the mean over all units, if z falls there still. It varies from draw to
    draw with variance -z'(q)/d: two quadratic forms and a bilinear one in the unit's weights, whose variances
    add up to the resolvent's derivative.

    Args:
        along: c^2, of the same units.
    """
    from scipy.optimize import brentq

    others, share = squares[1:], weights[1:]
    edge = product_edge(others, share, ratio)

    def t(w: float) -> float:
        return ratio * float(np.sum(share * w * others / (1 - w * others)))

    def excess(w: float) -> float:
        return 1 + t(w) - ratio * float(np.sum(weights * w * along / (1 - w * squares)))

    end = 1 / squares[0]
    found: Any = brentq(excess, 1e-9 * end, (1 - 1e-12) * end)
    w = float(found)
    falling = (1 + t(w)) / w - 2 * ratio * float(np.sum(share * others / (1 - w * others) ** 2))
    if falling <= 0:
        return edge.opnorm(d)
    outlier = (1 + t(w)) / math.sqrt(w), math.sqrt(falling / d)
    return _larger(outlier, (edge.opnorm(d), edge.opnorm_std(d)))


def _larger(left: tuple[float, float], right: tuple[float, float]) -> float:
    """Mean of the larger of two independent normal variables, each a mean and a standard deviation."""
    spread = math.hypot(left[1], right[1])
    normal, distance = statistics.NormalDist(), (left[0] - right[0]) / spread
    above = normal.cdf(distance)
    return left[0] * above + right[0] * (1 - above) + spread * normal.pdf(distance)


def relu_squared_edge_opnorm(d: Any, d_ffn: Any) -> Any:
    """`relu_squared_opnorm`, elementwise."""

    def one(width: Any, hidden: Any) -> float:
        width, hidden = require_sizes(d=width, d_ffn=hidden)
        return relu_squared_opnorm(int(width), int(hidden))

    return elementwise("edge_relu_squared", one, d, d_ffn)


def gated_relu_squared_edge_opnorm(d: Any, d_ffn: Any) -> Any:
    """`gated_relu_squared_opnorm`, elementwise."""

    def one(width: Any, hidden: Any) -> float:
        width, hidden = require_sizes(d=width, d_ffn=hidden)
        return gated_relu_squared_opnorm(int(width), int(hidden))

    return elementwise("gated_edge_relu_squared", one, d, d_ffn)
