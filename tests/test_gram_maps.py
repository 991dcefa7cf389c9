"""What the growth recursion is made of: matrix algebra against dense products, maps against simulation."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from helpers.wide import Array, simulate_attention, simulate_feedforward
from hypothesis import given
from hypothesis import strategies as st

from empirics.model import ACTIVATIONS
from theory import growth_domain
from theory.architecture import method, preset
from theory.gram_maps import AttentionMap, FeedForwardMap, alibi_slopes, rotation_correlation, steepest_alibi_slope
from theory.grams import Blocks, Gram, causal
from theory.growth import gradient_growth
from theory.initialisation import Init
from theory.logits import norm_gain
from theory.softmax_moments import exact_moments, softmax_moments


def as_gram(dense: Array) -> Gram:
    """One block a token; the diagonal of `off`, which has no meaning there, is filled with nonsense."""
    off = dense.copy()
    np.fill_diagonal(off, 1e3 * np.arange(len(dense)))
    return Gram(np.diagonal(dense).copy(), off)


def cesaro(length: int) -> Array:
    return np.tril(np.ones((length, length))) / np.arange(1, length + 1)[:, None]


def random_gram(length: int, strength: float, seed: int = 0) -> Array:
    """A correlation matrix, `strength` of the way from none to random correlations."""
    x = np.random.default_rng(seed).standard_normal((length, length))
    gram = x @ x.T / np.sqrt(np.outer(np.sum(x**2, axis=1), np.sum(x**2, axis=1)))
    return (1 - strength) * np.eye(length) + strength * gram


# --- blocks -----------------------------------------------------------------------------------------------------


@given(length=st.integers(1, 40), seed=st.integers(0, 1000))
def test_single_blocks_are_dense_products(length: int, seed: int) -> None:
    """P A, A P, P A P' and P' A P, for any A. Sums of at most 1600 terms of order one: 1e-13 of the largest."""
    a = np.random.default_rng(seed).standard_normal((length, length))
    p, blocks, gram = cesaro(length), Blocks.of(length, exact=True), as_gram(a)
    averaging = causal(blocks)
    pairs = [
        (averaging.left(gram), p @ a),
        (averaging.right(gram), a @ p),
        (averaging.average(gram), p @ a @ p.T),
        (averaging.spread(gram), p.T @ a @ p),
        (gram.mT, a.T),
    ]
    # The nonsense on the diagonal of `off` (up to 1e3 T) cancels exactly in theory, and to its own rounding here.
    tolerance = 1e-13 * max(1.0, float(np.abs(a).max()))
    for computed, expected in pairs:
        np.testing.assert_allclose(computed.dense(), expected, rtol=0, atol=tolerance + 1e-16 * 1e3 * length * 40)
    assert blocks.trace(gram) == pytest.approx(np.trace(a), abs=1e-13 * length)


@pytest.mark.parametrize("length", [1, 5, 33])
def test_single_blocks_without_nonsense_are_exact_to_rounding(length: int) -> None:
    a, p, averaging = random_gram(length, 1.0), cesaro(length), causal(Blocks.of(length, exact=True))
    gram = Gram(np.diagonal(a).copy(), a.copy())
    for computed, expected in ((averaging.average(gram), p @ a @ p.T), (averaging.spread(gram), p.T @ a @ p)):
        np.testing.assert_allclose(computed.dense(), expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("length", [1, 24, 160, 161, 512, 2048])
def test_blocks_partition_the_positions(length: int) -> None:
    for blocks in (Blocks.of(length), Blocks.of(length, exact=True)):
        assert np.sum(blocks.sizes) == length
        assert blocks.starts[0] == 0
        assert np.array_equal(blocks.starts[1:], np.cumsum(blocks.sizes)[:-1])
        harmonic = np.sum(1 / np.arange(1, length + 1))
        own = causal(blocks).own
        # Blocks of more tokens than are sampled: the mean of 1/t by midpoints of runs of a block's 4 %.
        assert np.sum(blocks.sizes * own) == pytest.approx(harmonic, rel=1e-12 if length < 400 else 1e-5)


def test_coarse_blocks_average_a_constant_and_a_unit_matrix() -> None:
    """Block values of P 1 P' (all ones) and of P I P' (1/max(t, t')) are the means over the block."""
    blocks = Blocks.of(512)
    assert blocks.sizes.size < 200
    n = blocks.sizes.size
    ones = Gram(np.ones(n), np.ones((n, n)))
    averaging = causal(blocks)
    for matrix in (averaging.average(ones), averaging.left(ones)):
        np.testing.assert_allclose(matrix.off, 1, rtol=1e-12)
        np.testing.assert_allclose(matrix.diag, 1, rtol=1e-12)
    unit = averaging.average(Gram(np.ones(n), np.zeros((n, n))))
    np.testing.assert_allclose(unit.diag, averaging.own, rtol=0.01)
    # The trace of P'P is the harmonic number's sum; half a block is the error of a coarse position.
    assert blocks.trace(unit) == pytest.approx(np.sum(1 / np.arange(1, 513)), rel=0.01)


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("Vanilla", "uniform"),
        ("Vanilla", "expanded"),
        ("Scaled Embed", "expanded"),
        ("Xavier + Scaled Embed", "expanded"),
    ],
)
def test_coarse_blocks_within_one_per_cent(name: str, model: Any) -> None:
    a = method(replace(preset("350m"), n_layers=6), name)
    coarse = gradient_growth(a, 512, attention=model)
    exact = gradient_growth(a, 512, attention=model, exact=True)
    assert coarse.value == pytest.approx(exact.value, rel=0.01)
    assert coarse.residual_std == pytest.approx(exact.residual_std, rel=0.01)
    assert coarse.gradient == pytest.approx(exact.gradient, rel=0.01)


