"""Derivations: every line holds at random numbers, a corrupted line does not, and the ends are the statements."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace

import matplotlib as mpl
import numpy as np
import pytest
import sympy as sp

from theory.architecture import preset
from theory.asymptotics import ASYMPTOTICS, render_asymptotics
from theory.derivation import (
    DERIVATIONS,
    Derivation,
    Step,
    compose,
    derivation,
    equal,
    register_derivation,
    render,
    substitution,
)
from theory.derivations_bounds import layer_norm_proof
from theory.derivations_expressions import Norm, Transposed, array, entry, evaluate
from theory.derivations_rendering import formula
from theory.growth import growth_closed_form
from theory.sources import Source
from theory.symbols import symbol

NAMES = (
    "ffn",
    "attention",
    "gradient",
    "layernorm",
    "ffn-upper",
    "attention-upper-apriori",
    "attention-upper-aposteriori",
    "softmax",
    "closed-form",
)
KINDS = {"ffn": "estimate", "attention": "estimate", "closed-form": "estimate"}
STEPS = [(name, place) for name in NAMES for place in range(len(derivation(name).steps))]

d, N, T = symbol("d"), symbol("n_layers"), symbol("n_tokens")
H = sp.harmonic(T)


def numbered(name: str, place: int) -> Step:
    return derivation(name).steps[place]


def test_names() -> None:
    assert set(NAMES) <= set(DERIVATIONS)
    assert all(derivation(name).name == name for name in NAMES)
    with pytest.raises(ValueError, match="unknown derivation 'fnn'; use one of attention, "):
        derivation("fnn")


def test_package_does_not_import_sympy() -> None:
    code = "import sys, theory; sys.exit('sympy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("name", NAMES)
def test_every_step_holds(name: str) -> None:
    for seed in range(3):
        failed = [check for check in derivation(name).verify(np.random.default_rng(seed)) if not check.passed]
        assert not failed


@pytest.mark.parametrize(("name", "place"), STEPS)
def test_corrupted_step_fails(name: str, place: int) -> None:
    step = numbered(name, place)
    if step.right == 0:
        pytest.skip("zero has no wrong factor")
    if step.kind == "upper" and step.tight is None:
        assert "the two lines above" in step.rule  # the one inequality without a known tight case
        return
    factor = sp.Rational(4, 5) if step.kind == "estimate" else sp.Rational(9, 10)
    # Without its proof and its composition, so that the numbers alone must notice.
    wrong = replace(step, right=factor * step.right, sample=step.tight or step.sample, proof=None, uses=())
    right = replace(wrong, right=step.right)
    assert right.check(np.random.default_rng(5)).passed
    assert not wrong.check(np.random.default_rng(5)).passed


@pytest.mark.parametrize("name", NAMES)
def test_corrupted_composition_fails(name: str) -> None:
    conclusion = derivation(name).conclusion
    if not conclusion.uses:
        assert name == "gradient"
        return
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
        assert name in ("gradient", "closed-form")
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

    def line(left: sp.Expr, right: sp.Expr) -> Step:
        return Step(
            left=left, right=right, relation="<=", rule="test", source=source, explanation="", sample=lambda rng: {}
        )

    assert compose(line(x, 1 + y), line(y, sp.Integer(2))) == 3
    with pytest.raises(ValueError, match="not increasing"):
        compose(line(x, 1 / (1 + y)), line(y, sp.Integer(2)))
    with pytest.raises(ValueError, match="does not occur"):
        compose(line(x, sp.Integer(1)), line(y, sp.Integer(2)))
    with pytest.raises(ValueError, match="states its accuracy"):
        replace(line(x, y), relation="~")
    with pytest.raises(ValueError, match="use one of =, <=, ~, <~"):
        replace(line(x, y), relation=">=")
    conclusion = substitution(
        line(x, 1 + y), line(y, sp.Integer(2)), source=source, explanation="", sample=lambda rng: {x: 3.5}
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


@pytest.mark.parametrize("name", NAMES)
def test_rendering(name: str) -> None:
    chain = derivation(name)
    written = {style: render(chain, style) for style in ("text", "markdown", "latex")}
    for rendered in written.values():
        assert chain.title in rendered
        assert chain.kind in rendered
        assert not chain.statement or chain.statement in rendered
        assert "Norm(" not in rendered
        assert "Transposed(" not in rendered
    assert written["text"].isascii()
    assert all(f"({number})" in written["text"] for number in range(1, len(chain.steps) + 1))
    assert written["markdown"].count("$$") == 2 * len(chain.steps)
    latex = written["latex"]
    assert latex.count(r"\begin{align}") == latex.count(r"\end{align}") == 1
    assert latex.count(r"\item") == len(chain.steps)
    assert latex.count("{") == latex.count("}")
    assert len(re.findall(r"\\left\b", latex)) == len(re.findall(r"\\right\b", latex))
    with pytest.raises(ValueError, match="unknown format 'html'; use one of text, markdown, latex"):
        render(chain, "html")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", NAMES)
def test_mathtext_draws_every_formula(name: str) -> None:
    mpl.use("agg")
    from matplotlib.mathtext import MathTextParser

    for step in derivation(name).steps:
        drawn = MathTextParser("agg").parse(f"${formula(step)}$")
        assert drawn.width > 0


def test_rendered_equation() -> None:
    text = render(derivation("ffn"))
    assert "|dy/dx'| <~ 1 + sigma_1 sigma_2 (sqrt(d) + sqrt(d_ffn))^2/sigma_x'" in text
    assert "substitution of 5, 6, 7, 8, 9, 10, 11" in text


LIMITS = {
    "vanilla-growth": (sp.sqrt(d), sp.sqrt(sp.Rational(2, 5) + H / (5 * T))),
    "scaled-embed-growth": (1, sp.sqrt(sp.Rational(7, 5) + H / (5 * T))),
    "embed-ln-growth": (1, sp.sqrt(sp.Rational(29, 25) + 2 * H / (25 * T))),
    "vanilla-excess": (sp.sqrt(d / N), 9 / sp.sqrt(5)),
    "vanilla-excess-attended": (1, 9 * sp.sqrt(T / H)),
    "scaled-embed-excess": (1 / sp.sqrt(N), 9 / sp.sqrt(5)),
    "embed-ln-excess": (1 / sp.sqrt(N), 9 * sp.sqrt(2) / 5),
    "scaled-embed-product": (sp.sqrt(N), 9 / sp.sqrt(5)),
}


@pytest.mark.parametrize("name", ASYMPTOTICS)
def test_asymptotics(name: str) -> None:
    found = ASYMPTOTICS[name]()
    over, limit = LIMITS[name]
    assert sp.simplify(found.over - over) == 0
    assert sp.simplify(found.limit**2 - limit**2) == 0
    large = {d: 10**12, N: 24, T: 1024} | {found.variable: 10**12}
    ratio = evaluate(found.expression / found.over, large) / evaluate(found.limit, large)
    assert ratio == pytest.approx(1, abs=1e-5)
    assert found.statement in render_asymptotics()


def test_growth_does_not_depend_on_depth() -> None:
    for name in ("vanilla-growth", "scaled-embed-growth", "embed-ln-growth"):
        found = ASYMPTOTICS[name]()
        assert N not in found.expression.free_symbols
        assert N not in found.limit.free_symbols


def test_first_layer_excess_at_350m() -> None:
    sizes = {d: 1024, N: 24}
    found = [float(ASYMPTOTICS[name]().expression.subs(sizes)) for name in ASYMPTOTICS if name.endswith("-excess")]
    assert found == pytest.approx([26.3, 0.82, 0.52], rel=0.01)
