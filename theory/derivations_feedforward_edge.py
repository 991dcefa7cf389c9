"""The feed-forward sub-layer's norm at initialisation: the edge of a free product, and its offset at finite width."""

from __future__ import annotations

from functools import lru_cache, partial
from typing import Any

import numpy as np
import sympy as sp  # pyright: ignore[reportMissingTypeStubs]

from theory.activations import activation_function, activation_slope
from theory.architecture import Activation
from theory.derivation import Derivation, Sampler, Step, line, register_derivation
from theory.derivations_expressions import SumOver, Values, array, entry
from theory.derivations_numeric import ACTIVATIONS, Array, Rng, column_jacobian, layer_norm, opnorm
from theory.derivations_offsets import (
    NEXT_ORDER,
    UNITS,
    WIDTH,
    hidden_sum,
    least,
    mean_norm,
    slopes,
)
from theory.random_matrix import TRACY_WIDOM_MEAN, gated_squares, plain_squares, product_edge
from theory.sources import Source
from theory.statements import find
from theory.symbols import symbol

_sp: Any = sp

FREE = Source(key="pennington2017resurrecting", label="free multiplicative convolution")
OFFSET = Source(key="johnstone2001largest", label="the offset's law; its scale by the curvature")
OWN = Source(key="spikecheck", label="calculus")
MEASURED, DRAWN, TAILED = 96, 48, 128  # width and draws of the real layers; of those with long-tailed slopes

d, sigma_1, sigma_2 = symbol("d"), symbol("sigma_1"), symbol("sigma_2")
W_1, W_2, W_3, D = array("W_1"), array("W_2"), array("W_3"), array("D")
_JACOBIAN = array("dFFN/du", r"\frac{\partial \mathrm{FFN}}{\partial u}")
w, t = entry("w"), entry("t(w)")
i, D_i = entry("i"), entry("D_i")
edge, above, below = (entry(f"lambda_{name}", rf"\lambda_{{{name}}}") for name in ("edge", "+", "-"))
bend, step_ = entry("lambda''", r"\lambda''"), entry("h")
_fixed = entry("E|W_2 D W_1|", r"\mathbb{E} \| W_2 D W_1 \|")
_mean = entry("E|dFFN/du|", r"\mathbb{E} \| \frac{\partial \mathrm{FFN}}{\partial u} \|")


def _small(rng: Rng, *, activation: Activation) -> Values:
    """A small plain layer and its Jacobian; the forms with tanh and ReLU squared are as smooth as their slopes say."""
    first, second, point = rng.normal(0, 1, (9, 5)), rng.normal(0, 1, (5, 9)), rng.normal(0, 1, (5, 1))
    function = ACTIVATIONS.get(activation)
    if function is None:  # differences of a real function
        step = 1e-6

        def moved(sign: int) -> Array:
            return second @ activation_function(activation, first @ (point + sign * step * np.eye(5)))

        found = (moved(1) - moved(-1)) / (2 * step)
    else:
        found = column_jacobian(lambda x: second @ function(first @ x), point)
    slope = activation_slope(activation, (first @ point)[:, 0])
    return {W_1: first, W_2: second, D: np.diag(slope), _JACOBIAN: found}


def _gated_small(rng: Rng, *, activation: Activation) -> Values:
    first, third = rng.normal(0, 1, (2, 12, 5))
    second, point = rng.normal(0, 1, (5, 12)), rng.normal(0, 1, (5, 1))
    step = 1e-6

    def moved(sign: int) -> Array:
        x = point + sign * step * np.eye(5)
        return second @ (activation_function(activation, first @ x) * (third @ x))

    z_1, z_3 = (first @ point)[:, 0], (third @ point)[:, 0]
    return {
        **{W_1: first, W_2: second, W_3: third, _JACOBIAN: (moved(1) - moved(-1)) / (2 * step)},
        **{
            _inner: np.diag(activation_slope(activation, z_1) * z_3),
            _outer: np.diag(activation_function(activation, z_1)),
        },
    }


_inner = array("diag(F'(z_1) z_3)", r"\mathrm{diag}(F'(z_1) z_3)")
_outer = array("diag(F(z_1))", r"\mathrm{diag}(F(z_1))")


def layer_squares(activation: Activation, *, gated: bool) -> tuple[Array, Array]:
    """Squared slopes of UNITS units at pre-activations of variance 1, and their weights."""
    return gated_squares(activation, 1.0, 1.0, UNITS) if gated else plain_squares(activation, 1.0, UNITS)


