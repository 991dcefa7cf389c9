"""What a derivation arrives at is what `theory` evaluates, and the numbers that its explanations quote."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from theory import derivations_softmax
from theory.activations import lipschitz
from theory.architecture import preset
from theory.derivation import Step, derivation
from theory.derivations_expressions import array, entry, evaluate
from theory.grams import Gram
from theory.growth import gradient_growth, growth_closed_form
from theory.head import head_gradient, head_tilt, head_variance
from theory.logits import attention_logits, norm_gain
from theory.random_matrix import feedforward_edge
from theory.scatter import inner_loss, output_norm_gain, post_norm, scatter
from theory.softmax_moments import exact_moments
from theory.symbols import symbol


def numbered(name: str, place: int) -> Step:
    return derivation(name).steps[place]


def test_closed_form_is_the_evaluated_one() -> None:
    architecture = preset("tiny").with_embedding("scaled-embed")
    stds = architecture.stds
    values = {
        "sigma_e": architecture.embedding_multiplier * stds.embedding,
        "sigma_1": stds.ffn_in,
        "sigma_2": stds.ffn_out,
        "c_VO": (architecture.d_model * stds.value * stds.output) ** 2,
        "d": architecture.d_model,
        "d_ffn": architecture.d_ffn,
        "n_layers": architecture.n_layers,
        "n_tokens": 33,
    }
    expression = derivation("closed-form").conclusion.right
    found = evaluate(expression, {symbol(name): value for name, value in values.items()})
    assert found == pytest.approx(growth_closed_form(architecture, 33), rel=1e-12)


def right(name: str, place: int, **values: float) -> float:
    """Right side of a numbered line (from 1), at the given symbols of the catalogue."""
    found = numbered(name, place - 1).right
    return float(evaluate(found, {symbol(key): value for key, value in values.items()}))


def test_numbers_that_the_explanations_quote() -> None:
    assert right("factor-two", 5, d=128, sigma_O=128**-0.5) == pytest.approx(1.97, abs=5e-3)
    assert right("factor-two", 10, c_VO=1) == pytest.approx(math.sqrt(27 / 4))
    assert right("factor-two", 11) == pytest.approx(1.54, abs=5e-3)
    relu, linear, nine = (right("activation-cost", place) for place in (5, 6, 7))
    assert (relu, linear, nine) == pytest.approx((3.3302, 4.4037, 9), abs=5e-5)
    assert (nine / linear, nine / relu) == pytest.approx((2.04, 2.70), abs=5e-3)
    assert right("activation-cost", 8) == pytest.approx(lipschitz("gelu"), rel=1e-15)
    assert right("single-head", 3, n_heads=16, c_VO=1) == 25
    settled = {"n_tokens": 1024}
    assert right("shortcut-scale", 13, **settled) == pytest.approx(0.4, abs=2e-3)
    assert right("shortcut-scale", 14, **settled) == pytest.approx(1.08, abs=5e-3)
    written = right("shortcut-scale", 12, **settled)
    for std, growth, share in ((1.0, 1.08, 0.14), (2.0, 1.02, 0.04)):
        found = {"n_layers": 1.0, "branch_variance": written, "sigma_e": std}
        assert right("shortcut-scale", 2, **found) == pytest.approx(growth, abs=5e-3)
        assert right("shortcut-scale", 3, **found) == pytest.approx(share, abs=5e-3)
    depth = {
        symbol("n_layers"): 48,
        symbol("sigma_e"): 1.0,
        entry("l=0..N-1"): [{entry("l"): float(n)} for n in range(48)],
    }
    for variance, post, pre in ((1.0, 18.0, 9.5), (0.16 / 48, 2.6, 2.6)):
        values = depth | {symbol("branch_variance"): variance}
        values |= {entry("|J|"): evaluate(numbered("post-ln", 13).right, values)}
        bounds = evaluate(numbered("post-ln", 11).right, values), evaluate(numbered("post-ln", 12).left, values)
        assert [math.log10(bound) for bound in bounds] == pytest.approx([post, pre], abs=0.05)
        assert bounds[1] <= evaluate(numbered("post-ln", 12).right, values)
    degrees, deviation = 1023, math.log(2 * 2048 / 1e-6)
    values = {symbol("d"): 1024, symbol("sigma_x"): 1.0, entry("n"): degrees, entry("y"): deviation}
    assert evaluate(derivation("variance-suffices").conclusion.right, values) == pytest.approx(1.19, abs=5e-3)


def test_edges_agree_with_the_numerical_ones() -> None:
    """The closed forms of the edges, against the minimum that the sharp statements find numerically."""
    assert right("activation-cost", 5) ** 2 == pytest.approx(feedforward_edge("relu", 4, 1.0).limit, rel=1e-9)
    assert right("activation-cost", 6) ** 2 == pytest.approx(feedforward_edge("identity", 4, 1.0).limit, rel=1e-9)
    assert right("factor-two", 10, c_VO=1) ** 2 == pytest.approx(feedforward_edge("identity", 1, 1.0).limit, rel=1e-9)


def test_conserved_growth_is_the_recursion_s() -> None:
    """Where logits and branches are small and the width large, the recursion is the harmonic mean over tokens."""
    tokens, d_model, tiny = 6, 4096, preset("tiny")
    init = replace(tiny.init, hidden=(0.05 / d_model) ** 0.5, embedding=0.12)
    sizes = {"d_model": d_model, "d_head": d_model // 4, "n_heads": 4, "n_kv_heads": 4, "d_ffn": d_model, "n_layers": 3}
    architecture = replace(tiny, init=init, eps=0.0, **sizes)
    stds, start = architecture.stds, (architecture.embedding_multiplier * architecture.stds.embedding) ** 2
    fed = stds.ffn_out**2 * architecture.d_ffn * stds.ffn_in**2 * d_model / 2
    attended = (d_model * stds.value * stds.output) ** 2
    token = [{entry("t"): float(t + 1)} for t in range(tokens)]
    values = {symbol("n_layers"): 3, symbol("n_tokens"): tokens, symbol("sigma_e"): start**0.5, entry("t"): token}
    values |= {symbol("b_ffn"): fed, symbol("c_VO"): attended}
    found = evaluate(numbered("growth-conservation", 7).right, values)
    recursion = gradient_growth(architecture, tokens).value
    # Left out are the logits' part of the gradient, the 1 - 2/d and the correlation that attention builds.
    assert found - 1 == pytest.approx(recursion - 1, rel=0.02)
    assert recursion > 1.03
    average = evaluate(numbered("growth-conservation", 9).right, values)
    assert found <= average


SHARE, WIDE = 0.3, 4096


def test_softmax_moments_are_the_evaluated_ones() -> None:
    """`theory.softmax_moments` against the chain's lines, whose sides are integrated over a grid of three logits."""
    values = derivations_softmax._row(np.random.default_rng(0))
    rng = np.random.default_rng(0)
    std, cap = float(rng.uniform(0.5, 1.5)), float(rng.uniform(1, 3))
    found = exact_moments(np.array([3.0]), std**2, cap)
    size = np.eye(3) - 1 / 3
    steps = {step.rule: step for step in derivation("softmax-moments").steps}
    expected = {"exchangeability": size / 9 * found.gain[0], "exchangeability, 1'S = 0": size / 3 * found.slope[0]}
    for rule, right in expected.items():
        side = evaluate(steps[rule].right, values) - (1 / 9 if rule == "exchangeability" else 0)
        np.testing.assert_allclose(side, right, rtol=1e-9, atol=1e-12)
    assert evaluate(steps["sum over entries"].right, values) == pytest.approx(2 / 9 * found.square[0], rel=1e-9)


