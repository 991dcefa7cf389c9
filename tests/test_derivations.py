"""Derivations: every line holds at random numbers, a corrupted line does not, and the ends are the statements."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import sympy as sp

from theory import derivations_softmax
from theory.activations import lipschitz
from theory.architecture import preset
from theory.derivation import (
    DERIVATIONS,
    Derivation,
    Relation,
    Step,
    compose,
    derivation,
    equal,
    line,
    register_derivation,
    substitution,
)
from theory.derivations_bounds import layer_norm_proof
from theory.derivations_expressions import Norm, Transposed, array, entry, evaluate
from theory.grams import Gram
from theory.growth import gradient_growth, growth_closed_form
from theory.head import head_gradient, head_tilt, head_variance
from theory.logits import attention_logits, norm_gain
from theory.random_matrix import feedforward_edge
from theory.scatter import inner_loss, output_norm_gain, post_norm, scatter
from theory.softmax_moments import exact_moments
from theory.sources import Source
from theory.symbols import symbol

NAMES = tuple(DERIVATIONS)
# What is not a true bound or an equality says so; a chain that is none of these kinds is `upper`.
KINDS = {
    **dict.fromkeys(("ffn", "attention", "closed-form", "growth-conservation", "shortcut-scale"), "estimate"),
    **dict.fromkeys(("residual-scaling", "normalised-branch", "post-ln", "deepnorm"), "estimate"),
    **dict.fromkeys(("factor-two", "single-head"), "estimate"),  # bounds and sharp values, side by side
    **dict.fromkeys(("attention-sharp", "activation-cost", "routing"), "sharp"),
    **dict.fromkeys(("half-layer-sharp-relu", "half-layer-sharp-gated-relu", "ffn-sharp-relu-squared"), "sharp"),
    **dict.fromkeys(("attention-full-sharp", "attention-full-half-layer-sharp", "embedding-sharp"), "sharp"),
    **dict.fromkeys(("attention-half-layer-sharp", "attention-uneven-sharp", "attention-simulated"), "sharp"),
    **dict.fromkeys(("ffn-sharp-relu", "ffn-sharp-gated-relu", "ffn-sharp-gated-relu-squared"), "sharp"),
    "gaussian-opnorm-sharp": "sharp",
    **dict.fromkeys(("gaussian-opnorm-estimate", "norm-jacobian-estimate"), "estimate"),
    **dict.fromkeys(("rmsnorm-jacobian-estimate", "ffn-gated-estimate"), "estimate"),
    **dict.fromkeys(("embedding-estimate", "embedding-normalised-estimate"), "estimate"),
    **dict.fromkeys(("update-scatter", "post-norm-gain", "output-norm-gain", "head-gradient"), "sharp"),
    **dict.fromkeys(("norm-backward-gain", "softmax-moments"), "exact"),
}
# Tails and a product of maxima that nothing attains: how far below the bound their checks may stay.
UNATTAINED = 100
STEPS = [(name, place) for name in NAMES for place in range(len(derivation(name).steps))]

d = symbol("d")


def numbered(name: str, place: int) -> Step:
    return derivation(name).steps[place]


def test_names() -> None:
    assert all(derivation(name).name == name for name in NAMES)
    assert set(KINDS) < set(NAMES)
    with pytest.raises(ValueError, match=r"unknown derivation 'fnn'; did you mean ffn\? run `spikecheck derive`"):
        derivation("fnn")


def test_package_does_not_import_sympy() -> None:
    code = "import sys, theory; sys.exit('sympy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("name", NAMES)
def test_every_step_holds(name: str) -> None:
    for seed in range(3):
        failed = [check for check in derivation(name).verify(np.random.default_rng(seed)) if not check.passed]
        assert not failed


MEMBERS = {member.statement: member for name in NAMES for member in derivation(name).family}


@pytest.mark.parametrize("statement", MEMBERS)
def test_a_family_s_chain_holds_for_every_member(statement: str) -> None:
    chain = MEMBERS[statement]
    assert chain.name in NAMES
    assert chain.arrives()
    assert chain.target is not None
    assert chain.target.kind == chain.kind
    failed = [check for check in chain.verify(np.random.default_rng(0)) if not check.passed]
    assert not failed
    wrong = replace(chain.conclusion, right=chain.conclusion.right * sp.Rational(4, 5))
    assert not replace(chain, steps=(*chain.steps[:-1], wrong)).arrives()
    assert not wrong.check(np.random.default_rng(5)).passed


EDGES = ("ffn-sharp-relu", "ffn-sharp-gated-relu", "half-layer-sharp-relu", "half-layer-sharp-gated-relu")
OFFSETS = [(chain, name) for name in EDGES for chain in (derivation(name), *derivation(name).family)]


@pytest.mark.parametrize(("chain", "name"), OFFSETS, ids=[chain.statement for chain, _ in OFFSETS])
def test_without_the_offset_the_norm_fails(chain: Derivation, name: str) -> None:
    """The bare edge is outside of the tolerance that the corrected one is within."""
    (step,) = (step for step in chain.steps if step.rule == "Tracy-Widom offset")
    bend = entry("lambda''") if name.startswith("ffn") else entry("z''")
    assert bend in step.right.free_symbols
    bare = replace(step, right=step.right.subs(bend, 0))
    for seed in range(2):
        assert step.check(np.random.default_rng(seed)).passed
        found = bare.check(np.random.default_rng(seed))
        assert not found.passed
        assert found.left < found.right


@pytest.mark.parametrize(("name", "place"), STEPS)
def test_corrupted_step_fails(name: str, place: int) -> None:
    step = numbered(name, place)
    if step.right == 0:
        pytest.skip("zero has no wrong factor")
    factor = sp.Rational(4, 5) if step.kind in ("sharp", "estimate") else sp.Rational(9, 10)
    if step.kind == "upper" and step.tight is None:
        assert "ChiSquare" in str(step.left) or str(step.left) in ("key_term", "P(any token outside)")
        factor = sp.Rational(1, UNATTAINED)
    # Without its proof and its composition, so that the numbers alone must notice.
    wrong = replace(step, right=factor * step.right, sample=step.tight or step.sample, proof=None, uses=())
    right = replace(wrong, right=step.right)
    assert right.check(np.random.default_rng(5)).passed
    assert not wrong.check(np.random.default_rng(5)).passed


COMPOSED = [(name, place) for name, place in STEPS if derivation(name).steps[place].uses]


@pytest.mark.parametrize(("name", "place"), COMPOSED)
def test_corrupted_composition_fails(name: str, place: int) -> None:
    conclusion = numbered(name, place)
    wrong = replace(conclusion, right=2 * conclusion.right)  # twice a bound is a bound: only the algebra notices
    assert not wrong.check(np.random.default_rng(0)).passed
    first, *others = conclusion.uses
    for place, step in enumerate(others):
        changed = [*others[:place], replace(step, right=step.right * 2), *others[place + 1 :]]
        try:
            composed = compose(first, *changed)
        except ValueError:  # a doubled matrix is not the one that the next line speaks of
            continue
        assert not equal(composed, conclusion.right), step.left


@pytest.mark.parametrize("name", NAMES)
def test_end_is_the_statement(name: str) -> None:
    chain = derivation(name)
    assert chain.kind == KINDS.get(name, "upper")
    if chain.target is None:
        assert not chain.statement
        return
    assert chain.target.kind == chain.kind
    assert chain.arrives()
    wrong = replace(chain.conclusion, right=chain.conclusion.right * sp.Rational(9, 10))
    assert not replace(chain, steps=(*chain.steps[:-1], wrong)).arrives()


def test_kind_is_the_weakest() -> None:
    chain = derivation("ffn")
    kinds = {kind: tuple(step for step in chain.steps if step.kind == kind) for kind in ("exact", "upper", "estimate")}
    assert replace(chain, steps=kinds["exact"]).kind == "exact"
    assert replace(chain, steps=kinds["exact"] + kinds["upper"]).kind == "upper"
    assert replace(chain, steps=kinds["estimate"][:1] + kinds["upper"]).kind == "estimate"
    sharp = tuple(step for step in derivation("attention-sharp").steps if step.kind == "sharp")
    assert replace(chain, steps=kinds["exact"] + sharp).kind == "sharp"
    assert replace(chain, steps=kinds["upper"] + sharp).kind == "estimate"  # a bound on a value is neither


def test_paper_equations() -> None:
    """Eq. (15) and eq. (20), written out by hand."""
    sigma_1, sigma_2, sigma_xp, d_ffn = (symbol(name) for name in ("sigma_1", "sigma_2", "sigma_xp", "d_ffn"))
    eq_15 = 1 + sigma_1 * sigma_2 / sigma_xp * (sp.sqrt(d) + sp.sqrt(d_ffn)) ** 2
    eq_20 = 1 + symbol("sigma_O") / symbol("sigma_x") * 2 * sp.sqrt(d) * symbol("J_Z")
    assert sp.simplify(derivation("ffn").conclusion.right - eq_15) == 0
    assert sp.simplify(derivation("attention").conclusion.right - eq_20) == 0


def test_layer_norm_jacobian_by_sympy() -> None:
    assert layer_norm_proof(4) == sp.zeros(4, 4)


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


def test_inequality_needs_an_increasing_place() -> None:
    x, y = entry("x_test"), entry("y_test")
    source = Source(key="spikecheck")

    def at_most(left: sp.Expr, right: sp.Expr) -> Step:
        return Step(
            left=left, right=right, relation="<=", rule="test", source=source, explanation="", sample=lambda rng: {}
        )

    assert compose(at_most(x, 1 + y), at_most(y, sp.Integer(2))) == 3
    with pytest.raises(ValueError, match="not increasing"):
        compose(at_most(x, 1 / (1 + y)), at_most(y, sp.Integer(2)))
    with pytest.raises(ValueError, match="does not occur"):
        compose(at_most(x, sp.Integer(1)), at_most(y, sp.Integer(2)))
    for relation in ("~", "~="):
        with pytest.raises(ValueError, match="states its accuracy"):
            replace(at_most(x, y), relation=relation)
    with pytest.raises(ValueError, match="states its accuracy"):
        replace(at_most(x, y), tolerance=0.1)
    with pytest.raises(ValueError, match="use one of =, <=, ~=, ~, <~"):
        replace(at_most(x, y), relation=">=")
    conclusion = substitution(
        at_most(x, 1 + y), at_most(y, sp.Integer(2)), source=source, explanation="", sample=lambda rng: {x: 3.5}
    )
    assert conclusion.relation == "<="
    assert not conclusion.check(np.random.default_rng(0)).passed


def test_evaluate_against_numpy() -> None:
    A, B, c = array("A_test"), array("B_test"), entry("c_test")
    rng = np.random.default_rng(0)
    values = {A: rng.normal(size=(3, 4)), B: rng.normal(size=(3, 4)), c: 0.5}
    expected = np.linalg.norm(0.5 * values[A].T @ values[B] - values[B].T @ values[A], 2)
    expression = Norm(c * Transposed(A) * B - Transposed(B) * A)
    assert evaluate(expression, values) == pytest.approx(expected, rel=1e-14)
    with pytest.raises(ValueError, match="B_test has no value"):
        evaluate(B, {A: values[A]})


def test_two_derivations_cannot_share_a_name() -> None:
    def softmax() -> Derivation:
        raise AssertionError

    with pytest.raises(ValueError, match="two derivations are called 'softmax'"):
        register_derivation(softmax)


def test_a_sharp_line_makes_the_composition_sharp_or_an_estimate() -> None:
    x, y = entry("x_test"), entry("y_test")

    def step(left: sp.Expr, relation: Relation, right: sp.Expr) -> Step:
        accuracy = "stated" if relation == "~=" else ""
        return line(
            left,
            relation,
            right,
            "test",
            "",
            sample=lambda rng: {},
            accuracy=accuracy,  # type: ignore[arg-type]
        )

    value = step(y, "~=", sp.Integer(2))
    common = {"source": Source(key="spikecheck"), "explanation": "", "sample": lambda rng: {}, "accuracy": "stated"}
    assert substitution(step(x, "=", 1 + y), value, **common).relation == "~="
    assert substitution(step(x, "<=", 1 + y), value, **common).relation == "<~"


def test_root_of_a_negative_number_is_refused() -> None:
    x = entry("x_test")
    with pytest.raises(ValueError, match="root of a negative number"):
        evaluate(sp.sqrt(1 - x), {x: 2.0})


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
    over = evaluate(of_variance, {d: width}) * width / (width - 1)
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
        assert head_tilt(a, final).off[0, 1] == pytest.approx(along**2 * c / variance, rel=1e-12)


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
