"""The norm of squared ReLU at initialisation, an outlier; `derivations_edges` has it among its chains."""

from __future__ import annotations

from typing import Any

import numpy as np
import sympy as sp  # pyright: ignore[reportMissingTypeStubs]

from theory.derivation import Derivation, line
from theory.derivations_expressions import Values, array, entry
from theory.derivations_numeric import Array, Rng, column_jacobian, layer_norm, opnorm, relu
from theory.sources import Source
from theory.statements import find
from theory.symbols import symbol

_sp: Any = sp

FREE = Source(key="pennington2017resurrecting", label="free multiplicative convolution")
OWN = Source(key="spikecheck", label="calculus")
OUTLIERS, SQUARED_DRAWS = 64, 400

d, d_ffn = symbol("d"), symbol("d_ffn")
sigma_1, sigma_2 = symbol("sigma_1"), symbol("sigma_2")
u, z = array("u"), array("z")
W_1, W_2, D = array("W_1"), array("W_2"), array("D")
w, t, t_slope = entry("w"), entry("t(w)"), entry("t'(w)")
_J_u = array("J_u", "J_u")
_seen = entry("t_z(w)", "t_z(w)")
_outlier, _spread = entry("z_out", r"z_{\mathrm{out}}"), entry("std z_out", r"\mathrm{std}\, z_{\mathrm{out}}")
_mean_norm = entry("E|J_u|", r"\mathbb{E} \| J_u \|")


def _squared(rng: Rng) -> Values:
    """A small squared-ReLU layer and its input."""
    first, second, point = rng.normal(0, 1, (9, 5)), rng.normal(0, 1, (5, 9)), rng.normal(0, 1, (5, 1))
    return {
        **{W_2: second, D: np.diag(2 * relu(first @ point)[:, 0]), z: first @ point, u: point},
        _J_u: column_jacobian(lambda x: second @ relu(first @ x) ** 2, point),
    }


def _drawn(rng: Rng, width: int, units: int, top: float) -> Array:
    """Open pre-activations, the largest first and far from the others."""
    return np.concatenate([[top], np.clip(np.abs(rng.normal(0, 1, units // 2 - 1)), None, 2.5)])


def _with_input(rng: Rng) -> Values:
    """W_2 D W_1 with the column along u, one unit steep: the mean norm over draws of the weights."""
    from scipy.optimize import brentq  # pyright: ignore[reportMissingTypeStubs]

    width = 192
    pre = _drawn(rng, width, width, 4.0)
    squares = 4 * pre**2

    def sums(x: float) -> tuple[float, float]:
        others = x * squares[1:] / (1 - x * squares[1:])
        along = x * squares * pre**2 / (1 - x * squares)
        return float(np.sum(others)) / width, float(np.sum(along)) / width

    end = 1 / squares[0]
    root: Any = brentq(lambda x: 1 + sums(x)[0] - sums(x)[1], 1e-9 * end, (1 - 1e-12) * end, xtol=1e-18)
    norms: list[float] = []
    for _ in range(OUTLIERS):
        first = rng.normal(0, width**-0.5, (len(pre), width))
        first[:, 0] = pre * width**-0.5
        norms.append(opnorm(rng.normal(0, width**-0.5, (width, len(pre))) @ (2 * pre[:, None] * first)))
    return {w: float(root), t: sums(root)[0], _seen: sums(root)[1], _outlier: float(np.mean(norms))}


def _many_outliers(rng: Rng) -> Values:
    """The largest singular value of 300 draws of W_2 D W_1 off the input, one unit steep."""
    width = 96
    pre = _drawn(rng, width, width, 5.0)
    squares = 4 * pre**2
    x = 1 / squares[0]
    left = 1 - x * squares[1:]
    norms = [
        opnorm(rng.normal(0, 1 / width, (width, len(pre))) * (2 * pre) @ rng.normal(0, 1, (len(pre), width)))
        for _ in range(300)
    ]
    return {
        **{d: width, w: x, t: float(np.sum(x * squares[1:] / left)) / width},
        **{t_slope: float(np.sum(squares[1:] / left**2)) / width, _spread: float(np.std(norms))},
    }


def _mean_squared(rng: Rng) -> Values:
    """Mean norm of squared-ReLU layers."""
    width, units, std_1, std_2 = 96, 192, 0.09, 0.05
    norms: list[float] = []
    for _ in range(SQUARED_DRAWS):
        first, point = rng.normal(0, std_1, (units, width)), layer_norm(rng.normal(0, 1, (width, 1)))
        norms.append(opnorm(rng.normal(0, std_2, (width, units)) @ (2 * relu(first @ point) * first)))
    return {d: width, d_ffn: units, sigma_1: std_1, sigma_2: std_2, _mean_norm: float(np.mean(norms))}


def squared_relu() -> Derivation:
    """`ffn-sharp-relu-squared`, from the chain rule to the mean of the larger of outlier and edge."""
    statement = find("ffn-sharp-relu-squared")
    along = line(
        _J_u * u,
        "=",
        W_2 * D * z,
        "chain rule",
        "J_u = W_2 D W_1 with slopes D = 2 relu(z): off u the rows of W_1 are independent of D, along u they are z, "
        "largest where D is.",
        source=OWN,
        sample=_squared,
    )
    condition = line(
        _seen,
        "=",
        1 + t,
        "determinant of a finite-rank change",
        "t(w) is the mean of w D^2/(1 - w D^2) without the steepest unit, t_z(w) that of w D^2 z^2/(1 - w D^2) with "
        "it, each times d_ffn/d; z of variance 1. The root w is below one over the largest D^2.",
        source=OWN,
        sample=_with_input,
        tolerance=1e-6,
        accuracy="the root is found numerically, and the left side is steep there",
    )
    outlier = line(
        _outlier,
        "~=",
        (1 + t) / _sp.sqrt(w),
        "an outlier of the free convolution",
        "A singular value beyond the others' edge, while z(q) = (1 + t(q^2))/q falls there.",
        source=FREE,
        sample=_with_input,
        tolerance=0.025,
        accuracy=f"within 2.5 % for the mean of {OUTLIERS} draws at width 192, which vary by 5 %",
    )
    spread = line(
        _spread,
        "~=",
        _sp.sqrt(((1 + t) / w - 2 * t_slope) / d),
        "central limit theorem",
        "Of the steepest unit's weights two quadratic forms and a bilinear one enter; their variances add up to the "
        "resolvent's derivative, which leaves -z'(q)/d for the outlier. Here off u, at w = 1/D^2.",
        source=OWN,
        sample=_many_outliers,
        tolerance=0.15,
        accuracy="within 15 % for the spread of 300 draws at width 96, known to 4 %",
    )
    conclusion = line(
        _mean_norm,
        "~=",
        statement.expression,
        "mean of the larger",
        "Of the outlier and the others' edge, both normal; averaged over the largest units of a layer, which are drawn "
        "by strata, the others at their quantiles.",
        source=OWN,
        sample=_mean_squared,
        tolerance=0.025,
        accuracy=f"within 2.5 % for the mean of {SQUARED_DRAWS} draws at width 96: five standard errors",
    )
    return Derivation(
        name="ffn-sharp-relu-squared",
        title="Squared ReLU at initialisation, the norm itself",
        steps=(along, condition, outlier, spread, conclusion),
        statement="ffn-sharp-relu-squared",
        assumptions=statement.assumptions,
    )
