"""Where the 2 of eq. (20) comes from, and the norms of random matrices and their products.

At large width the spectral norm of a product of Gaussian matrices is an edge of a free convolution, a minimum over one
number w. Where the minimiser is rational or a root of a quadratic the edge has a closed form.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import sympy as sp  # pyright: ignore[reportMissingTypeStubs]

from theory.derivation import Derivation, line, register_derivation, substitution
from theory.derivations_expressions import Norm, Values, array, entry
from theory.derivations_numeric import STEP, Rng, opnorm
from theory.sources import Source
from theory.statements import find
from theory.symbols import symbol

_sp: Any = sp

EQ_20 = Source(key="takase2025spike", label="eq. (20)")
EDGE = Source(key="marchenko1967distribution", label="edge of the law")
FREE = Source(key="pennington2017resurrecting", label="free multiplicative convolution")
JOHNSTONE = Source(key="johnstone2001largest", label="theorem 1.1")
OWN = Source(key="spikecheck", label="minimum of the edge")

d, m, n = symbol("d"), symbol("rows"), symbol("columns")
sigma, sigma_O, c_VO = symbol("sigma"), symbol("sigma_O"), symbol("c_VO")
norm_O, norm_V = symbol("opnorm_O"), symbol("opnorm_V")
norm_W, mean_norm_O = entry("|W|", r"\| W \|"), entry("E|W_O|", r"\mathbb{E} \| W_O \|")
w_1, w_2 = entry("w_1"), entry("w_2")
W_O, W_V = array("W_O"), array("W_V")

WIDE = 192
LARGE_WIDTH = f"within 10 % at widths near {WIDE}: the edge's finite-width offset and fluctuation, 1 to 4 %"


def minimiser(function: Any, low: float, high: float) -> float:
    """Where a function's derivative (by complex steps) changes sign."""
    from scipy.optimize import brentq  # pyright: ignore[reportMissingTypeStubs]

    place: Any = brentq(lambda w: np.imag(function(w + 1j * STEP)) / STEP, low, high, xtol=1e-16)
    return float(place)


def _gaussian(rng: Rng) -> Values:
    """One rectangular normal matrix, two square ones and their product."""
    rows, columns, std, std_O, std_V = 2 * WIDE, WIDE, 0.3, 0.6, 0.2
    matrix = rng.normal(0, std, (rows, columns))
    out, value = rng.normal(0, std_O, (WIDE, WIDE)), rng.normal(0, std_V, (WIDE, WIDE))
    return {
        **{m: rows, n: columns, sigma: std, norm_W: opnorm(matrix), d: WIDE, sigma_O: std_O},
        **{norm_O: opnorm(out), norm_V: opnorm(value), W_O: out, W_V: value, c_VO: (WIDE * std_O * std_V) ** 2},
        w_1: minimiser(lambda w: 1 / w + rows / columns / (1 - w), 1e-3, 1 - 1e-3),
        w_2: minimiser(lambda w: 1 / (w * (1 - w) ** 2), 1e-3, 1 - 1e-3),
    }


def _aligned(rng: Rng) -> Values:
    """W_O = W_V': the norms multiply."""
    value = rng.normal(0, 0.5, (6, 6))
    return {W_O: value.T, W_V: value, norm_O: opnorm(value), norm_V: opnorm(value)}


def _mean_norm(rng: Rng) -> Values:
    """Mean norm of 12 square matrices."""
    norms = [opnorm(rng.normal(0, 0.6, (128, 128))) for _ in range(12)]
    return {mean_norm_O: float(np.mean(norms)), d: 128, sigma_O: 0.6}