def test_slopes_outside_of_the_mean() -> None:
    """The two ratios that softmax-moments quotes, for logits of variance 4 under a cap of 2."""
    for count, ratio in ((4, 0.98), (32, 1.23)):
        z = 2 * np.random.default_rng(0).standard_normal((100_000, count))
        p, slope = np.exp(2 * np.tanh(z / 2)), 1 / np.cosh(z / 2) ** 2
        p /= p.sum(1, keepdims=True)
        outside = slope.mean() * np.mean(p * (1 - p)) / np.mean(slope * p * (1 - p))
        assert outside == pytest.approx(ratio, abs=0.01)


@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm"])
def test_what_scatters_is_the_evaluated_one(norm: str) -> None:
    a = replace(preset("tiny"), norm=norm, block="post-ln")
    values = {
        entry("a"): SHARE,
        entry("a_A"): SHARE / 2,
        entry("a_F"): SHARE / 2,
        entry("n"): a.n_kv_heads * a.d_head,
        entry("kappa_4"): 6,
        entry("chi"): 2,
        symbol("d"): a.d_model,
        symbol("d_ffn"): a.d_ffn,
    }
    share, fed = np.array([SHARE]), np.array([SHARE / 2])
    v = evaluate(numbered("update-scatter", 6).right, values)
    assert scatter(a, share - fed, fed)[0] == pytest.approx(v, rel=1e-12)
    gain, kept = post_norm(a, share - fed, fed, first=False)
    lines = [evaluate(numbered("post-norm-gain", place).right, values | {entry("v"): v}) for place in (1, 3, 5)]
    assert gain[0] - 1 == pytest.approx(lines[norm == "layernorm"], rel=1e-12)
    assert 1 - kept == pytest.approx(lines[2], rel=1e-12)
    below, normed = (numbered("output-norm-gain", place).right for place in (5, 3))
    assert inner_loss(a, "feedforward") * SHARE == pytest.approx(evaluate(below, values), rel=1e-12)
    narrow = evaluate(numbered("output-norm-gain", 4).right, values)
    inside = {"feedforward": 1 + evaluate(normed, values), "attention": narrow}
    for name, gain in inside.items():
        assert output_norm_gain(a, name) == pytest.approx(gain * norm_gain(a.norm, a.d_model), rel=1e-12)
    first, _ = post_norm(a, share - fed, fed, first=True)
    # Of d degrees instead of d - 1 there is one more; over the whole mean square LayerNorm's is d/(d - 1) more.
    width, of_variance = a.d_model, numbered("post-norm-gain", 0).right
    over = evaluate(of_variance, {symbol("d"): width}) * width / (width - 1)
    assert first[0] == pytest.approx(over if norm == "layernorm" else width / (width - 2), rel=1e-12)