def _edge(rng: Rng, *, activation: Activation, gated: bool) -> Values:
    """The edge of a layer of fixed slopes, its bend, and the mean norm over draws of its weights."""
    squares, weights = layer_squares(activation, gated=gated)
    D_ = slopes(squares, weights)
    known = product_edge(squares, weights, UNITS / WIDTH)
    end = 1 / float(np.max(D_)) ** 2

    def height(place: float) -> float:
        return (1 + hidden_sum(place, D_)) ** 2 / place

    found = least(height, 1e-6 * end, (1 - 1e-9) * end)

    def at(resolvent: float) -> float:
        """The height as a function of w/(1 + t), which is the resolvent."""
        from scipy.optimize import brentq  # pyright: ignore[reportMissingTypeStubs]

        near = found.place / 1.01, min(1.01 * found.place, (found.place + end) / 2)  # it rises with w there
        place: Any = brentq(lambda x: x / (1 + hidden_sum(x, D_)) - resolvent, *near, xtol=1e-16)
        return height(float(place))

    middle = found.place / (1 + hidden_sum(found.place, D_))
    h = 3e-4 * middle
    strength = 0.4
    return {
        **{d: WIDTH, w: found.place, t: hidden_sum(found.place, D_), i: [{D_i: float(one)} for one in D_]},
        **{edge: known.limit, bend: known.curvature, step_: h, above: at(middle + h), below: at(middle - h)},
        **{sigma_1: WIDTH**-0.5, sigma_2: 0.4 * WIDTH**-0.5, _fixed: mean_norm(rng, D_, strength, shortcut=False)},
    }


def edge_steps(sample: Sampler, *, tolerance: float, gated: bool) -> tuple[Step, ...]:
    """From the slopes to the mean norm: the edge is least, it bends so much, and the norm lies below it."""
    scale = sigma_2 * _sp.sqrt(d) if gated else sigma_1 * sigma_2 * d
    share = line(
        t,
        "=",
        SumOver(w * D_i**2 / (1 - w * D_i**2), i) / d,
        "definition",
        "Over hidden units i: d_ffn/d E[w D^2/(1 - w D^2)], for w below one over the largest D^2.",
        source=OWN,
        sample=sample,
    )
    return (
        share,
        line(
            edge,
            "=",
            (1 + t) ** 2 / w,
            "free multiplicative convolution",
            "The least height over w, at which a resolvent of |W_2 D W_1|^2 over its scale squared still exists.",
            source=FREE,
            sample=sample,
        ),
        line(
            bend,
            "=",
            (above - 2 * edge + below) / step_**2,
            "second difference",
            "In the resolvent w/(1 + t), a step h to both sides of the edge's.",
            source=OWN,
            sample=sample,
            tolerance=1e-4,
            accuracy="a finite difference: h is 3e-4 of the resolvent",
        ),
        line(
            _fixed,
            "~=",
            scale * _sp.sqrt(edge + TRACY_WIDOM_MEAN * d ** _sp.Rational(-2, 3) * (bend / 2) ** _sp.Rational(1, 3)),
            "Tracy-Widom offset",
            "Near a square-root edge the largest of d points lies so much below it on average, a mean of -1.2065.",
            source=OFFSET,
            sample=sample,
            tolerance=tolerance,
            accuracy=f"within {100 * tolerance:g} % {NEXT_ORDER}",
        ),
    )


def layers(rng: Rng, *, activation: Activation, gated: bool, shortcut: bool = False) -> Values:
    """Mean norm of real layers, or half-layers, at normalised tokens.

    Where slopes have long tails a norm varies by a tenth or more, most of it with the steepest units: the mean is then
    corrected by what a moment of their slopes is in these draws and on average (a control variate).
    """
    tailed = gated or activation == "relu-squared"
    # Half-layers of long-tailed slopes claim their target from 512 units on.
    width, units, std = MEASURED, (6 if tailed and shortcut else 2) * MEASURED, 0.8
    enter, leave = width**-0.5, units**-0.5
    norms, steep = list[float](), list[float]()
    for _ in range(TAILED if tailed else DRAWN):
        u = layer_norm(rng.normal(0, 1, (width, 1)))
        first, third = rng.normal(0, enter, (2, units, width))
        second = rng.normal(0, leave, (width, units))
        z_1, z_3 = first @ u, third @ u
        inner = activation_slope(activation, z_1) * first
        if gated:
            inner = inner * z_3 + activation_function(activation, z_1) * third
        J = second @ inner
        if shortcut:
            J = J - J @ u @ u.T / width
            J = np.eye(width) + (J - J.mean(axis=1, keepdims=True)) / std
        norms.append(opnorm(J))
        if tailed:
            steep.append(float(_steepness(activation, z_1[:, 0], z_3[:, 0], gated=gated)))
    mean = float(np.mean(norms))
    if tailed:
        slope = np.cov(norms, steep)[0, 1] / np.var(steep)
        mean -= slope * (float(np.mean(steep)) - _mean_steepness(activation, units, gated=gated))
    return {
        **{
            d: width,
            symbol("d_ffn"): units,
            sigma_1: enter,
            sigma_2: leave,
            symbol("sigma_3"): enter,
            symbol("s"): std,
        },
        mean_half if shortcut else _mean: mean,
    }