@register_derivation
def factor_two() -> Derivation:
    """Where the 2 of eq. (20) comes from, and what it would be sharply."""
    large = partial(line, sample=_gaussian, tolerance=0.1, accuracy=LARGE_WIDTH)
    edge = large(
        norm_W / (sigma * _sp.sqrt(n)),
        "~=",
        _sp.sqrt(1 / w_1 + m / n / (1 - w_1)),
        "Marchenko-Pastur edge",
        "Root of the right edge of the spectrum of W'W / (sigma^2 n), W m x n: a minimum over 0 < w < 1.",
        source=EDGE,
    )
    at = line(
        w_1,
        "=",
        1 / (1 + _sp.sqrt(m / n)),
        "stationary point",
        "The derivative -1/w^2 + (m/n)/(1-w)^2 vanishes there.",
        source=OWN,
        sample=_gaussian,
        proof=lambda: _sp.diff(edge.right**2, w_1).subs(w_1, 1 / (1 + _sp.sqrt(m / n))),
    )
    estimate = large(
        norm_W,
        "~=",
        sigma * (_sp.sqrt(m) + _sp.sqrt(n)),
        "root of the two lines above",
        "Each side of the matrix brings its root: sigma sqrt(n) (1 + sqrt(m/n)).",
        source=EDGE,
        proof=lambda: sigma**2 * n * edge.right.subs(w_1, at.right) ** 2 - sigma**2 * (_sp.sqrt(m) + _sp.sqrt(n)) ** 2,
    )
    square = large(
        norm_O,
        "~=",
        2 * sigma_O * _sp.sqrt(d),
        "m = n = d",
        "W_O is square: the 2 counts its two sides, rows and columns.",
        source=EQ_20,
        proof=lambda: estimate.right.subs({sigma: sigma_O, m: d, n: d}, simultaneous=True) - 2 * sigma_O * _sp.sqrt(d),
    )
    finite = line(
        mean_norm_O,
        "~=",
        find("gaussian-opnorm-sharp").expression.subs({sigma: sigma_O, m: d, n: d}, simultaneous=True),
        "Tracy-Widom mean",
        "At finite width the mean is lower: 2 becomes about 2 (1 - 0.38 d^(-2/3)), 1.97 at d = 128.",
        source=JOHNSTONE,
        sample=_mean_norm,
        tolerance=0.02,
        accuracy="the statement's target 0.5 % and four standard errors of a mean of 12 draws at d = 128, 0.4 % each",
    )
    product = line(
        Norm(W_O * W_V),
        "<=",
        norm_O * norm_V,
        "sub-multiplicativity",
        "What eq. (20) does with |J^Z|, in which |W_V| hides.",
        source=EQ_20,
        sample=_gaussian,
        tight=_aligned,
    )
    four = large(
        norm_O * norm_V,
        "~=",
        4 * _sp.sqrt(c_VO),
        "the 2 twice",
        "c_V c_O = d sigma_V^2 d sigma_O^2.",
        source=EQ_20,
    )
    convolved = large(
        Norm(W_O * W_V),
        "~=",
        _sp.sqrt(c_VO) / (_sp.sqrt(w_2) * (1 - w_2)),
        "free multiplicative convolution",
        "Independent matrices do not align their singular vectors: minimum of (1+t)/sqrt(w) with t = w/(1-w).",
        source=FREE,
    )
    third = line(
        w_2,
        "=",
        _sp.Rational(1, 3),
        "stationary point",
        "The logarithm's derivative -1/w + 2/(1-w) vanishes.",
        source=OWN,
        sample=_gaussian,
        proof=lambda: _sp.diff(convolved.right**2, w_2).subs(w_2, _sp.Rational(1, 3)),
    )
    sharp = large(
        Norm(W_O * W_V),
        "~=",
        3 * _sp.sqrt(3) / 2 * _sp.sqrt(c_VO),
        "root of the two lines above",
        "sqrt(27/4) = 2.598 in place of 4.",
        source=FREE,
        proof=lambda: convolved.right.subs(w_2, third.right) ** 2 - _sp.Rational(27, 4) * c_VO,
    )
    loose = large(
        norm_O * norm_V / Norm(W_O * W_V),
        "~=",
        8 * _sp.sqrt(3) / 9,
        "quotient",
        "The product of norms is 1.54 times the norm of the product.",
        source=OWN,
        proof=lambda: four.right / sharp.right - 8 * _sp.sqrt(3) / 9,
    )
    return Derivation(
        name="factor-two",
        title="Where the 2 of eq. (20) comes from",
        steps=(edge, at, estimate, square, finite, product, four, convolved, third, sharp, loose),
        assumptions=("independent N(0, sigma^2) entries", "large width"),
    )


