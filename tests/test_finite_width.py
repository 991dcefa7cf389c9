"""What a finite width adds to the growth: moments of rows and of normalised heads, scatter, norms that fluctuate."""

from __future__ import annotations

import math
import tracemalloc
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from helpers.growth_networks import UNIT, measured, narrow
from helpers.weights import architecture

from empirics.model import ACTIVATIONS
from theory.growth import gradient_growth
from theory.logits import attention_logits, norm_gain
from theory.scatter import hidden_moments, scatter
from theory.softmax_moments import capped_moments, exact_moments, square_scatter


@pytest.mark.parametrize("cap", [0.5, 2.0])
def test_capped_moments_against_sampling(cap: float) -> None:
    """The moments of n soft-capped logits to four standard errors; a square with the mean slope is not."""
    generator, draws, variance = np.random.default_rng(1), 40_000, 9.0
    for n in (2, 8, 64):
        z = math.sqrt(variance) * generator.standard_normal((draws, n))
        p, slope = np.exp(cap * np.tanh(z / cap)), 1 / np.cosh(z / cap) ** 2
        p /= p.sum(1, keepdims=True)
        two, rest = np.sum(p**2, axis=1), 1 - 1 / n
        squares = np.sum(slope**2 * p**2 * (1 - 2 * p + two[:, None]), axis=1) * n / rest
        firsts = np.sum(slope * p * (1 - p), axis=1) / rest
        exact = exact_moments(np.array([float(n)]), variance, cap)
        for drawn, integral in ((squares, exact.square), (firsts, exact.slope), ((n * two - 1) / rest, exact.gain)):
            assert abs(drawn.mean() - integral[0]) <= 4 * drawn.std() / math.sqrt(draws)
        without = exact_moments(np.array([float(n)]), capped_moments(variance, cap).variance)
        assert abs(squares.mean() - without.square[0] * slope.mean() ** 2) > 4 * squares.std() / math.sqrt(draws)
        assert capped_moments(variance, cap).at(np.array([float(n)])).slope[0] == pytest.approx(
            exact.slope[0] / without.slope[0] * math.sqrt(variance / capped_moments(variance, cap).variance), rel=0.01
        )  # the table's stated 1 %


@pytest.mark.parametrize(("variance", "cap"), [(4.0, 2.0), (16.0, 1.0)])
def test_two_capped_rows_share_the_slopes_where_the_softmax_weighs(variance: float, cap: float) -> None:
    """Covariance of two rows whose logits correlate, against the square of E[S D] and of E[l'] E[S]."""
    generator, draws, n, share = np.random.default_rng(2), 400_000, 16, 0.2
    common, *own = (generator.standard_normal((draws, n)) for _ in range(3))
    rows = [math.sqrt(variance) * (math.sqrt(share) * common + math.sqrt(1 - share) * z) for z in own]
    weights = [np.exp(cap * np.tanh(z / cap)) for z in rows]
    first, second = (w / w.sum(1, keepdims=True) for w in weights)
    products = np.sum(first * second, axis=1) - 1 / n
    found, error = products.mean(), products.std() / math.sqrt(draws)
    of_one = exact_moments(np.array([float(n)]), variance, cap).slope[0]
    slope = 1 / np.cosh(rows[0] / cap) ** 2
    apart = exact_moments(np.array([float(n)]), capped_moments(variance, cap).variance).slope[0] * slope.mean()
    predicted, without = (share * variance * x**2 * (n - 1) / n**2 for x in (of_one, apart))
    # The third order in the covariance is a share^2 of the first, in odd powers alone as the cap's series has them.
    assert abs(found - predicted) <= 4 * error + share**2 * predicted
    assert abs(found - without) > 4 * error + share**2 * predicted


def test_a_cap_far_above_the_logits_changes_nothing() -> None:
    capped = capped_moments(1.0, 1e4)
    assert (capped.variance, capped.steepness) == pytest.approx((1, 1), abs=1e-6)
    np.testing.assert_allclose([capped.gain, capped.slope, capped.square], 1, atol=1e-6)
    assert capped_moments(0.0, 1.0).variance == 0


def test_the_scatter_of_a_row_s_squares() -> None:
    generator, draws = np.random.default_rng(0), 100_000
    for n, variance in ((4, 1.0), (32, 4.0)):
        p = np.exp(math.sqrt(variance) * generator.standard_normal((draws, n)))
        squares = np.sum(p**2, axis=1) / p.sum(1) ** 2
        relative = squares / squares.mean()
        error = np.std((relative - 1) ** 2) / math.sqrt(draws)
        assert abs(relative.var() - square_scatter(n, variance)) <= 4 * error
    assert square_scatter(1, 4.0) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    ("variance", "cap"),
    [(1.2e5, 0.02), (3e4, 50.0), (1e6, 8.0), (1e8, 1e4), (1e300, 1e-3), (1e-300, 1.0), (9.0, 1e-200)],
)
def test_capped_moments_of_any_size_are_cheap(variance: float, cap: float) -> None:
    tracemalloc.start()
    capped = capped_moments(variance, cap)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 256 * 2**20
    assert np.all(np.isfinite([*capped.gain, *capped.slope, *capped.square, capped.variance, capped.steepness]))
    if cap < 1e-2 * math.sqrt(variance) and capped.variance > 0:
        # Saturated: the slope is a peak in z of height 1 and of integral 2 c, its square's is 4 c/3.
        peak_of_square = 4 * cap / 3 / math.sqrt(2 * math.pi * variance)
        assert capped.steepness == pytest.approx(variance / capped.variance * peak_of_square, rel=1e-3)


