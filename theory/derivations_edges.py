"""Norms of feed-forward half-layers and of squared ReLU at initialisation: edges, outliers, their finite width."""

from __future__ import annotations

from typing import Any

import numpy as np
import sympy as sp  # pyright: ignore[reportMissingTypeStubs]

from theory.derivation import Derivation, line, register_derivation
from theory.derivations_expressions import Norm, Transposed, Values, array, entry
from theory.derivations_numeric import Array, Rng, column_jacobian, layer_norm, opnorm, relu
from theory.sources import Source
from theory.statements import find
from theory.symbols import symbol

_sp: Any = sp

FREE = Source(key="pennington2017resurrecting", label="free multiplicative convolution")
SUM = Source(key="haagerup2000brown", label="sums of R-diagonal elements")
OWN = Source(key="spikecheck", label="calculus")
WIDE = 192
ONE_DRAW = f"within 8 % for one draw at width {WIDE}, whose norm varies by 1 to 2 %"

d, d_ffn, s = symbol("d"), symbol("d_ffn"), symbol("s")
sigma_1, sigma_2, sigma_3 = symbol("sigma_1"), symbol("sigma_2"), symbol("sigma_3")
I = array("I")  # noqa: E741  the identity's letter
one, u, z = array("ones", r"\mathbf{1}"), array("u"), array("z")
W_1, W_2, W_3, D = array("W_1"), array("W_2"), array("W_3"), array("D")
_HALF = array("dy/dx", r"\frac{\partial y}{\partial x}")
_GATED = array("dFFN/du", r"\frac{\partial \mathrm{FFN}}{\partial u}")
q, w, t, t_slope = entry("q"), entry("w"), entry("t(w)"), entry("t'(w)")
z_I, z_J, z_sum = entry("z_I"), entry("z_J"), entry("z_(I+J)", "z_{I+J}")


def _exact_half(rng: Rng) -> Values:
    """A small pre-norm ReLU half-layer without eps."""
    width, units = 5, 9
    first, second, point = (
        rng.normal(0, 1, (units, width)),
        rng.normal(0, 1, (width, units)),
        rng.normal(0, 2, (width, 1)),
    )
    normed = layer_norm(point)
    return {
        **{d: width, s: float(np.std(point)), I: np.eye(width), one: np.ones((width, 1)), u: normed},
        **{W_1: first, W_2: second, D: np.diag((first @ normed > 0)[:, 0].astype(float))},
        _HALF: column_jacobian(lambda x: x + second @ relu(first @ layer_norm(x)), point),
    }


def _one_sign(rng: Rng) -> Values:
    """The mean over 1 and -1 of 1/(z - them)."""
    height = float(rng.uniform(1.2, 3))
    return {z_I: height, q: (1 / (height - 1) + 1 / (height + 1)) / 2}


def _resolvent(matrix: Array, height: float) -> float:
    """Mean of 1/(z - singular value) over both signs."""
    return float(np.mean(height / (height**2 - np.linalg.svd(matrix, compute_uv=False) ** 2)))


def _wide_half(rng: Rng, *, shortcut: bool) -> Values:
    """J of a wide ReLU half-layer, I + J and their resolvents beyond the edge."""
    units, std_1, std_2, std = 2 * WIDE, 0.05, 0.02, 0.4
    first, second = rng.normal(0, std_1, (units, WIDE)), rng.normal(0, std_2, (WIDE, units))
    slopes = rng.normal(0, 1, (units, 1)) > 0
    J = second @ (slopes * first) / std
    whole = np.eye(WIDE) + J if shortcut else J
    height = 1.2 * opnorm(whole)
    found = _resolvent(whole, height)
    strength = std_1 * std_2 * WIDE / std
    return {
        **{d: WIDE, d_ffn: units, sigma_1: std_1, sigma_2: std_2, s: std, _HALF: whole},
        **{q: found, w: (strength * found) ** 2, (z_sum if shortcut else z_J): height},
    }


def _branch(rng: Rng) -> Values:
    return _wide_half(rng, shortcut=False)


def _summed(rng: Rng) -> Values:
    return _wide_half(rng, shortcut=True)