quantile, mean_norm = entry("Q(|W|)", r"Q(\|W\|)"), entry("E|W|", r"\mathbb{E} \| W \|")
t = symbol("t")


def _quantiles(rng: Rng, *, rows: int = 0) -> Values:
    """A single column, whose norm has a known law: its mean and its quantile at 1 - exp(-t^2/2)."""
    from scipy import special  # pyright: ignore[reportMissingTypeStubs]

    rows = rows or int(rng.integers(1, 400))
    deviation, std = float(rng.uniform(0.1, 4)), float(rng.uniform(0.1, 2))
    mean = np.sqrt(2) * np.exp(special.gammaln((rows + 1) / 2) - special.gammaln(rows / 2))
    square = float(special.chdtri(rows, np.exp(-(deviation**2) / 2)))
    return {
        **{m: rows, n: 1, sigma: std, t: deviation},
        **{quantile: std * float(np.sqrt(square)), mean_norm: std * float(mean)},
    }


def _many_rows(rng: Rng) -> Values:
    return _quantiles(rng, rows=100_000)


def _pair(rng: Rng, *, rank_one: bool = False) -> Values:
    """Two matrices; rank_one: they differ along the first one's top singular vectors."""
    first, second = rng.normal(0, 1, (6, 4)), rng.normal(0, 1, (6, 4))
    if rank_one:
        left, singular, right = np.linalg.svd(first)
        second = first - 0.9 * (singular[0] - singular[1]) * np.outer(left[:, 0], right[0])
    change = abs(opnorm(first) - opnorm(second))
    return {_CHANGE: change, _DISTANCE: float(np.linalg.norm(first - second))}


_CHANGE, _DISTANCE = entry("||W| - |W'||", r"| \|W\| - \|W'\| |"), entry("|W - W'|_F", r"\|W - W'\|_F")


@register_derivation
def gaussian_opnorm_upper() -> Derivation:
    """The norm of a Gaussian matrix, with a stated probability."""
    davidson = Source(key="davidson2001local", label="theorem II.13")
    own = partial(line, source=davidson, sample=_quantiles, tight=_many_rows)
    mean = own(
        mean_norm,
        "<=",
        sigma * (_sp.sqrt(m) + _sp.sqrt(n)),
        "Gordon's comparison",
        "Cited: the Gaussian process u'Wv is compared with u'g + v'h.",
    )
    lipschitz = line(
        _CHANGE,
        "<=",
        _DISTANCE,
        "triangle inequality",
        "The spectral norm is at most the Frobenius norm: as a function of the entries the norm is 1-Lipschitz.",
        source=OWN,
        sample=_pair,
        tight=partial(_pair, rank_one=True),
    )
    concentration = own(
        quantile,
        "<=",
        mean_norm + sigma * t,
        "Gaussian concentration",
        "Cited: a 1-Lipschitz function of normal entries exceeds its mean by sigma t with probability at most "
        "exp(-t^2/2). Q is the quantile at 1 - exp(-t^2/2).",
    )
    conclusion = substitution(
        *(concentration, mean),
        source=davidson,
        explanation="Over k matrices together: t = sqrt(2 ln(k/delta)).",
        sample=_quantiles,
        tight=_many_rows,
    )
    return Derivation(
        name="gaussian-opnorm-upper",
        title="The norm of a Gaussian matrix, a bound with a stated probability",
        steps=(mean, lipschitz, concentration, conclusion),
        statement="gaussian-opnorm-upper",
        assumptions=(
            "independent N(0, sigma^2) entries",
            "the checks of lines 1, 3 and 4 are at one column, where the law of |W| is known",
        ),
    )
