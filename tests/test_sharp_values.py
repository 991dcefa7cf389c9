"""Every sharp value against its target, and the edges of random matrices that they are made of."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from helpers.catalogue import ALL, SHARP

from empirics import norm_samples
from theory.activations import lipschitz
from theory.architecture import Activation
from theory.random_matrix import TRACY_WIDOM_MEAN, feedforward_edge
from theory.statements import find

QUICK, MANY_SEEDS = 256, 255  # wider ones are in docs/accuracy.md
# Measured as their like are: slow ones.
ALIKE = {
    *(f"half-layer-sharp-gated-{name}" for name in ("gelu", "gelu-tanh", "relu", "relu-squared", "identity")),
    "half-layer-sharp-gelu-tanh", "attention-half-layer-simulated", "attention-uneven-sharp",
    "attention-full-half-layer-sharp", "ffn-sharp-gated-relu-squared", "experts-sharp-gated-silu",
}  # fmt: skip
WIDE = {"experts-sharp-relu": 65, "tied-simulated": 65}  # from which a row of it takes seconds
NARROW = " heads of 32"  # of the heads that do not fill the stream, quick ones


def takes_seconds(name: str, setting: norm_samples.Setting) -> bool:
    other = " heads of " in setting.label and (NARROW not in setting.label or name != "attention-sharp")
    wide = setting.values.get("d", 0) >= WIDE.get(name, math.inf) or setting.values.get("n_tokens", 0) > MANY_SEEDS
    return setting.seeds > MANY_SEEDS or name in ALIKE or other or wide


MEASURED = [
    (name, setting)
    for name in SHARP
    for setting in norm_samples.settings(ALL[name])
    if setting.inside(ALL[name]) and setting.values.get("d", setting.values.get("rows")) <= QUICK
]


@pytest.mark.parametrize("name", SHARP)
def test_sharp_is_measured_inside_its_domain_and_outside(name: str) -> None:
    inside = [setting.inside(ALL[name]) for setting in norm_samples.settings(ALL[name])]
    assert any(inside)
    assert not all(inside)


@pytest.mark.parametrize(
    ("name", "setting"),
    [pytest.param(n, s, id=f"{n}: {s.label}", marks=[pytest.mark.slow] * takes_seconds(n, s)) for n, s in MEASURED],
)
def test_sharp_is_within_its_target(name: str, setting: norm_samples.Setting) -> None:
    row = norm_samples.measure(ALL[name], setting)
    assert 3 * row["standard_error"] < row["target"] + 0.02, "too few seeds to judge"
    assert abs(row["predicted"] / row["measured"] - 1) <= row["target"]
    for wrong in (0.9, 1.1):  # control: a tenth off is seen
        assert abs(wrong * row["predicted"] / row["measured"] - 1) > row["target"]


def test_what_is_not_sampled_says_so() -> None:
    with pytest.raises(ValueError, match="nothing samples softmax_jacobian; write a function"):
        norm_samples.settings(find("softmax-jacobian"))


@pytest.mark.parametrize(("activation", "ratio", "edge"), [("relu", 4, 3.3302), ("identity", 4, 4.4037)])
def test_edges_as_documented(activation: str, ratio: float, edge: float) -> None:
    assert math.sqrt(feedforward_edge(activation, ratio, 0.4).limit) == pytest.approx(edge, abs=5e-5)  # type: ignore[arg-type]


@pytest.mark.parametrize("activation", ["gelu", "gelu-tanh", "silu"])
@pytest.mark.parametrize("ratio", [0.5, 1.0, 4.0])
def test_edge_is_finite_and_between_its_limits_for_every_variance(activation: Activation, ratio: float) -> None:
    """Small pre-activations make the slope 1/2, the identity's edge by half; large ones make it a step, ReLU's edge."""
    variances = (1e-6, 1e-3, 1e-2, 3e-2, 0.1, 0.4, 1.0, 4.0, 16.0)
    edges = [feedforward_edge(activation, ratio, variance).opnorm(256) for variance in variances]
    assert all(map(math.isfinite, edges))
    assert edges[0] == pytest.approx(feedforward_edge("identity", ratio, 1.0).opnorm(256) / 2, rel=0.01)
    assert edges[-1] == pytest.approx(feedforward_edge("relu", ratio, 1.0).opnorm(256), rel=0.05)
    assert max(edges) <= lipschitz(activation) * feedforward_edge("relu", ratio, 1.0).opnorm(256)
    # Monotone but for quadrature and the overshoot of the slope.
    assert all(later > 0.99 * earlier for earlier, later in pairwise(edges))


def test_linear_edge_of_a_square_is_the_closed_form() -> None:
    assert feedforward_edge("identity", 1.0, 1.0).limit == pytest.approx(27 / 4, rel=1e-9)


def test_edge_curvature_by_finite_differences() -> None:
    """lambda = (1+t)^2/w as a function of gam = (1+t)/lambda, for one atom of slope 1: t = c w/(1-w)."""
    for ratio in (1.0, 4.0):
        edge = feedforward_edge("identity", ratio, 1.0)

        def curve(w: np.ndarray, ratio: float = ratio) -> tuple[np.ndarray, np.ndarray]:
            f = 1 + ratio * w / (1 - w)
            return w / f, f**2 / w  # gam, lambda

        w = np.linspace(0.01, 0.9, 200_001)
        gam, height = curve(w)
        at = int(np.argmin(height))
        near = slice(at - 300, at + 301)
        fit = np.polynomial.Polynomial.fit(gam[near], height[near], 4)
        numeric = float(fit.deriv(2)(gam[at]))
        assert edge.limit == pytest.approx(height[at], rel=1e-8)
        assert edge.curvature == pytest.approx(numeric, rel=1e-3)  # a quartic fit over a small neighbourhood


def test_tracy_widom_mean() -> None:
    """Integrates the law again: F_1 = exp(-(1/2) int_s^inf q + (x-s) q^2), q the Hastings-McLeod solution."""
    from scipy.integrate import cumulative_trapezoid, solve_ivp
    from scipy.special import airy

    start, stop = 6.0, -8.0
    x = np.linspace(start, stop, 56_001)
    ai, ai_slope, _, _ = airy(start)
    solution = solve_ivp(
        lambda s, y: [y[1], s * y[0] + 2 * y[0] ** 3], (start, stop), [ai, ai_slope], t_eval=x,
        rtol=1e-12, atol=1e-18, method="DOP853",
    )  # fmt: skip
    q = solution.y[0]
    first = -cumulative_trapezoid(q, x, initial=0)
    squares = -cumulative_trapezoid(q**2, x, initial=0)
    second = -cumulative_trapezoid(squares, x, initial=0)
    law = np.exp(-(first + second) / 2)  # what lies beyond 6 is below 1e-5
    # E = stop + int (1 - F) over the range; F(stop) is negligible.
    mean = stop + float(np.trapezoid((1 - law)[::-1], x[::-1]))
    assert mean == pytest.approx(TRACY_WIDOM_MEAN, abs=1e-4)
