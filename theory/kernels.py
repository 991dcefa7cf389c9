r"""Activation kernels: second moments of F(z), F(z') and of their slopes for Gaussian (z, z').

For centred Gaussian (z, z') with variances q, q' and covariance c,

.. math:: \kappa = E[F(z) F(z')], \qquad \dot\kappa = E[F'(z) F'(z')] = \partial\kappa/\partial c .

The second equality (Price's theorem) is why one table serves the forward and the backward pass.

================  ==========================================  ==========================================
activation        kernel                                      error, over the kernel at z = z'
================  ==========================================  ==========================================
identity          c                                           rounding
relu              arc-cosine, order 1                         rounding; slope: see below
relu-squared      arc-cosine, order 2                         rounding
gelu              closed form                                 rounding
gelu-tanh, silu   GELU kernels of other widths, and a         to variance 4: kappa 1e-8, slope 1e-6; beyond:
                  Hermite series of what they leave           kappa 2e-6, slope 2e-4 (`SERIES_ERROR`)
================  ==========================================  ==========================================

for variances from 0 to 1e3 and any correlation, 1 and -1 among them: on the diagonal, where c = q = q' to the
last bit, the correlation is exactly 1. Elsewhere an error of 1e-16 in a correlation near 1 moves the slope of
ReLU, a step, by 1e-8: that is the step's own sensitivity, in any arithmetic of doubles.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from theory.activations import ACTIVATIONS, activation_function, activation_slope, normal_cdf
from theory.architecture import Activation

__all__ = ["activation_function", "activation_kernel", "activation_slope", "erf_kernel", "gauss_hermite", "gelu_kernel"]

Array = NDArray[np.float64]

_NODES = 128  # of Gauss-Hermite quadrature; exact to rounding for the slopes up to a standard deviation of about 3


class KernelValue(NamedTuple):
    """`kappa` = E[F F'] and `slope` = E[F'(z) F'(z')], in the shape of the covariance."""

    kappa: Array
    slope: Array


# Largest errors of the series in (kappa, slope), up to the variance SERIES_KNEE and beyond it, over the geometric
# mean of the diagonal's two entries. They are largest at correlation 1; the tests measure them.
SERIES_KNEE = 4.0
SERIES_ERROR = ((1e-8, 1e-6), (2e-6, 2e-4))
# A variance from which on smooth activations have F(s z) = s F(z), as ReLU has, but for 1/s; their kernels lose their
# digits beyond it.
SMOOTH_END = 1e6


def activation_kernel(activation: Activation, q: Array, q_other: Array, covariance: Array) -> KernelValue:
    """Evaluate the kernel pair elementwise.

    Args:
        q, q_other: variances, broadcastable to `covariance`.
        covariance: covariances, |c| <= sqrt(q q').
    """
    norms = np.sqrt(q * q_other)
    rho = np.clip(covariance / np.where(norms > 0, norms, 1.0), -1.0, 1.0)
    if activation == "identity":
        return KernelValue(norms * rho, np.ones_like(rho))
    if activation in ("gelu", "gelu-tanh", "silu"):
        ends = np.minimum(q, SMOOTH_END), np.minimum(q_other, SMOOTH_END)
        within = np.sqrt(ends[0] * ends[1])
        if activation == "gelu":
            kappa, slope = gelu_kernel(*ends, within * rho)
        else:
            kappa, slope = _series(activation, *ends, within, rho)
        return KernelValue(kappa * np.where(norms > within, norms / np.where(within > 0, within, 1.0), 1.0), slope)
    angle, sine = np.pi - np.arccos(rho), np.sqrt(1 - rho * rho)
    first = (sine + rho * angle) / (2 * np.pi)  # cho2009kernel: the kernel of order 1, for unit variances
    if activation == "relu":
        return KernelValue(norms * first, angle / (2 * np.pi))
    second = (3 * sine * rho + angle * (1 + 2 * rho * rho)) / (2 * np.pi)  # order 2; its derivative is 4 times order 1
    return KernelValue(norms**2 * second, 4 * norms * first)


def erf_kernel(q: Array, q_other: Array, covariance: Array) -> KernelValue:
    r"""The kernel of the error function.

    .. math:: E[\mathrm{erf}(z)\,\mathrm{erf}(z')] = \tfrac2\pi \arcsin\frac{2c}{\sqrt{(1+2q)(1+2q')}}

    Why: erf(z) = 2 P(w < z sqrt 2) - 1 for a standard normal w, so the product is the probability that two
        correlated normals share their sign (Sheppard).
    Source: williams1997infinite.
    """
    root = np.sqrt(_determinant(2 * q, 2 * q_other, 2 * covariance))
    return KernelValue(2 / np.pi * np.arctan2(2 * covariance, root), 4 / np.pi / root)


def gelu_kernel(q: Array, q_other: Array, covariance: Array) -> KernelValue:
    r"""The kernel of GELU, F(z) = z Phi(z), and its derivative.

    .. math:: \kappa = c\,E[\Phi\Phi'] + \frac{1}{2\pi\sqrt D}\left[q q' + c^2 \frac{1 - q q'}{(1+q)(1+q')}\right],
        \quad D = (1+q)(1+q') - c^2, \quad E[\Phi\Phi'] = \frac14 + \frac{1}{2\pi}\arctan\frac{c}{\sqrt D}

    Why: integrating z and z' by parts (Stein) leaves E[Phi Phi'], the Erf kernel in other units, and Gaussian
        integrals of densities. Differentiating in c gives the slope.
    Source: tsuchida2021avoiding; derived again here.
    """
    square = covariance * covariance
    inverse = 1 / _determinant(q, q_other, covariance)
    density = np.sqrt(inverse) / (2 * np.pi)  # E[phi(z) phi(z')]
    both = (1 + erf_kernel(q / 2, q_other / 2, covariance / 2).kappa) / 4  # E[Phi(z) Phi(z')]
    share = (1 - q * q_other) / ((1 + q) * (1 + q_other))
    bracket = q * q_other + square * share
    kappa = covariance * both + density * bracket
    return KernelValue(kappa, both + covariance * density * (1 + 2 * share + bracket * inverse))


def _determinant(q: Array, q_other: Array, covariance: Array) -> Array:
    """(1 + q)(1 + q') - c^2, with the large parts of it subtracted first."""
    norms = np.sqrt(q * q_other)
    return 1 + q + q_other + (norms - covariance) * (norms + covariance)


# A smooth activation is a mixture of GELUs of other widths, z Phi(z/s), and a small remainder. The mixture's kernel
# is a closed form and has nearly all of what a series is slow at, the bend that at large variance looks like a kink.
# Any widths are right: they only decide how fast the remainder's series falls. SiLU's are least squares over the
# line (stefanski1991normal: the logistic law is a mixture of normal laws); tanh-GELU's leaves a remainder that
# integrates to 0. Pairs of weight and s.
_MIXTURES: dict[Activation, tuple[tuple[float, float], ...]] = {
    "silu": ((0.66532801, 1.38954472), (0.33467199, 2.44755953)),
    "gelu-tanh": ((1.0, 0.9991711920755656),),
}
_TERMS = 64
_CONVERGED = 1e-11  # of the series' largest term: smaller ones are left out


def _series(activation: Activation, q: Array, q_other: Array, norms: Array, rho: Array) -> KernelValue:
    r"""The kernel of z g(z): mixture in closed form, and :math:`\sum_n (a_n a'_n - m_n m'_n) \rho^n`.

    a_n are the Hermite coefficients of x g(sqrt(q) x), m_n those of the mixture in place of g.
    Up to the knee the plain series is as good, and the mixture is left out.
    """
    largest = max(float(np.max(q, initial=0.0)), float(np.max(q_other, initial=0.0)))
    mixture = _MIXTURES[activation] if largest > SERIES_KNEE else ()
    kappa, slope = np.zeros_like(rho), np.zeros_like(rho)
    for weight, s in mixture:
        for weight_other, s_other in mixture:
            both, scale = weight * weight_other, s * s_other
            part = gelu_kernel(q / s**2, q_other / s_other**2, norms * rho / scale)
            kappa, slope = kappa + both * scale * part.kappa, slope + both * part.slope

    sizes = np.shape(q), np.shape(q_other)
    variances, place = np.unique(np.concatenate([np.ravel(q), np.ravel(q_other)]), return_inverse=True)
    own, other = (p.reshape(size) for p, size in zip(np.split(place, [np.size(q)]), sizes, strict=True))
    remainder, mixed = _hermite(activation, mixture, tuple(variances.tolist()))
    rest, known, rest_other, total_other = (
        remainder[:, own], mixed[:, own], remainder[:, other], (remainder + mixed)[:, other]
    )  # fmt: skip
    series, derivative = np.zeros_like(rho), np.zeros_like(rho)
    for n in reversed(range(_needed(rest, known, rest_other, total_other))):  # Horner's scheme
        derivative *= rho
        derivative += series
        series *= rho
        series += rest[n] * total_other[n] + known[n] * rest_other[n]
    return KernelValue(kappa + norms * series, slope + derivative)


def _needed(*coefficients: Array) -> int:
    """Number of terms of the series, each weighted as in the slope, until what follows is too small to matter."""
    rest, known, rest_other, total_other = (np.abs(c).reshape(_TERMS, -1).max(axis=1) for c in coefficients)
    size = (rest * total_other + known * rest_other) * np.arange(1, _TERMS + 1)
    return 1 + int(np.max(np.nonzero(size > _CONVERGED * size.max())[0], initial=0))


@lru_cache(maxsize=4)  # a token's own entry and its entries with others ask for the same ones
def _hermite(
    activation: Activation, mixture: tuple[tuple[float, float], ...], q: tuple[float, ...]
) -> tuple[Array, Array]:
    """Hermite coefficients of x (g - mixture)(sqrt(q) x) and of x mixture(sqrt(q) x), shape (terms, len(q))."""
    sigma = np.sqrt(np.array(q))
    rest, known = np.zeros((_TERMS, sigma.size)), np.zeros((_TERMS, sigma.size))
    for weight, s in mixture:
        known += weight * _hermite_gelu(sigma / s)
    octave = np.ceil(np.log2(np.maximum(sigma, 1.0)))
    for level in np.unique(octave):
        nodes, table = _grid(float(2**level))
        chosen = octave == level
        z = np.multiply.outer(nodes, sigma[chosen])
        gate = ACTIVATIONS[activation].gate(z) - sum(weight * normal_cdf(z / s) for weight, s in mixture)
        rest[:, chosen] = table @ (nodes[:, None] * gate)
    return rest, known


def _hermite_gelu(ratio: Array) -> Array:
    r"""Hermite coefficients of x Phi(ratio x), exactly, shape (terms, ratio.size).

    Those of Phi(ratio x) are p_0 = 1/2 and, at odd n, E[Phi^{(n)}]/sqrt(n!), with r = ratio/sqrt(1 + ratio^2):
    p_1 = r/sqrt(2 pi), p_{n+2} = -n r^2 p_n / sqrt((n+1)(n+2)). A factor x couples neighbours.
    """
    r = ratio / np.sqrt(1 + ratio * ratio)
    p = np.zeros((_TERMS + 1, r.size))
    p[0], p[1] = 0.5, r / math.sqrt(2 * math.pi)
    for n in range(1, _TERMS - 1, 2):
        p[n + 2] = -n * r * r * p[n] / math.sqrt((n + 1) * (n + 2))
    root = np.sqrt(np.arange(_TERMS + 1.0))[:, None]
    coefficients = root[1:] * p[1:]
    coefficients[1:] += root[1:-1] * p[:-2]
    return coefficients


@lru_cache(maxsize=64)
def _grid(largest: float) -> tuple[Array, Array]:
    """Nodes x and a table (terms, nodes) whose product with values f(x) gives Hermite coefficients of f.

    The trapezoidal rule converges exponentially for functions analytic around the axis. It spans 12 standard
    deviations, or 45 units of z where that is less: beyond, gate and mixture agree to rounding.

    Args:
        largest: at least the standard deviation of z, at most twice it (or 1).
    """
    reach = min(12.0, 90.0 / largest)
    nodes = np.linspace(-reach, reach, 257)
    table = np.empty((_TERMS, nodes.size))
    table[0] = (nodes[1] - nodes[0]) * np.exp(-nodes * nodes / 2) / math.sqrt(2 * math.pi)
    table[1] = nodes * table[0]
    for n in range(1, _TERMS - 1):
        table[n + 1] = (nodes * table[n] - math.sqrt(n) * table[n - 1]) / math.sqrt(n + 1)
    return nodes, table


@lru_cache(maxsize=1)
def gauss_hermite() -> tuple[Array, Array]:
    """Nodes and weights (summing to 1) for expectations over a standard normal."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(_NODES)
    return nodes, weights / math.sqrt(2 * math.pi)
