r"""Moments of a softmax over n independent N(0, a) logits, exactly, for any n >= 1 and any a.

With S = sum_i e^{z_i}, p_i = e^{z_i}/S and 1/S^k = int_0^inf x^{k-1} e^{-xS} dx / (k-1)!, every moment of p is a
one-dimensional integral of powers of e_k(x) = E[e^{kz} exp(-x e^z)]:

.. math:: E \sum_i p_i^k = n \int_0^\infty \frac{x^{k-1}}{(k-1)!} e_k(x) e_0(x)^{n-1} dx .

By symmetry the second moments of p and of its Jacobian S = diag(p) - pp' are multiples of their values at equal
logits, so that three numbers say how far real logits are from the first order in a:

    gain    E[pp']  = 11'/n^2 + gain (I - 11'/n)/n^2         a as a -> 0, exp(a) - 1 as n -> inf
    slope   E[S]    = slope (I - 11'/n)/n                    1 as a -> 0
    square  E[S^2]  = square (I - 11'/n)/n^2                 1 as a -> 0, exp(a) as n -> inf

Correlated logits of covariance a ((1-r) I + r 11') are covered with a (1-r): a softmax does not see a common shift.

Soft-capped logits l = c tanh(z/c) of a normal z have the same integrals with e^{kl} for e^{kz}. What reaches z has the
cap's slope as a factor, and e_k[l'^2] = E[l'^2 e^{kl} exp(-x e^l)] takes it in exactly: `slope` and `square` are then
of S D, for D the slopes. Where the slope is, at small logits, the softmax has little weight: the two are not
independent. The derivation `softmax-moments` has every line.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

SMALLEST, LARGEST = 1e-3, 64.0  # of the logit variance; below, the numbers are those of a = 0 to 1e-3 / 2
_LOGITS = 81  # points of the table in log a
_COUNTS = 65  # and in log n
_LARGEST_COUNT = 2.0**20
_SMALLEST_COUNT = 1.001
_NODES = 65  # of the logit's own integral
_FARTHEST = 9.5  # of it, in standard deviations
_SINH_STEP = 0.08  # under a soft-cap, of asinh of the logit over the narrower of its widths
_STEP = 0.2  # of the integral over log x


class Moments(NamedTuple):
    """The three numbers, in the broadcast shape of n and a."""

    gain: Array
    slope: Array
    square: Array


def softmax_moments(count: Array, variance: Array) -> Moments:
    """Interpolate a table, linearly in the logarithms of all; within 1 % of `exact_moments`.

    Args:
        count: tokens a row sees, any real number >= 1.
        variance: of a logit, >= 0. Where either is no number, neither are the moments.
    """
    n, a = np.broadcast_arrays(np.asarray(count, dtype=np.float64), np.asarray(variance, dtype=np.float64))
    nowhere = np.isnan(n) | np.isnan(a)
    n = np.clip(np.where(nowhere, 1.0, n), _SMALLEST_COUNT, _LARGEST_COUNT)
    row = np.log(np.clip(np.nan_to_num(a), SMALLEST, LARGEST) / SMALLEST) / math.log(LARGEST / SMALLEST) * (_LOGITS - 1)
    column = (_stretched(n) - _FIRST) / (_LAST - _FIRST) * (_COUNTS - 1)
    i, j = (np.minimum(place.astype(int), size - 2) for place, size in ((row, _LOGITS), (column, _COUNTS)))
    x, y = row - i, column - j
    found = np.zeros((3, *n.shape))
    for k in np.unique(i):  # only the rows that are needed are computed
        here = i == k
        below, above = _row(int(k)), _row(int(k) + 1)
        at = j[here]
        low = below[:, at] * (1 - y[here]) + below[:, at + 1] * y[here]
        high = above[:, at] * (1 - y[here]) + above[:, at + 1] * y[here]
        found[:, here] = np.exp(low * (1 - x[here]) + high * x[here])
    found[:, nowhere] = np.nan
    # The table holds the gain over a, which is smooth and 1 at a = 0.
    return Moments(gain=found[0] * np.minimum(a, LARGEST), slope=found[1], square=found[2])


def _stretched(count: Any) -> Any:
    """log(n - 1), as even near n = 1 as far from it."""
    return np.log(count - 1 + 0.05)


_FIRST, _LAST = float(_stretched(_SMALLEST_COUNT)), float(_stretched(_LARGEST_COUNT))


@lru_cache(maxsize=_LOGITS)
def _row(index: int) -> Array:
    """(3, n) logarithms of gain over a, slope and square, at one variance of the table."""
    variance = SMALLEST * (LARGEST / SMALLEST) ** (index / (_LOGITS - 1))
    counts = np.exp(np.linspace(_FIRST, _LAST, _COUNTS)) + 1 - 0.05
    gain, slope, square = exact_moments(counts, variance)
    return np.log(np.stack([gain / variance, slope, square]))


class Capped(NamedTuple):
    """Soft-capped logits as factors on normal logits of the same variance.

    variance: of a capped logit. gain, slope, square: (n,) of a row, at the counts of the table.
    steepness: of one logit's gradient, whatever its weight.
    """

    variance: float
    gain: Array
    slope: Array
    square: Array
    steepness: float

    def at(self, count: Array) -> Moments:
        """The three factors at these numbers of tokens."""
        places = _stretched(np.clip(count, _SMALLEST_COUNT, _LARGEST_COUNT))
        table = np.linspace(_FIRST, _LAST, _COUNTS)
        return Moments(*(np.interp(places, table, factor) for factor in (self.gain, self.slope, self.square)))


@lru_cache(maxsize=128)
def capped_moments(variance: float, cap: float) -> Capped:
    """What a soft-cap makes of independent logits that have this variance before it.

    Of capped logits above the largest variance of the table the factors are 1: no softmax is computed there.
    """
    one = np.ones(_COUNTS)
    z, weights = normal_grid(variance, cap)
    logits, slope = soft_cap(math.sqrt(variance) * z, cap)
    capped, counts = float(logits**2 @ weights), np.exp(np.linspace(_FIRST, _LAST, _COUNTS)) + 1 - 0.05
    if capped == 0:
        return Capped(0.0, one, one, one, 1.0)
    before = variance / capped
    if not capped <= LARGEST:
        return Capped(capped, one, one, one, before * float(slope**2 @ weights))
    with_cap, without = exact_moments(counts, variance, cap), exact_moments(counts, capped)
    return Capped(
        variance=capped,
        gain=with_cap.gain / without.gain,
        slope=math.sqrt(before) * with_cap.slope / without.slope,
        square=before * with_cap.square / without.square,
        steepness=before * float(slope**2 @ weights),
    )


def normal_grid(variance: float, cap: float) -> tuple[Array, Array]:
    """Trapezoids for a standard normal: on an infinite line they converge beyond every power for entire integrands.

    A saturated slope is a peak, sigma / c times narrower: z = w sinh(t) resolves both, w the smaller width, with few
    more nodes for any sigma and c.
    """
    width = min(cap / math.sqrt(variance), 1.0) if cap and variance else 0.0
    if width == 0:
        z = np.linspace(-_FARTHEST, _FARTHEST, _NODES)
        weights = np.exp(-z * z / 2)
    else:
        farthest = math.asinh(_FARTHEST / width)
        t = np.linspace(-farthest, farthest, 2 * math.ceil(farthest / _SINH_STEP) + 1)
        z = width * np.sinh(t)
        weights = np.exp(-z * z / 2) * np.cosh(t)
    return z, weights / weights.sum()


def soft_cap(z: Array, cap: float) -> tuple[Array, Array]:
    """c tanh(z/c) and its slope; z and 1 for c = 0, which is no cap."""
    if cap == 0:
        return z, np.ones_like(z)
    return cap * np.tanh(z / cap), 1 / np.cosh(np.clip(z / cap, -300, 300)) ** 2


def exact_moments(counts: Array, variance: float, cap: float = 0.0) -> Moments:
    """The three numbers by quadrature, for an array of counts and one variance, that before a soft-cap."""
    deviation = math.sqrt(variance)
    z, weights = normal_grid(variance, cap)
    logs, slopes = soft_cap(deviation * z, cap)
    passed = slopes**2
    n = counts[:, None]
    y, step = _log_places(float(counts[-1]), variance, cap)
    exponent = -np.exp(np.minimum(y[:, None] + logs[None, :], 7.0))
    base = np.exp(exponent) * weights
    once, *powers = [np.exp(np.minimum(k * (y[:, None] + logs[None, :]), 40.0)) * base for k in (1, 2, 3, 4)]
    scaled = [power.sum(1) for power in powers]  # x^k e_k(x), with the powers of x taken in
    sloped = [power @ passed for power in powers]
    log_zero = np.log(np.maximum(base.sum(1), 1e-300))

    def integral(power: int, integrand: Array) -> Array:
        """Sum over log x of integrand * e_0^(n - power)."""
        tail = np.exp(np.maximum((n - power) * log_zero[None, :], -700.0))
        return step * (integrand[None, :] * tail).sum(1)

    plain = counts * integral(1, scaled[0])
    passing, kept = 1.0, plain
    if cap:
        passing, kept = (counts * integral(1, power @ slopes) for power in (once, powers[0]))
    second, third, fourth = (counts * integral(1, sloped[k] / math.factorial(k + 1)) for k in range(3))
    pairs = counts * (counts - 1) * integral(2, scaled[0] * sloped[0] / 6)
    rest = 1 - 1 / counts
    return Moments(
        gain=(counts * plain - 1) / rest,
        slope=(passing - kept) / rest,
        square=(second - 2 * third + fourth + pairs) * counts / rest,
    )


def _log_places(most: float, variance: float, cap: float = 0.0) -> tuple[Array, float]:
    """ln x of the integral for up to `most` tokens, and its step.

    x S is of order one: S runs from n e^{-deviation} to n e^{a/2} and, for few tokens, to the largest e^l.
    """
    largest = 9.0 * math.sqrt(variance)
    largest, smallest = (largest, max(variance, largest)) if cap == 0 else (min(largest, cap),) * 2
    low, high = -math.log(most) - smallest - 40.0, math.log(60.0) + largest
    y = np.linspace(low, high, int((high - low) / _STEP))
    return y, float(y[1] - y[0])


@lru_cache(maxsize=128)
def square_scatter(count: int, variance: float) -> float:
    """Relative variance of sum p^2 over rows of independent logits: E[(sum p^2)^2] = n E p_1^4 + n (n-1) E p_1^2 p_2^2.

    >>> round(square_scatter(32, 4.0), 2), round(square_scatter(2, 1.0), 2)
    (0.41, 0.04)
    """
    z, weights = normal_grid(variance, 0.0)
    y, step = _log_places(count, variance)
    grown = y[:, None] + math.sqrt(variance) * z
    zero, second, fourth = (
        (np.exp(np.minimum(k * grown, 40.0) - np.exp(np.minimum(grown, 7.0))) * weights).sum(1) for k in (0, 2, 4)
    )
    once, twice = (np.exp(np.maximum((count - k) * np.log(np.maximum(zero, 1e-300)), -700.0)) * step for k in (1, 2))
    squares = count * float(second @ once)
    product = count * float(fourth @ once) / 6 + count * (count - 1) * float(second**2 @ twice) / 6
    return product / squares**2 - 1
