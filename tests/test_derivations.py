"""Derivations: every line holds at random numbers, a corrupted line does not, and the ends are the statements."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import sympy as sp

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
    **dict.fromkeys(("experts-sharp-relu", "tied-simulated"), "sharp"),
    **dict.fromkeys(("ffn-sharp-relu", "ffn-sharp-gated-relu", "ffn-sharp-gated-relu-squared"), "sharp"),
    "gaussian-opnorm-sharp": "sharp",
    **dict.fromkeys(("gaussian-opnorm-estimate", "norm-jacobian-estimate"), "estimate"),
    **dict.fromkeys(("rmsnorm-jacobian-estimate", "ffn-gated-estimate"), "estimate"),
    **dict.fromkeys(("embedding-estimate", "embedding-normalised-estimate"), "estimate"),
    **dict.fromkeys(("update-scatter", "post-norm-gain", "output-norm-gain", "own-gain", "head-gradient"), "sharp"),
    **dict.fromkeys(("norm-backward-gain", "softmax-moments"), "exact"),
}
# Tails and a product of maxima that nothing attains: how far below the bound their checks may stay.
UNATTAINED = 100
STEPS = [(name, place) for name in NAMES for place in range(len(derivation(name).steps))]

d = symbol("d")


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
    step = derivation(name).steps[place]
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
    conclusion = derivation(name).steps[place]
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