def test_the_head_s_gradient_is_the_evaluated_one() -> None:
    """Off the diagonal to the table's 1 % at the covariance, which the chain's e^c has."""
    a = replace(preset("tiny"), vocab_size=2**20, d_model=WIDE, d_head=WIDE // preset("tiny").n_heads)
    variance = head_variance(a)
    for c in (-0.8 * variance, 0.5 * variance):
        final = Gram(np.ones(2), np.array([[1.0, c / variance], [c / variance, 1.0]]))
        values = {entry("c", signed=True): c, entry("V"): a.vocab_size, entry("delta_yy'"): 0.0}
        shared = evaluate(numbered("head-gradient", 4).right, values) + 2 / a.vocab_size
        found = head_gradient(a, final, None, distinct=True).off[0, 1] + 2 / a.vocab_size
        assert found == pytest.approx(shared, rel=0.01)
        # Of (m sigma^2)^2 x.x'/d in units of sigma^2, a large vocabulary.
        values = {entry("m"): a.logit_multiplier, symbol("sigma"): a.stds.head, entry("E|p|^2"): 0.0, array("x"): 1.0}
        along = evaluate(numbered("head-gradient", 6).right, values) / a.stds.head
        assert head_tilt(a, final) ** 2 * final.off[0, 1] == pytest.approx(along**2 * c / variance, rel=1e-12)


@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm"])
def test_normalised_logits_are_the_evaluated_ones(norm: str) -> None:
    for kind in ("head", "full"):
        a = replace(preset("tiny"), norm=norm, qk_norm=kind, attention_scale=None, n_kv_heads=1)
        key, query = (a.d_head if kind == "head" else a.d_head * heads for heads in (a.n_kv_heads, a.n_heads))
        found = attention_logits(a)
        for width, gain in ((query, found.queries), (key, found.keys)):
            values = {symbol("d_head"): a.d_head if norm == "layernorm" else width}
            values |= {entry("w"): width, entry("w_q"): query + key - width}
            places = (6, 7) if norm == "layernorm" else (4, 5)
            lines = [evaluate(numbered("qk-norm", place).right, values) for place in places]
            assert (found.variance, gain) == pytest.approx(lines, rel=1e-12)