@pytest.mark.parametrize(("window", "logits", "room"), [(2, 1.0, 1e-9), (16, 1.0, 0.01), (16, 3.9, 0.03)])
def test_blocks_are_a_part_of_the_shortest_window(
    window: int, logits: float, room: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neighbours that a window sees are more alike than a block's mean; control: blocks of any size are too large."""
    a = replace(preset("tiny"), n_layers=8, positions="none", window=window, context=512)
    init = Init(name="unit", hidden="fan-in", embedding=1.0, position=1.0, head="fan-in", query_key=logits**0.25 / 8)
    a = replace(a, init=init)
    exact, coarse = (gradient_growth(a, 320, exact=exact) for exact in (True, False))
    assert coarse.in_domain
    assert coarse.value == pytest.approx(exact.value, rel=room)
    monkeypatch.setattr(growth_domain, "largest_block", lambda *_: 0)
    any_size = gradient_growth(a, 320)
    gaps = [found.value / exact.value - 1 for found in (coarse, any_size)]
    print(f"window {window}: {gaps[0]:+.2%}, in blocks of any size {gaps[1]:+.1%}")
    assert any_size.value > (1 + 2 * room) * exact.value
    assert any_size.reasons == (f"320 tokens are too many for a window of {window}, whose neighbours are too alike",)


# --- the maps against simulation --------------------------------------------------------------------------------

WIDTH, HEADS = 512, 4
LOGITS = (0.3, 1.0, 4.0)
ROPE_BASE = 100.0


def kernels(length: int) -> dict[str, Array]:
    """Correlations of a sub-layer's input; the first three are exchangeable, one token like another."""
    almost = 1e-9 * np.eye(length)  # so that a Cholesky factor exists
    return {
        "uncorrelated": np.eye(length),
        "equally correlated": 0.5 * np.eye(length) + 0.5,
        "in pairs": (1 - 1e-9) * np.kron(np.eye(length // 2), np.ones((2, 2))) + almost,
        "unevenly correlated": random_gram(length, 0.6, 1),
    }


def relative_trace(computed: Array, expected: Array) -> float:
    return float(np.trace(computed) / np.trace(expected) - 1)


@pytest.mark.parametrize("length", [6, 24])
@pytest.mark.parametrize("name", kernels(2))
def test_attention_maps_against_simulated_attention(name: str, length: int) -> None:
    """Forward and backward traces, to four standard errors and what the expansion leaves out.

    The logits' effect is the difference of two simulations with the same weights, added to the exact value without
    logits: most of the noise is common and cancels. Forwards a row's second moment is exact for exchangeable tokens, at
    any logit variance; the width adds T/d. Backwards two rows count to first order in the square of their
    covariance, which leaves up to 2 % a here, and unequal correlations as much again.
    """
    kernel, cotangent, draws = kernels(length)[name], np.eye(length), 24
    simulated = simulate_attention(kernel, cotangent, (0.0, *LOGITS), width=WIDTH, heads=HEADS, draws=draws)
    p, blocks = cesaro(length), Blocks.of(length, exact=True)
    without = np.stack([p @ kernel @ p.T, p.T @ cotangent @ p])
    bare = simulated[0]
    # 2 x T x T entries: 5 standard errors are exceeded once in a thousand tests.
    assert np.all(np.abs(bare.mean(0) - without) <= 5 * bare.std(0, ddof=1) / math.sqrt(draws) + 1e-9)
    for a, with_logits in zip(LOGITS, simulated[1:], strict=True):
        change = with_logits - bare
        expected = without + change.mean(0)
        for model in ("uniform", "expanded"):
            attention = AttentionMap(value=1.0, logits=a, averagings=(causal(blocks),), model=model)
            computed = (
                attention.at(as_gram(kernel)).output.dense(),
                attention.at(as_gram(kernel)).backward(as_gram(cotangent)).dense(),
            )
            for side in (0, 1):
                traces = np.trace(change[:, side], axis1=1, axis2=2)
                error = float(traces.std(ddof=1) / math.sqrt(draws) / np.trace(expected[side]))
                gap = relative_trace(computed[side], expected[side])
                room = 4 * error + length / WIDTH + (0.02 * a if side == 1 or name.startswith("uneven") else 0.0)
                print(
                    f"{name}, T = {length}, a = {a}, {model}, {('forward', 'backward')[side]}: {gap:+.3f} ({error:.3f})"
                )
                if model == "expanded":
                    assert abs(gap) <= room
                elif side == 0 and a == 4 and name == "uncorrelated":
                    assert abs(gap) > room  # control: without the fluctuation of the rows the output is too small


def test_rotation_inside_attention() -> None:
    """RoPE decorrelates the logits of equal tokens: with the rotation the traces are right, without it they are not."""
    length, draws, a = 24, 24, 1.0
    kernel, cotangent = 0.5 * np.eye(length) + 0.5, np.eye(length)
    simulated = simulate_attention(
        kernel, cotangent, (0.0, a), width=WIDTH, heads=HEADS, draws=draws, rope_base=ROPE_BASE
    )
    p, blocks = cesaro(length), Blocks.of(length, exact=True)
    expected = np.stack([p @ kernel @ p.T, p.T @ cotangent @ p]) + (simulated[1] - simulated[0]).mean(0)
    rotation = rotation_correlation(WIDTH // HEADS, WIDTH // HEADS, ROPE_BASE, blocks.distances())
    gaps: dict[bool, tuple[float, float]] = {}
    for turned in (False, True):
        attention = AttentionMap(
            value=1.0, logits=a, averagings=(causal(blocks),), rotation=rotation if turned else None
        )
        gaps[turned] = (
            relative_trace(attention.at(as_gram(kernel)).output.dense(), expected[0]),
            relative_trace(attention.at(as_gram(kernel)).backward(as_gram(cotangent)).dense(), expected[1]),
        )
    print(gaps)
    assert abs(gaps[True][0]) <= 0.01
    assert abs(gaps[True][1]) <= 0.04  # 4 standard errors of the simulation
    assert abs(gaps[False][1]) > 0.07


def test_a_window_and_a_slope_change_the_mean_row() -> None:
    """Row by row against the definition, in single and in coarse blocks."""
    for window, slope in ((0, 0.0), (5, 0.0), (0, 0.25), (7, 0.1)):
        blocks = Blocks.of(40, exact=True)
        rows = np.zeros((40, 40))
        for t in range(40):
            first = max(0, t + 1 - window) if window else 0
            weights = np.exp(-slope * (t - np.arange(first, t + 1)))
            rows[t, first : t + 1] = weights / weights.sum()
        np.testing.assert_allclose(causal(blocks, window=window, slope=slope).dense(), rows, rtol=1e-12, atol=1e-15)
        coarse, fine = (causal(Blocks.of(600, exact=exact), window=window, slope=slope) for exact in (False, True))
        unit = [Gram(np.ones(b.blocks.sizes.size), np.zeros((b.blocks.sizes.size,) * 2)) for b in (coarse, fine)]
        traces = [b.blocks.trace(b.average(u)) for b, u in zip((coarse, fine), unit, strict=True)]
        assert traces[0] == pytest.approx(traces[1], rel=0.01)
        np.testing.assert_allclose(coarse.mass.sum(1), 1, rtol=1e-12)


def test_softmax_moments_against_sampling() -> None:
    """gain, slope and square of n independent logits, to four standard errors; the table to 1 % of the quadrature."""
    generator, draws = np.random.default_rng(0), 40_000
    for n in (2, 6, 64):
        for a in (0.01, 0.3, 1.0, 4.0, 16.0):
            z = math.sqrt(a) * generator.standard_normal((draws, n))
            p = np.exp(z - z.max(1, keepdims=True))
            p /= p.sum(1, keepdims=True)
            two, three = np.sum(p**2, axis=1), np.sum(p**3, axis=1)
            rest = 1 - 1 / n
            samples = ((n * two - 1) / rest, (1 - two) / rest, (two - 2 * three + two**2) * n / rest)
            exact = exact_moments(np.array([float(n)]), a)
            table = softmax_moments(np.array(n), np.array(a))
            for drawn, integral, interpolated in zip(samples, exact, table, strict=True):
                assert abs(drawn.mean() - integral[0]) <= 4 * drawn.std() / math.sqrt(draws)
                assert interpolated == pytest.approx(integral[0], rel=0.01)


def test_softmax_moments_have_their_limits() -> None:
    small = exact_moments(np.array([2.0, 10.0, 1000.0]), 1e-4)
    np.testing.assert_allclose(small.gain / 1e-4, 1, rtol=1e-3)
    np.testing.assert_allclose([small.slope, small.square], 1, rtol=1e-3)
    large = exact_moments(np.array([1e6]), 1.0)
    assert large.gain[0] == pytest.approx(math.e - 1, rel=0.01)  # the next order is e^4/n
    assert large.square[0] == pytest.approx(math.e, rel=0.01)


def test_softmax_moments_of_what_is_no_number_are_none() -> None:
    moments = softmax_moments(np.array([4.0, 4.0]), np.array([math.nan, 1.0]))
    assert all(np.isnan(values).tolist() == [True, False] for values in moments)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("activation", ["relu", "gelu", "silu", "identity", "relu-squared"])
def test_feedforward_maps_against_simulated_feedforward(activation: Any, gated: bool) -> None:
    """Exact in expectation at any width, since the pre-activations are exactly normal: standard errors alone."""
    length, draws, gain = 6, 60, 0.6
    kernel = random_gram(length, 0.6, 1)
    cotangent = random_gram(length, 0.6, 2) * np.outer(np.linspace(0.7, 1.4, length), np.linspace(0.7, 1.4, length))
    simulated = simulate_feedforward(
        kernel, cotangent, ACTIVATIONS[activation], width=WIDTH, hidden=2 * WIDTH, gated=gated, gain=gain, draws=draws
    )
    sublayer = FeedForwardMap(activation=activation, enter=gain, leave=1.0, gate=gain if gated else None)
    predicted = (
        sublayer.at(Gram(np.ones(length), kernel)).output.dense(),
        sublayer.at(Gram(np.ones(length), kernel)).backward(as_gram(cotangent)).dense(),
    )
    for side in (0, 1):
        error = simulated[:, side].std(0, ddof=1) / math.sqrt(draws)
        # The gradient at one token is in the span of its own weights: corrections of order 1/d are below the errors.
        assert np.all(np.abs(predicted[side] - simulated[:, side].mean(0)) <= 4.5 * error + 2 / WIDTH)
        wrong = 1.25 if activation == "relu-squared" else 1.1  # its fourth powers scatter more
        assert not np.all(np.abs(wrong * predicted[side] - simulated[:, side].mean(0)) <= 4.5 * error + 2 / WIDTH)


@pytest.mark.parametrize(("kind", "removed"), [("layernorm", 2), ("rmsnorm", 1)])
def test_norm_backward_gain_is_exact(kind: Any, removed: int) -> None:
    """E|J v|^2 = (d-k)/(d-k-1) |v|^2 for a normal token and an independent v of unit variance; k = 2 or 1."""
    d, draws = 12, 200_000
    generator = np.random.default_rng(0)
    x, v = generator.standard_normal((2, draws, d))
    if kind == "layernorm":
        x, v = x - x.mean(1, keepdims=True), v - v.mean(1, keepdims=True)
    scale = np.mean(x**2, axis=1)
    v = v - x * (np.sum(x * v, axis=1) / np.sum(x * x, axis=1))[:, None]
    gains = np.mean(v**2, axis=1) / scale
    standard_error = gains.std() / math.sqrt(draws)
    predicted = norm_gain(kind, d)
    assert predicted == pytest.approx((d - removed) / (d - removed - 1), rel=1e-15)
    assert abs(gains.mean() - predicted) <= 4 * standard_error
    assert abs(gains.mean() - 1) > 4 * standard_error
    fixed = np.mean(v**2, axis=1)  # a norm before has fixed the scale at 1
    assert abs(fixed.mean() - norm_gain(kind, d, fixed_scale=True)) <= 4 * fixed.std() / math.sqrt(draws)


# --- positions --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pairs", [1025, 1500])
def test_more_pairs_than_are_summed_are_spread_evenly(pairs: int) -> None:
    """Against the sum over all of them, to a thousandth of what a logit has; the control is every other pair."""
    distances = np.arange(0.0, 64.0)[None, :]
    angles = 10_000.0 ** (-np.arange(pairs) / pairs)
    exact = np.cos(angles[:, None] * distances).mean(axis=0)
    found = rotation_correlation(2 * pairs, 2 * pairs, 10_000.0, distances).off[0]
    assert found == pytest.approx(exact, abs=1e-3)
    assert np.cos(angles[: pairs // 2, None] * distances).mean(axis=0) != pytest.approx(exact, abs=0.1)


def test_slowed_angles_correlate_as_their_mean_cosine() -> None:
    """Llama 3.1's rule by hand on four pairs, one fast, two between and one slow; the control is the unscaled one."""
    a = replace(preset("tiny"), d_head=16, rope_fraction=0.5, rope_base=10.0, rope_stretch=8.0, rope_original=12)
    a, distances = replace(a, rope_low=0.5, rope_high=1.5), np.arange(0.0, 40.0)[None, :]
    plain = 10.0 ** (-np.arange(4) / 4)
    turns = 12 * plain / (2 * np.pi)
    between = plain * ((turns - 0.5) + (1.5 - turns) / 8)
    slowed = np.where(turns > 1.5, plain, np.where(turns > 0.5, between, plain / 8))
    assert [int(np.sum(turns > limit)) for limit in (1.5, 0.5)] == [1, 3]
    exact = (1 + np.cos(slowed[:, None] * distances).mean(axis=0)) / 2
    found = rotation_correlation(16, 8, 10.0, distances, a.rope_slowing(0)).off[0]
    assert found == pytest.approx(exact, rel=1e-12)
    assert rotation_correlation(16, 8, 10.0, distances).off[0] != pytest.approx(exact, abs=0.1)


@pytest.mark.parametrize("n_heads", [1, 2, 3, 8, 12, 96])
def test_the_steepest_slope_is_the_largest(n_heads: int) -> None:
    assert steepest_alibi_slope(n_heads) == max(alibi_slopes(n_heads, n_heads))
