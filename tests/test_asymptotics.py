"""Limits of the closed forms: written out by hand, and approached by the numbers."""

from __future__ import annotations

import pytest
import sympy as sp

from theory.asymptotics import ASYMPTOTICS, render_asymptotics
from theory.derivations_expressions import entry, evaluate
from theory.symbols import symbol

d, N, T = symbol("d"), symbol("n_layers"), symbol("n_tokens")
sigma_e, b, b_back = symbol("sigma_e"), symbol("branch_variance"), entry("b'")
M, b_0, b_0_back = entry("M"), entry("b_0"), entry("b_0'")
H = sp.harmonic(T)

LIMITS = {
    "vanilla-growth": (sp.sqrt(d), sp.sqrt(sp.Rational(2, 5) + H / (5 * T))),
    "scaled-embed-growth": (1, sp.sqrt(sp.Rational(7, 5) + H / (5 * T))),
    "embed-ln-growth": (1, sp.sqrt(sp.Rational(29, 25) + 2 * H / (25 * T))),
    "vanilla-excess": (sp.sqrt(d / N), 9 / sp.sqrt(5)),
    "vanilla-excess-attended": (1, 9 * sp.sqrt(T / H)),
    "scaled-embed-excess": (1 / sp.sqrt(N), 9 / sp.sqrt(5)),
    "embed-ln-excess": (1 / sp.sqrt(N), 9 * sp.sqrt(2) / 5),
    "scaled-embed-product": (sp.sqrt(N), 9 / sp.sqrt(5)),
    "large-shortcut-growth": (1, sp.Integer(1)),
    "large-shortcut-share": (1 / sigma_e**2, N * b),
    "small-shortcut-growth": (1 / sigma_e, sp.sqrt(N * b)),
    "small-shortcut-share": (1, sp.Integer(1)),
    "pre-ln-last-gradient": (1 / sp.sqrt(N), sp.sqrt((1 + b) / b)),
    "pre-ln-imbalance": (sp.log(N), b_back / b),
    "post-ln-imbalance": (N, sp.log((1 + b_back) / (1 + b)) / 2),
    "deepnorm-imbalance": (1 / sp.sqrt(M), (b_0_back - b_0) / (4 * sp.sqrt(2))),
}


@pytest.mark.parametrize("name", ASYMPTOTICS)
def test_asymptotics(name: str) -> None:
    found = ASYMPTOTICS[name]()
    over, limit = LIMITS[name]
    assert sp.simplify(found.over - over) == 0
    assert sp.simplify(sp.expand_log(found.limit**2 - limit**2, force=True)) == 0
    values = {d: 10**12, N: 24, T: 1024, sigma_e: 0.7, b: 0.02, b_back: 0.03, b_0: 0.02, b_0_back: 0.03}
    # Against the logarithm of the depth a constant fades slowly; everything else is there at 10^12.
    logarithmic = found.over == sp.log(N)
    values[found.variable] = 10.0 ** (300 if logarithmic else 12 if found.end == sp.oo else -12)
    ratio = evaluate(found.expression / found.over, values) / evaluate(found.limit, values)
    assert ratio == pytest.approx(1, abs=0.01 if logarithmic else 1e-5)
    assert found.statement in render_asymptotics()


def test_growth_does_not_depend_on_depth() -> None:
    for name in ("vanilla-growth", "scaled-embed-growth", "embed-ln-growth"):
        found = ASYMPTOTICS[name]()
        assert N not in found.expression.free_symbols
        assert N not in found.limit.free_symbols


def test_first_layer_excess_at_350m() -> None:
    sizes = {d: 1024, N: 24}
    names = ("vanilla-excess", "scaled-embed-excess", "embed-ln-excess")
    found = [float(ASYMPTOTICS[name]().expression.subs(sizes)) for name in names]
    assert found == pytest.approx([26.3, 0.82, 0.52], rel=0.01)