def _steepness(activation: Activation, z_1: Array, z_3: Array, *, gated: bool) -> Array:
    """(sum D^16)^(1/16) over a layer's units, along the last axis."""
    squares = activation_slope(activation, z_1) ** 2
    if gated:
        squares = squares * z_3**2 + activation_function(activation, z_1) ** 2
    return np.sum(squares**8, axis=-1) ** (1 / 16)


@lru_cache(maxsize=32)
def _mean_steepness(activation: Activation, units: int, *, gated: bool) -> float:
    """Its mean over normal pre-activations, known to two thousandths."""
    z_1, z_3 = np.random.default_rng(0).normal(0, 1, (2, 8_000, units))
    return float(np.mean(_steepness(activation, z_1, z_3, gated=gated)))


mean_half = entry("E|dy/dx|", r"\mathbb{E} \| \frac{\partial y}{\partial x} \|")


def _chain(activation: Activation, *, gated: bool) -> Derivation:
    prefix = "ffn-sharp-gated-" if gated else "ffn-sharp-"
    statement = find(prefix + activation)
    sample: Sampler = partial(_edge, activation=activation, gated=gated)
    smooth: dict[str, Any] = {"tolerance": 1e-7, "accuracy": "the left side is a finite difference"}
    if gated:
        exact = line(
            _JACOBIAN,
            "=",
            W_2 * (_inner * W_1 + _outer * W_3),
            "product rule",
            "Given z_1 = W_1 u and z_3 = W_3 u, a row of the bracket is normal: the layer is a plain one with slopes "
            "D_i^2 = (F'(z_1i) z_3i)^2 sigma_1^2 d + F(z_1i)^2 sigma_3^2 d, put at their quantiles.",
            source=OWN,
            sample=partial(_gated_small, activation=activation),
            **smooth,
        )
    else:
        exact = line(
            _JACOBIAN,
            "=",
            W_2 * D * W_1,
            "chain rule",
            "D has the slopes F'(z), z = W_1 u, put at their quantiles. Off u the rows of W_1 are independent of it.",
            source=OWN,
            sample=partial(_small, activation=activation),
            **({} if activation in ACTIVATIONS else smooth),
        )
    tolerance = 0.025 if gated else 0.03
    conclusion = line(
        _mean,
        "~=",
        statement.expression,
        "substitution in the offset",
        "The statement's function is the root, at the slopes of this activation, of a layer of d_ffn units.",
        source=OWN,
        sample=partial(layers, activation=activation, gated=gated),
        tolerance=tolerance,
        accuracy=f"within {100 * tolerance:g} % for the mean of {TAILED if gated else DRAWN} draws at width "
        f"{MEASURED}, known to {0.3 if gated else 0.5:g} %",
    )
    return Derivation(
        name="ffn-sharp-gated-relu" if gated else "ffn-sharp-relu",
        title=f"The {'gated' if gated else 'plain'} feed-forward at initialisation, the norm itself",
        steps=(exact, *edge_steps(sample, tolerance=0.04 if gated else 0.022, gated=gated), conclusion),
        statement=statement.name,
        assumptions=statement.assumptions,
    )


def with_family(chains: list[Derivation]) -> Derivation:
    """The first chain, the others as its family."""
    from dataclasses import replace

    return replace(chains[0], family=tuple(chains[1:]))


PLAIN: tuple[Activation, ...] = ("relu", "identity", "gelu", "silu", "gelu-tanh")


@register_derivation
def ffn_sharp_relu() -> Derivation:
    """|W_2 D W_1| for bounded slopes."""
    return with_family([_chain(activation, gated=False) for activation in PLAIN])


@register_derivation
def ffn_sharp_gated_relu() -> Derivation:
    """The gated sub-layer's norm."""
    return with_family([_chain(activation, gated=True) for activation in PLAIN])