@register_derivation
def half_layer_sharp_relu() -> Derivation:
    """The norm of a ReLU half-layer's Jacobian."""
    statement = find("half-layer-sharp-relu")
    half = d_ffn / (2 * d)
    identity = (1 + _sp.sqrt(1 + 4 * q**2)) / (2 * q)
    exact = line(
        _HALF,
        "=",
        I + W_2 * D * W_1 * (I - one * Transposed(one) / d - u * Transposed(u) / d) / s,
        "chain rule",
        "The norm's projector takes u out of W_1, so that D, which W_1 u decides, does not depend on what is left.",
        source=OWN,
        sample=_exact_half,
    )
    rotated = line(
        z_I,
        "=",
        identity,
        "root of q = z/(z^2 - 1)",
        "q is the mean of 1/(z - singular value) over both signs, of the identity or any rotation of it.",
        source=OWN,
        sample=_one_sign,
        proof=lambda: identity / (identity**2 - 1) - q,
    )
    share = line(
        w,
        "=",
        (sigma_1 * sigma_2 * d * q / s) ** 2,
        "definition",
        "A closed unit does nothing; of open ones there are d_ffn/2.",
        source=OWN,
        sample=_branch,
    )
    product = line(
        z_J,
        "~=",
        (1 + half * w / (1 - w)) / q,
        "free multiplicative convolution",
        "In general t(w) = d_ffn/d E[w F'^2/(1 - w F'^2)] in place of the second term.",
        source=FREE,
        sample=_branch,
        tolerance=0.02,
        accuracy=f"within 2 % at width {WIDE} and z a fifth beyond the edge",
    )
    added = line(
        z_sum,
        "~=",
        identity + (1 + half * w / (1 - w)) / q - 1 / q,
        "free additive convolution",
        "Independent normal weights turn I at random, which changes no singular value: z - 1/q of the two add.",
        source=SUM,
        sample=_summed,
        tolerance=0.02,
        accuracy=f"within 2 % at width {WIDE} and z a fifth beyond the edge",
    )
    conclusion = line(
        Norm(_HALF),
        "~=",
        statement.expression,
        "edge and Tracy-Widom offset",
        "The edge is the least z over q. There d singular values and their negatives are 2d points, the mean of the "
        "largest lies 1.2065 (2d)^(-2/3) (z''(q)/2)^(1/3) below it.",
        source=Source(key="johnstone2001largest", label="the offset's law; its scale by the curvature"),
        sample=_summed,
        tolerance=0.08,
        accuracy=ONE_DRAW,
    )
    return Derivation(
        name="half-layer-sharp-relu",
        title="A feed-forward half-layer at initialisation, the norm itself",
        steps=(exact, rotated, share, product, added, conclusion),
        statement="half-layer-sharp-relu",
        assumptions=statement.assumptions,
    )


_inner, _outer = (
    array("diag(F'(z_1) z_3)", r"\mathrm{diag}(F'(z_1) z_3)"),
    array("diag(F(z_1))", r"\mathrm{diag}(F(z_1))"),
)
_row = entry("mean r_i^2", r"\overline{r_i^2}")
_slope_i, _value_i = (
    entry("F'(z_1i) z_3i", r"F'(z_{1i}) z_{3i}", signed=True),
    entry("F(z_1i)", r"F(z_{1i})", signed=True),
)


def _exact_gated(rng: Rng) -> Values:
    """A small gated layer, ReLU for F."""
    width, units = 5, 12
    first, third = rng.normal(0, 1, (units, width)), rng.normal(0, 1, (units, width))
    second, point = rng.normal(0, 1, (width, units)), rng.normal(0, 1, (width, 1))
    z_1, z_3 = first @ point, third @ point
    return {
        **{W_1: first, W_2: second, W_3: third, _outer: np.diag(relu(z_1)[:, 0])},
        _inner: np.diag(((z_1 > 0) * z_3)[:, 0]),
        _GATED: column_jacobian(lambda x: second @ (relu(first @ x) * (third @ x)), point),
    }


def _one_row(rng: Rng) -> Values:
    """A long row of the sum at given slope and value."""
    std_1, std_3, slope, value = 0.3, 0.5, float(rng.normal()), float(rng.normal())
    row = slope * rng.normal(0, std_1, 4096) + value * rng.normal(0, std_3, 4096)
    return {sigma_1: std_1, sigma_3: std_3, _slope_i: slope, _value_i: value, _row: float(np.mean(row**2))}


