"""Moments of a softmax over independent logits, soft-capped or not: what attention's growth takes from its rows."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import sympy as sp  # pyright: ignore[reportMissingTypeStubs]

from theory.derivation import Derivation, line, register_derivation
from theory.derivations_expressions import SumOver, Transposed, Values, array, entry
from theory.derivations_numeric import Array, Rng
from theory.sources import Source

_sp: Any = sp

OWN = Source(key="spikecheck", label="exchangeable logits")
PRICE = Source(key="price1958theorem", label="in vectors, at no correlation")

n, S, x, dx = entry("n"), entry("S"), entry("x"), entry("dx")
e_0, e_2, e_2_once, e_2_twice = (
    entry("e_0(x)"), entry("e_2(x)"), entry("e_2[l'](x)", r"e_2[\ell'](x)"), entry("e_2[l'^2](x)", r"e_2[\ell'^2](x)"),
)  # fmt: skip
square = entry("E|p|^2", r"\mathbb{E}\|p\|^2")
once, once_square = (
    entry("E[l'_1 p_1]", r"\mathbb{E}[\ell'_1 p_1]"),
    entry("E[l'_1 p_1^2]", r"\mathbb{E}[\ell'_1 p_1^2]"),
)
twice = [
    entry(f"E[l'_1^2 p_1^{power}]", rf"\mathbb{{E}}[\ell_1'^2 p_1^{power}]") for power in (2, 3, 4)
]  # a logit's own slope squared
pair = entry("E[l'_1^2 p_1^2 p_2^2]", r"\mathbb{E}[\ell_1'^2 p_1^2 p_2^2]")
whole = entry("E|S D|_F^2", r"\mathbb{E}\|S D\|_F^2")
ones, I = array("ones", r"\mathbf{1}"), array("I")  # noqa: E741  the identity's letter
second, passed = array("E[pp']", r"\mathbb{E}[p p^\top]"), array("E[SD]", r"\mathbb{E}[S D]")
shared = array("dE[pq']/dr", r"\frac{d}{dr}\mathbb{E}[p q^\top]")

ROW = 3  # logits of the rows that are integrated
NODES = np.linspace(-8, 8, 65)  # of a standard normal; trapezoids, which converge beyond every power
SMALL = 1e-3  # correlation between two rows, for the derivative at none


def _weights() -> Array:
    density = np.exp(-NODES * NODES / 2)
    return density / density.sum()


def _row(rng: Rng, *, grid: bool = True) -> Values:
    """One row over a grid of its three logits, soft-capped; the integral over x on a grid of ln x."""
    std, cap = float(rng.uniform(0.5, 1.5)), float(rng.uniform(1, 3))
    weights = _weights()
    logits, slopes = cap * np.tanh(std * NODES / cap), 1 / np.cosh(std * NODES / cap) ** 2
    l = np.stack(np.meshgrid(*[logits] * ROW, indexing="ij"))  # noqa: E741
    D = np.stack(np.meshgrid(*[slopes] * ROW, indexing="ij"))
    mass = weights[:, None, None] * weights[:, None] * weights
    p = np.exp(l)
    p /= p.sum(0)

    def mean(values: Array) -> Any:
        return np.sum(values * mass, axis=(-3, -2, -1))

    jacobian = np.einsum("ij,jabc->ijabc", np.eye(ROW), p) - p[:, None] * p[None]
    jacobian = jacobian * D[None]  # S D: columns times their slopes
    found: dict[Any, Any] = {
        **{n: ROW, ones: np.ones((ROW, 1)), I: np.eye(ROW), square: mean(np.sum(p * p, axis=0))},
        **{once: mean(D[0] * p[0]), once_square: mean(D[0] * p[0] ** 2), pair: mean((D[0] * p[0] * p[1]) ** 2)},
        **{letter: mean(D[0] ** 2 * p[0] ** power) for letter, power in zip(twice, (2, 3, 4), strict=True)},
        **{second: mean(p[:, None] * p[None]), passed: mean(jacobian), whole: float(np.sum(mean(jacobian**2)))},
        S: float(rng.uniform(0.3, 5)),
    }
    if not grid:
        return found | {shared: std**-2 * _derivative(p, weights)}
    places: list[Values] = []
    for log in np.arange(-45.0, 8.0, 0.05):
        falls = np.exp(-np.exp(log + logits)) * weights
        grows = np.exp(2 * logits) * falls
        places.append(
            {
                **{x: np.exp(log), dx: 0.05 * np.exp(log), e_0: falls.sum(), e_2: grows.sum()},
                **{e_2_once: grows @ slopes, e_2_twice: grows @ slopes**2},
            }
        )
    return found | {x: places}


def _derivative(p: Array, weights: Array) -> Array:
    """d E[p q'] / d(correlation) at none, for two rows whose logits correlate place by place: by a difference."""

    def together(r: float) -> Array:
        tilt = (2 * r * NODES[:, None] * NODES - r * r * (NODES[:, None] ** 2 + NODES**2)) / (2 * (1 - r * r))
        joint = weights[:, None] * weights * np.exp(tilt) / np.sqrt(1 - r * r)
        q = np.einsum("iabc,ad,be,cf->idef", p, joint, joint, joint, optimize=True)
        return np.einsum("idef,jdef->ij", q, p)

    return (together(SMALL) - together(-SMALL)) / (2 * SMALL)


def _rows(rng: Rng) -> Values:
    return _row(rng, grid=False)


@register_derivation
def softmax_moments() -> Derivation:
    """Moments of a softmax row and of its Jacobian, a soft-cap's slope inside."""
    own = partial(line, source=OWN, sample=_row)
    gamma = own(
        1 / S**2,
        "=",
        SumOver(dx * x * _sp.exp(-x * S), x),
        "gamma integral",
        "The sum over x stands for the integral from 0; with x^(k-1)/(k-1)! for x it is 1/S^k.",
    )
    single = own(
        once_square,
        "=",
        SumOver(dx * x * e_2_once * e_0 ** (n - 1), x),
        "independence",
        "p_1^2 = e^(2 l_1)/S^2, S the sum of e^l: under the integral the logits factor. e_k[f](x) is the mean of f "
        "e^(kl) exp(-x e^l) over one logit, l = c tanh(z/c) of a normal z, l' its slope; l = z and l' = 1 without a "
        "cap.",
    )
    double = own(
        pair,
        "=",
        SumOver(dx * x**3 / 6 * e_2_twice * e_2 * e_0 ** (n - 2), x),
        "independence",
        "Alike for two logits, and so for every moment: one integral each, for any n, whole or not.",
    )
    spread = own(
        second,
        "=",
        ones * Transposed(ones) / n**2 + (n * square - 1) / (1 - 1 / n) * (I - ones * Transposed(ones) / n) / n**2,
        "exchangeability",
        "Unchanged by any order of the logits, the mean is a multiple of I and one of 11'; p sums to 1, and the trace "
        "is E|p|^2. The factor on the second part is the gain: a, the logits' variance, at small ones.",
    )
    slope = own(
        passed,
        "=",
        (once - once_square) * (I - ones * Transposed(ones) / n) / (1 - 1 / n),
        "exchangeability, 1'S = 0",
        "S = diag(p) - pp', D the slopes; no change of logits changes the sum of p. The entry S_11 D_11 is "
        "l'_1 (p_1 - p_1^2).",
    )
    rows = line(
        shared,
        "=",
        passed * Transposed(passed),
        "Price's theorem",
        "p and q are rows whose uncapped logits have the covariance r, place by place: to first order in it they share "
        "E[SD] each, the slope within the mean. E[l'] E[S] is not that: of logits of variance 4 under a cap of "
        "2 it is 0.98 of it in a row of 4, and 1.23 in a row of 32.",
        source=PRICE,
        sample=_rows,
        tolerance=1e-4,
        accuracy=f"exact; the derivative by a difference of {2 * SMALL:g}, its error of order {SMALL**2:g}",
    )
    own_square = own(
        whole,
        "=",
        n * (twice[0] - 2 * twice[1] + twice[2]) + n * (n - 1) * pair,
        "sum over entries",
        "S_11 = p_1 - p_1^2 and S_12 = -p_1 p_2, n and n (n - 1) alike: the mean square of what one row passes back to "
        "its logits before the cap. Over its value at equal logits, (n - 1)/n^2, it is what `growth` multiplies by.",
    )
    return Derivation(
        name="softmax-moments",
        title="Moments of a softmax over independent logits, soft-capped or not",
        steps=(gamma, single, double, spread, slope, rows, own_square),
        assumptions=("independent logits of one law; correlated ones have their common part taken off",),
    )
