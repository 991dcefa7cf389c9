"""Spectral norms of random matrices: an estimate, a bound, and sharp values."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from theory.activations import activation_function, activation_slope
from theory.architecture import Activation
from theory.arguments import require_sizes, require_tokens
from theory.functions import opaque, sqrt
from theory.quantities import quantity
from theory.sources import Source
from theory.statements import Statement, register

Array = NDArray[np.float64]

# Mean and variance of the Tracy-Widom law for real symmetric ensembles (beta = 1); tests integrate the law again.
TRACY_WIDOM_MEAN = -1.2065335745820
TRACY_WIDOM_VARIANCE = 1.6077810345


@register
def gaussian_opnorm_estimate() -> Statement:
    r"""The paper's norm of an m x n matrix with N(0, sigma^2) entries.

    .. math:: \|W\| \sim \sigma (\sqrt m + \sqrt n)

    Holds: nothing; 0.4 to 3 % above the mean at widths 64 to 1024.
    Source: takase2025spike, used for eq. (15) and eq. (20).
    """
    return Statement(
        name="gaussian-opnorm-estimate",
        kind="estimate",
        quantity=quantity("matrix_opnorm"),
        formula=lambda sigma, rows, columns: sigma * (sqrt(rows) + sqrt(columns)),
        source=Source(key="takase2025spike", label="used for eq. (15)"),
        assumptions=("independent N(0, sigma^2) entries", "both sides large"),
        why="the edge of the Marchenko-Pastur law",
    )


@register
def gaussian_opnorm_upper() -> Statement:
    r"""Bound the norm of a Gaussian matrix with a stated probability.

    .. math:: P(\|W\| \ge \sigma (\sqrt m + \sqrt n + t)) \le e^{-t^2/2}

    Holds: independent N(0, sigma^2) entries; jointly over k matrices with t = sqrt(2 ln(k / delta)).
    Why: the mean is at most sigma (sqrt m + sqrt n) (Gordon), and the norm is sigma-Lipschitz in the entries.
    Source: davidson2001local, theorem II.13.
    """
    return Statement(
        name="gaussian-opnorm-upper",
        kind="upper",
        quantity=quantity("matrix_opnorm"),
        formula=lambda sigma, rows, columns, t: sigma * (sqrt(rows) + sqrt(columns) + t),
        source=Source(key="davidson2001local", label="theorem II.13"),
        assumptions=("independent N(0, sigma^2) entries", "with probability at least 1 - exp(-t^2/2)"),
        why="Gordon's comparison bounds the mean; Gaussian concentration of a sigma-Lipschitz function adds t",
    )


@register
def gaussian_opnorm_sharp() -> Statement:
    r"""Predict the mean norm of a Gaussian matrix.

    .. math:: E\|W\| \approx \sigma \sqrt{\mu - 1.2065\,\tau}, \quad \mu = (\sqrt{m-\tfrac12} + \sqrt{n-\tfrac12})^2

    Holds: both sides at least 64, within 0.5 %.
    Why: the largest eigenvalue of W'W fluctuates by the Tracy-Widom law of scale tau around mu.
    Source: johnstone2001largest, with the half-integer centring.
    """

    def formula(sigma: Any, rows: Any, columns: Any) -> Any:
        m, n = sqrt(2 * rows - 1), sqrt(2 * columns - 1)  # sqrt(2) times the roots of m - 1/2, n - 1/2
        mu = (m + n) ** 2 / 2
        tau = (m + n) * (1 / m + 1 / n) ** _third(m) / _power_of_two(m)
        return sigma * sqrt(mu + TRACY_WIDOM_MEAN * tau)

    return Statement(
        name="gaussian-opnorm-sharp",
        kind="sharp",
        quantity=quantity("matrix_opnorm"),
        formula=formula,
        source=Source(key="johnstone2001largest", label="theorem 1.1"),
        assumptions=("independent N(0, sigma^2) entries", "both sides at least 64"),
        why="Tracy-Widom mean added to the centring of the largest singular value squared",
        target=0.005,
        domain={"rows": (64.0, math.inf), "columns": (64.0, math.inf)},
    )


def _third(like: Any) -> Any:
    """1/3, exact among expressions."""
    return _rational(like, 1, 3)


def _power_of_two(like: Any) -> Any:
    # tau's two roots carry sqrt(2) and sqrt(2)^(-1/3) from the halves: together 2^(1/3).
    return 2 ** _rational(like, 1, 3)


def _rational(like: Any, numerator: int, denominator: int) -> Any:
    if hasattr(like, "free_symbols"):
        import sympy as sp

        return sp.Rational(numerator, denominator)
    return numerator / denominator


class Edge(NamedTuple):
    """Right edge of the squared singular values of W_2 D W_1 over (sigma_1 sigma_2 d)^2.

    limit: at infinite width. curvature: second derivative of lambda in the resolvent there.
    """

    limit: float
    curvature: float

    def opnorm(self, d: float) -> float:
        """Predicted mean norm at width d, over sigma_1 sigma_2 d: the edge less its Tracy-Widom offset."""
        return math.sqrt(self.limit + TRACY_WIDOM_MEAN * self._scale(d))

    def opnorm_std(self, d: float) -> float:
        """Standard deviation of the norm from draw to draw."""
        return math.sqrt(TRACY_WIDOM_VARIANCE) * self._scale(d) / (2 * self.opnorm(d))

    def _scale(self, d: float) -> float:
        return d ** (-2 / 3) * (self.curvature / 2) ** (1 / 3)


def product_edge(squares: Array, weights: Array, ratio: float) -> Edge:
    """Edge for W_2 diag(D) W_1 with independent normal W_1, W_2 and hidden width ratio * d.

    With t(w) = ratio E[w D^2 / (1 - w D^2)], the edge is the minimum over 0 < w < 1/max D^2 of (1 + t)^2 / w.

    Args:
        squares, weights: values of D^2 and their probabilities, equal shapes.

    Source: pennington2017resurrecting (free multiplicative convolution).
    """
    from scipy.optimize import brentq

    squares, weights = squares[squares > 0], weights[squares > 0]

    def moments(w: float) -> tuple[float, float, float]:
        left = 1 - w * squares
        t = ratio * np.sum(weights * w * squares / left)
        slope = ratio * np.sum(weights * squares / left**2)
        second = ratio * np.sum(weights * 2 * squares**2 / left**3)
        return 1 + float(t), float(slope), float(second)

    def stationary(w: float) -> float:
        f, slope, _ = moments(w)
        return 2 * w * slope - f  # sign of the derivative of f^2/w

    largest = float(np.max(squares))
    root: Any = brentq(stationary, 1e-9 / largest, (1 - 1e-9) / largest, xtol=1e-14 / largest)
    w = float(root)
    f, slope, second = moments(w)
    in_w = 2 * slope**2 / w + 2 * f * second / w - 4 * f * slope / w**2 + 2 * f**2 / w**3
    return Edge(limit=f**2 / w, curvature=in_w * (2 * f) ** 2)


MANY_UNITS = 8192  # more are stood for by as many
GRID = 1024  # quantiles along either pre-activation of a gated unit


@lru_cache(maxsize=4096)
def feedforward_edge(activation: Activation, ratio: float, variance: float, units: int = MANY_UNITS) -> Edge:
    """Edge for W_2 diag(F'(z)) W_1 over sigma_1 sigma_2 d, z ~ N(0, variance), hidden width ratio * d.

    The slopes of a layer of `units` units are put at their quantiles: a slope so rare that no unit has it makes
    no edge.
    """
    return product_edge(*plain_squares(activation, variance, units), ratio)


def plain_squares(activation: Activation, variance: float, units: int) -> tuple[Array, Array]:
    """Squared slopes of a plain layer and their weights."""
    if activation in ("identity", "relu"):  # slopes 0 and 1 only: an atom, exactly
        return np.array([1.0]), np.array([1.0 if activation == "identity" else 0.5])
    squares = activation_slope(activation, math.sqrt(variance) * _normal_quantiles(units)) ** 2
    return squares, np.full(units, 1 / units)


@lru_cache(maxsize=64)
def gated_edge(activation: Activation, ratio: float, variance: float, gate_variance: float, units: int) -> Edge:
    """Edge for W_2 (diag(F'(z_1) z_3) W_1 + diag(F(z_1)) W_3) over sigma_2 sqrt(d), hidden width ratio * d."""
    return product_edge(*gated_squares(activation, variance, gate_variance, units), ratio)


def gated_squares(activation: Activation, variance: float, gate_variance: float, units: int) -> tuple[Array, Array]:
    """Squared slopes of the plain layer that a gated one is, and their weights.

    Given z_1 and z_3, a row of the sum is normal with variance D^2/d, D^2 = (F'(z_1) z_3)^2 variance +
    F(z_1)^2 gate_variance: the gated layer is a plain one with these slopes, whose tail is long, so that the
    largest of a layer's `units` decide its norm. They are put at the quantiles of a grid over both.
    """
    z_1 = math.sqrt(variance) * _normal_quantiles(GRID)
    z_3 = math.sqrt(gate_variance) * _normal_quantiles(2 * GRID)[GRID:]  # its sign does not matter
    slope, value = activation_slope(activation, z_1), activation_function(activation, z_1)
    grid = np.sort((gate_variance * value**2)[:, None] + variance * np.outer(slope**2, z_3**2), None)
    places = ((np.arange(units) + 0.5) / units * grid.size).astype(np.int64)
    return grid[places], np.full(units, 1 / units)


def _normal_quantiles(count: int) -> Array:
    """The middles of `count` equally likely intervals of a standard normal variable."""
    from scipy.special import ndtri

    return ndtri((np.arange(count) + 0.5) / count)


def elementwise(name: str, one: Callable[..., float], *values: Any) -> Any:
    """A function of numbers, evaluated one by one on arrays; a name among symbols."""

    def numeric(*numbers: Any) -> Any:
        return np.vectorize(one, otypes=[np.float64])(*numbers)[()]

    return opaque(name.replace("-", "_"), numeric, *values)


def feedforward_edge_opnorm(activation: Activation, d: Any, d_ffn: Any, sigma_1: Any) -> Any:
    """Predicted |W_2 D W_1| / (sigma_1 sigma_2 d) at finite width, elementwise."""

    def one(width: Any, hidden: Any, sigma: Any) -> float:
        width, hidden = require_sizes(d=width, d_ffn=hidden)
        units = min(int(hidden), MANY_UNITS)
        return feedforward_edge(activation, hidden / width, float(sigma**2 * width), units).opnorm(width)

    return elementwise(f"edge_{activation}", one, d, d_ffn, sigma_1)


@lru_cache(maxsize=4096)
def heads_edge(ratio: float) -> Edge:
    """Edge of |W_O W_V|^2 / (c_V c_O) for an inner width ratio * d; at ratio 1 it is 27/4.

    It is (1 + t)^2/(w ratio) with t = ratio w/(1 - w), least at w = 2/(2 + ratio + sqrt(ratio (ratio + 8))).
    """
    limit, curvature = product_edge(np.ones(1), np.ones(1), ratio)
    return Edge(limit / ratio, curvature / ratio**3)  # a resolvent of what is ratio times smaller is so much larger


def heads_opnorm(ratio: Any, d: Any) -> Any:
    """Predicted |W_O W_V| / sqrt(c_V c_O) at width d, elementwise; W_O is d by ratio * d."""

    def one(inner: Any, width: Any) -> float:
        (width,) = require_sizes(d=width)
        return heads_edge(float(inner)).opnorm(width)

    return elementwise("heads_edge", one, ratio, d)


def gated_edge_opnorm(activation: Activation, d: Any, d_ffn: Any, sigma_1: Any, sigma_3: Any) -> Any:
    """Predicted norm of the gated layer over sigma_2 sqrt(d) at finite width, elementwise."""

    def one(width: Any, hidden: Any, enter: Any, gate: Any) -> float:
        width, hidden = require_sizes(d=width, d_ffn=hidden)
        variances = float(enter**2 * width), float(gate**2 * width)
        if 0 in variances:
            return 0.0  # z' = 0 and W_3 = 0, or F(0) = 0 and W_1 = 0
        return gated_edge(activation, hidden / width, *variances, min(int(hidden), MANY_UNITS)).opnorm(width)

    return elementwise(f"gated_edge_{activation}", one, d, d_ffn, sigma_1, sigma_3)


@lru_cache(maxsize=256)
def _cesaro_opnorm(n_tokens: int) -> float:
    # The inverse has t on the diagonal and -(t-1) left of it; the norm is one over its smallest singular value,
    # found by bisection on the signs of the pivots of (inverse' inverse - shift). Plain Python, because loading
    # a solver would take longer than the whole check of a configuration.
    diagonal = [float(t * t + (t * t if t < n_tokens else 0)) for t in range(1, n_tokens + 1)]
    squared_off = [float((t * (t + 1)) ** 2) for t in range(1, n_tokens)]
    low, high = 0.25, 1.0  # hardy1920: the norm is below 2; the first row alone makes it at least 1
    while high - low > 1e-15:
        shift = (low + high) / 2
        pivot = diagonal[0] - shift
        definite = pivot > 0
        for entry, off in zip(diagonal[1:], squared_off, strict=True):
            if not definite:
                break
            pivot = entry - shift - off / pivot
            definite = pivot > 0
        low, high = (shift, high) if definite else (low, shift)
    # Every pivot rounds: a shift that looks definite is so for a matrix that differs by some units in the last place
    # of its entries, at most 2 T^2, each; the margin keeps this at or above the norm.
    return low**-0.5 * (1 + 2.0**-50 * n_tokens**2)


def cesaro_opnorm(n_tokens: Any) -> Any:
    """Spectral norm of the causal uniform averaging matrix (row t is 1/t on columns 1..t); below 2 for any T.

    Source: hardy1920 for the limit 2. Raises ValueError below one token.

    >>> round(float(cesaro_opnorm(1)), 9)
    1.0
    """

    return elementwise("cesaro_opnorm", lambda one: _cesaro_opnorm(require_tokens(int(one))), n_tokens)


def harmonic_number(count: Any) -> Any:
    """1 + 1/2 + ... + 1/count, elementwise.

    >>> round(float(harmonic_number(3)), 9)
    1.833333333
    """

    return elementwise("harmonic_number", lambda n: float(np.sum(1 / np.arange(1, int(n) + 1))), count)