def _wide_gated(rng: Rng) -> Values:
    """A wide ReGLU half-layer."""
    units, std_1, std_2, std_3, std = 2 * WIDE, 0.05, 0.04, 0.06, 0.4
    first, third = rng.normal(0, std_1, (units, WIDE)), rng.normal(0, std_3, (units, WIDE))
    point = layer_norm(rng.normal(0, 1, (WIDE, 1)))
    z_1, z_3 = first @ point, third @ point
    projector = np.eye(WIDE) - point @ point.T / WIDE
    J = rng.normal(0, std_2, (WIDE, units)) @ ((z_1 > 0) * z_3 * first + relu(z_1) * third) @ projector / std
    return {
        **{d: WIDE, d_ffn: units, sigma_1: std_1, sigma_2: std_2, sigma_3: std_3, s: std},
        _HALF: np.eye(WIDE) + J,
    }


@register_derivation
def half_layer_sharp_gated_relu() -> Derivation:
    """The norm of a ReGLU half-layer's Jacobian."""
    statement = find("half-layer-sharp-gated-relu")
    exact = line(
        _GATED,
        "=",
        W_2 * (_inner * W_1 + _outer * W_3),
        "product rule",
        "z_1 = W_1 u and z_3 = W_3 u.",
        source=OWN,
        sample=_exact_gated,
    )
    row = line(
        _row,
        "~=",
        _slope_i**2 * sigma_1**2 + _value_i**2 * sigma_3**2,
        "variance of a sum",
        "Off u, which the norm's projector takes out, a row r_i of the bracket is normal at given z_1 and z_3: the "
        "layer is a plain one with slopes D_i, D_i^2 = d times this.",
        source=OWN,
        sample=_one_row,
        tolerance=0.1,
        accuracy="within 10 % for one row of 4096 entries, whose mean square varies by 2 %",
    )
    conclusion = line(
        Norm(_HALF),
        "~=",
        statement.expression,
        "edge and Tracy-Widom offset",
        "As in half-layer-sharp-relu, with D at the quantiles of its law: no slope so rare that no unit has it.",
        source=SUM,
        sample=_wide_gated,
        tolerance=0.12,
        accuracy=f"within 12 % for one draw at width {WIDE}, whose norm varies by 3 to 4 %",
    )
    return Derivation(
        name="half-layer-sharp-gated-relu",
        title="A gated half-layer at initialisation, the norm itself",
        steps=(exact, row, conclusion),
        statement="half-layer-sharp-gated-relu",
        assumptions=statement.assumptions,
    )


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
    """W_2 D W_1 with the column along u, one unit steep."""
    from scipy.optimize import brentq  # pyright: ignore[reportMissingTypeStubs]

    width = 384
    pre = _drawn(rng, width, width, 4.0)
    squares = 4 * pre**2

    def sums(x: float) -> tuple[float, float]:
        others = x * squares[1:] / (1 - x * squares[1:])
        along = x * squares * pre**2 / (1 - x * squares)
        return float(np.sum(others)) / width, float(np.sum(along)) / width

    end = 1 / squares[0]
    root: Any = brentq(lambda x: 1 + sums(x)[0] - sums(x)[1], 1e-9 * end, (1 - 1e-12) * end, xtol=1e-18)
    first = np.concatenate([rng.normal(0, width**-0.5, (len(pre), width - 1)), pre[:, None] * width**-0.5], axis=1)
    J = rng.normal(0, width**-0.5, (width, len(pre))) @ (2 * pre[:, None] * first)
    return {w: float(root), t: sums(root)[0], _seen: sums(root)[1], _outlier: opnorm(J)}


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
    """Mean norm of 60 squared-ReLU layers."""
    width, units, std_1, std_2 = 96, 192, 0.09, 0.05
    norms: list[float] = []
    for _ in range(60):
        first, point = rng.normal(0, std_1, (units, width)), layer_norm(rng.normal(0, 1, (width, 1)))
        norms.append(opnorm(rng.normal(0, std_2, (width, units)) @ (2 * relu(first @ point) * first)))
    return {d: width, d_ffn: units, sigma_1: std_1, sigma_2: std_2, _mean_norm: float(np.mean(norms))}


@register_derivation
def ffn_sharp_relu_squared() -> Derivation:
    """The norm of a squared-ReLU sub-layer's Jacobian."""
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
        tolerance=0.15,
        accuracy="within 15 % for one draw at width 384, which varies by 3 to 4 %",
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
        tolerance=0.1,
        accuracy="within 10 % for the mean of 60 draws at width 96, known to 2 %",
    )
    return Derivation(
        name="ffn-sharp-relu-squared",
        title="Squared ReLU at initialisation, the norm itself",
        steps=(along, condition, outlier, spread, conclusion),
        statement="ffn-sharp-relu-squared",
        assumptions=statement.assumptions,
    )