@pytest.mark.parametrize(
    ("norm", "kind", "groups"),
    [("layernorm", "head", 4), ("layernorm", "full", 4), ("rmsnorm", "head", 4), ("layernorm", "full", 1)],
)
def test_logits_and_gradients_of_normalised_heads(norm: Any, kind: Any, groups: int) -> None:
    """Four heads of 8, random queries and keys: a logit's variance, and the squares of its gradients by each."""
    heads, size, draws = 4, 8, 200_000
    a = architecture(n_heads=heads, n_kv_heads=groups, d_head=size, qk_norm=kind, norm=norm)
    generator = np.random.default_rng(0)
    shapes = [(draws, 1 if kind == "head" else n, size) for n in (heads, groups)]

    def normed(x: Any) -> tuple[Any, Any]:
        centred = x - x.mean((1, 2), keepdims=True) if norm == "layernorm" else x
        scale = np.sqrt(np.mean(centred**2, axis=(1, 2), keepdims=True))
        return centred / scale, scale

    sides = [normed(generator.standard_normal(shape)) for shape in shapes]
    logit = np.sum(sides[0][0][:, 0] * sides[1][0][:, 0], axis=1) / math.sqrt(size)
    found = attention_logits(a)

    def room(drawn: Any) -> float:
        # 'full': the trace of one head's block, of order d_h/(w_q w_k) beyond what is carried
        over = shapes[0][1] * shapes[1][1]
        return 4 * drawn.std() / math.sqrt(draws) + (2 / over / size if kind == "full" else 0)

    assert abs(np.mean(logit**2) - found.variance) <= room(logit**2)
    for side, gain in enumerate((found.queries, found.keys)):
        (own, scale), (other, _) = sides[side], sides[1 - side]
        whole = np.zeros(shapes[side])
        whole[:, 0] = other[:, 0] / math.sqrt(size)
        if norm == "layernorm":
            whole = whole - whole.mean((1, 2), keepdims=True)
        gradient = (whole - own * np.mean(whole * own, axis=(1, 2), keepdims=True)) / scale
        drawn = np.sum(gradient**2, axis=(1, 2))
        assert abs(drawn.mean() - found.variance * gain) <= room(drawn)
        assert gain == norm_gain(norm, shapes[side][1] * size)
        if groups < heads:  # one width for both is not enough
            swapped = (found.keys, found.queries)[side]
            assert abs(drawn.mean() - found.variance * swapped) > room(drawn)


@pytest.mark.parametrize(("activation", "gated"), [("relu", False), ("identity", True), ("silu", False)])
def test_the_scatter_of_an_update(activation: Any, gated: bool) -> None:
    """Of |x + f(u)|^2 for a fixed x and normalised u, over weights; without the units' kurtosis it is too small."""
    d, m, draws = 64, 32, 4000
    a = architecture(
        d_model=d, d_ffn=m, activation=activation, gated=gated, init=UNIT, n_heads=4, n_kv_heads=4, d_head=16
    )
    generator = np.random.default_rng(0)
    x = math.sqrt(d) * (x := generator.standard_normal(d)) / np.linalg.norm(x)
    pre = generator.standard_normal((draws, m))
    hidden = np.asarray(ACTIVATIONS[activation](_tensor(pre))) * (generator.standard_normal((draws, m)) if gated else 1)
    hidden /= math.sqrt(np.mean(hidden**2))
    f = np.linalg.norm(hidden, axis=1, keepdims=True) / math.sqrt(m) * generator.standard_normal((draws, d))
    squares = np.mean((x + f) ** 2, axis=1)
    found = float(np.var(squares) / np.mean(squares) ** 2)
    half = np.array(0.5)
    predicted = float(scatter(a, np.array(0.0), half))
    # The variance of a variance: 8 kurtosis-like draws of 4000 leave 5 %; products of f's two fluctuations 1/m.
    assert found == pytest.approx(predicted, rel=0.15)
    assert found > 1.15 * float(scatter(replace(a, d_ffn=10**9), np.array(0.0), half))
    assert hidden_moments("identity", False, 1.0).kurtosis == pytest.approx(3)


def _tensor(values: Any) -> Any:
    import torch

    return torch.from_numpy(values)


def test_a_post_norm_divides_by_scales_that_fluctuate() -> None:
    """Branches of nothing: the first norm's E[1/s^2] is all that is left, d/(d - 3) or d/(d - 2) of the square."""
    for norm, lost in (("layernorm", 3), ("rmsnorm", 2)):
        a = narrow(n_layers=2, block="post-ln", norm=norm, eps=0.0, residual_multiplier=1e-6)
        predicted = gradient_growth(a, 16).value
        assert predicted == pytest.approx(math.sqrt(32 / (32 - lost)), rel=1e-4)
        found, error = measured(a, 16, 12)
        assert abs(math.log(predicted) - found) <= 3 * error + 0.002
        assert found > 0.02
        # The last norm takes a direction or two out, and the softmax's tilt, which is 1/d for logits of variance 1.
        bare = replace(a, final_norm=False)
        predicted *= math.sqrt((33 - lost) / 32 / (1 + 1 / 32))
        assert gradient_growth(bare, 16).value == pytest.approx(predicted, rel=1e-3)
        found, error = measured(bare, 16, 12)
        assert abs(math.log(predicted) - found) <= 3 * error + 0.002
