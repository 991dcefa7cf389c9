"""Norms of feed-forward half-layers and of squared ReLU at initialisation: edges, outliers, their finite width."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import sympy as sp  # pyright: ignore[reportMissingTypeStubs]

from theory.architecture import Activation
from theory.derivation import Derivation, Sampler, Step, line, register_derivation
from theory.derivations_expressions import SumOver, Transposed, Values, array, entry
from theory.derivations_feedforward_edge import (
    DRAWN,
    MEASURED,
    OFFSET,
    PLAIN,
    TAILED,
    layer_squares,
    layers,
    mean_half,
    with_family,
)
from theory.derivations_numeric import Array, Rng, column_jacobian, layer_norm, opnorm, relu
from theory.derivations_offsets import NEXT_ORDER, UNITS, WIDTH, hidden_sum, least, mean_norm, slopes
from theory.derivations_squared import squared_relu
from theory.random_matrix import TRACY_WIDOM_MEAN
from theory.residual_edges import residual_edge
from theory.sources import Source
from theory.statements import find
from theory.symbols import symbol

_sp: Any = sp

FREE = Source(key="pennington2017resurrecting", label="free multiplicative convolution")
SUM = Source(key="haagerup2000brown", label="sums of R-diagonal elements")
OWN = Source(key="spikecheck", label="calculus")
WIDE = 192

d, s = symbol("d"), symbol("s")
sigma_1, sigma_2, sigma_3 = symbol("sigma_1"), symbol("sigma_2"), symbol("sigma_3")
I = array("I")  # noqa: E741  the identity's letter
one, u = array("ones", r"\mathbf{1}"), array("u")
W_1, W_2, W_3, D = array("W_1"), array("W_2"), array("W_3"), array("D")
_HALF = array("dy/dx", r"\frac{\partial y}{\partial x}")
_GATED = array("dFFN/du", r"\frac{\partial \mathrm{FFN}}{\partial u}")
q, w, t = entry("q"), entry("w"), entry("t(w)")
i, D_i = entry("i"), entry("D_i")
edge, above, below = (entry(f"z_{name}", f"z_{{{name}}}") for name in ("edge", "+", "-"))
bend, step_ = entry("z''"), entry("h")
_fixed = entry("E|I + W_2 D W_1/s|", r"\mathbb{E} \| I + W_2 D W_1 / s \|")
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


def _wide(rng: Rng, *, activation: Activation, gated: bool, shortcut: bool) -> Values:
    """J of a wide layer whose slopes are a layer's, I + J and their resolvents a fifth beyond the edge."""
    squares, weights = layer_squares(activation, gated=gated)
    D_ = np.repeat(slopes(squares, weights), WIDE // WIDTH)  # the same law at three times the width
    strength = 0.7
    J = strength / WIDE * (rng.normal(0, 1, (WIDE, D_.size)) * D_) @ rng.normal(0, 1, (D_.size, WIDE))
    whole = np.eye(WIDE) + J if shortcut else J
    height = 1.2 * opnorm(whole)
    found = _resolvent(whole, height)
    return {
        **_scales(WIDE, strength, gated=gated),
        **{q: found, w: (strength * found) ** 2, i: [{D_i: float(one)} for one in D_]},
        **{t: hidden_sum((strength * found) ** 2, D_, WIDE), (z_sum if shortcut else z_J): height},
    }


def _scales(width: int, strength: float, *, gated: bool) -> Values:
    """Standard deviations that make |J| of this size; those of a gated layer's inputs are in its slopes."""
    first, second, std = 0.05, 0.02, 0.4
    first = strength * std / (second * width) if not gated else first
    return {d: width, sigma_1: first, sigma_2: strength * std / width**0.5 if gated else second, s: std}


def _edge_of(rng: Rng, *, activation: Activation, gated: bool) -> Values:
    """The edge of a half-layer of fixed slopes, its bend, and the mean norm over draws of its weights."""
    squares, weights = layer_squares(activation, gated=gated)
    D_ = slopes(squares, weights)
    strength = 0.7
    end = 1 / (strength * float(np.max(D_)))

    def height(resolvent: float) -> float:
        inside = hidden_sum((strength * resolvent) ** 2, D_)
        return (float(np.sqrt(1 + 4 * resolvent**2)) - 1) / (2 * resolvent) + (1 + inside) / resolvent

    found = least(height, 1e-3 * end, (1 - 1e-9) * end)
    known = residual_edge(squares, weights, UNITS / WIDTH, strength)
    return {
        **_scales(WIDTH, strength, gated=gated),
        **{q: found.place, w: (strength * found.place) ** 2, t: hidden_sum((strength * found.place) ** 2, D_)},
        **{edge: known.limit, bend: known.curvature, step_: found.step, above: found.above, below: found.below},
        _fixed: mean_norm(rng, D_, strength, shortcut=True),
    }


def _chain(activation: Activation, *, gated: bool) -> Derivation:
    statement = find(f"half-layer-sharp-{'gated-' if gated else ''}{activation}")
    branch: Sampler = partial(_wide, activation=activation, gated=gated, shortcut=False)
    summed: Sampler = partial(_wide, activation=activation, gated=gated, shortcut=True)
    at_edge: Sampler = partial(_edge_of, activation=activation, gated=gated)
    identity = (1 + _sp.sqrt(1 + 4 * q**2)) / (2 * q)
    scale = sigma_2 * _sp.sqrt(d) / s if gated else sigma_1 * sigma_2 * d / s
    beyond = f"within 3 % at width {WIDE} and z a fifth beyond the edge"
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
    share = line(w, "=", (scale * q) ** 2, "definition", "q in the branch's scale.", source=OWN, sample=branch)
    inside = line(
        t,
        "=",
        SumOver(w * D_i**2 / (1 - w * D_i**2), i) / d,
        "definition",
        "Over hidden units i: d_ffn/d E[w D^2/(1 - w D^2)]. A ReLU's closed unit does nothing, of open ones there are "
        "d_ffn/2.",
        source=OWN,
        sample=branch,
    )
    product = line(
        z_J,
        "~=",
        (1 + t) / q,
        "free multiplicative convolution",
        "Independent normal weights on both sides of the slopes.",
        source=FREE,
        sample=branch,
        tolerance=0.03,
        accuracy=beyond,
    )
    added = line(
        z_sum,
        "~=",
        identity + (1 + t) / q - 1 / q,
        "free additive convolution",
        "Independent normal weights turn I at random, which changes no singular value: z - 1/q of the two add.",
        source=SUM,
        sample=summed,
        tolerance=0.03,
        accuracy=beyond,
    )
    at_least = line(
        edge,
        "=",
        identity + (1 + t) / q - 1 / q,
        "edge of the spectrum",
        "The least z over q: below it there is no such mean.",
        source=OWN,
        sample=at_edge,
    )
    curve = line(
        bend,
        "=",
        (above - 2 * edge + below) / step_**2,
        "second difference",
        "A step h to both sides of the edge's q.",
        source=OWN,
        sample=at_edge,
        tolerance=1e-4,
        accuracy="a finite difference: h is a thousandth of q's distance to its ends",
    )
    squared = activation == "relu-squared"
    room = 0.06 if gated and squared else 0.045 if gated or squared else 0.02
    offset = line(
        _fixed,
        "~=",
        edge + TRACY_WIDOM_MEAN * (2 * d) ** _sp.Rational(-2, 3) * (bend / 2) ** _sp.Rational(1, 3),
        "Tracy-Widom offset",
        "d singular values and their negatives are 2d points; near a square-root edge the largest lies so much below "
        "it on average. The law's mean is -1.2065.",
        source=OFFSET,
        sample=at_edge,
        tolerance=room,
        accuracy=f"within {100 * room:g} % {NEXT_ORDER}",
    )
    tailed = gated or squared
    tolerance = 0.025 if tailed else 0.03
    conclusion = line(
        mean_half,
        "~=",
        statement.expression,
        "substitution in the offset",
        "The slopes are at the quantiles of their law: none so rare that no unit has it.",
        source=SUM,
        sample=partial(layers, activation=activation, gated=gated, shortcut=True),
        tolerance=tolerance,
        accuracy=f"within {100 * tolerance:g} % for the mean of {TAILED if tailed else DRAWN} draws at width "
        f"{MEASURED}, known to {0.4 if tailed else 0.5:g} %",
    )
    start = _gated_start() if gated else (_plain_start(),)
    return Derivation(
        name=f"half-layer-sharp-{'gated-' if gated else ''}relu",
        title=f"A {'gated' if gated else 'feed-forward'} half-layer at initialisation, the norm itself",
        steps=(*start, rotated, share, inside, product, added, at_least, curve, offset, conclusion),
        statement=statement.name,
        assumptions=statement.assumptions,
    )


def _plain_start() -> Step:
    return line(
        _HALF,
        "=",
        I + W_2 * D * W_1 * (I - one * Transposed(one) / d - u * Transposed(u) / d) / s,
        "chain rule",
        "The norm's projector takes u out of W_1, so that D, which W_1 u decides, does not depend on what is left. "
        "Sampled with ReLU.",
        source=OWN,
        sample=_exact_half,
    )


@register_derivation
def half_layer_sharp_relu() -> Derivation:
    """The norm of a plain half-layer's Jacobian."""
    return with_family([_chain(activation, gated=False) for activation in (*PLAIN, "relu-squared")])


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


def _gated_start() -> tuple[Step, Step]:
    exact = line(
        _GATED,
        "=",
        W_2 * (_inner * W_1 + _outer * W_3),
        "product rule",
        "z_1 = W_1 u and z_3 = W_3 u. Sampled with ReLU.",
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
    return exact, row


@register_derivation
def half_layer_sharp_gated_relu() -> Derivation:
    """The norm of a gated half-layer's Jacobian."""
    return with_family([_chain(activation, gated=True) for activation in (*PLAIN, "relu-squared")])


@register_derivation
def ffn_sharp_relu_squared() -> Derivation:
    """The norm of a squared-ReLU sub-layer's Jacobian."""
    return squared_relu()
