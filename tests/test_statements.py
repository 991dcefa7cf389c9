"""Every statement of the catalogue as a formula: estimates by hand, expressions, composition, sources, answers.

A statement that is registered tomorrow is tested by its quantity, and the tests fail until it has what its kind asks
for: an upper bound a bench (`test_upper_bounds`), a sharp value a measurement (`test_sharp_values`), an estimate a hand
calculation (here).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from functools import cache
from random import Random
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import sympy as sp
from helpers.benches import eye
from helpers.catalogue import ALL, ESTIMATES, SHARP, value
from helpers.weights import normal
from hypothesis import assume, given, reject, settings
from hypothesis import strategies as st
from torch import Tensor

from empirics import observables
from empirics.attack import Observation, observe
from empirics.benches import Undefined, find_bench
from empirics.spectral import explicit_jacobian
from theory import experts_outlier
from theory.__main__ import main
from theory.architecture import preset
from theory.sources import REFERENCES
from theory.statements import Answer, OutOfRange, Statement, find, register, residual
from theory.symbols import SYMBOLS, symbol

# --- estimates --------------------------------------------------------------------------------------------------

# 350M: d = 1024, d_ffn = 4096, N = 24; (sqrt d + sqrt d_ffn)^2 = (32 + 64)^2 = 9216; sigma_1 = sqrt(2/5120).
_SIGMA = math.sqrt(2 / 5120)

BY_HAND: dict[str, list[tuple[dict[str, float], float, float]]] = {
    "norm-jacobian-estimate": [({"sigma_x": 0.25}, 4.0, 1e-15)],
    "rmsnorm-jacobian-estimate": [({"rms_x": 0.25}, 4.0, 1e-15)],
    # sqrt(0.75^2 + 1) = 1.25
    "embedding-estimate": [
        ({"embedding_gradient": 0.5, "multiplier": 4.0, "position_rows": 0}, 2.0, 1e-15),
        ({"embedding_gradient": 1.0, "multiplier": 0.75, "position_rows": 1}, 1.25, 1e-15),
    ],
    "embedding-normalised-estimate": [
        ({"embedding_gradient": 0.5, "multiplier": 0.75, "position_rows": 1, "sigma_e": 0.25}, 2.5, 1e-15),
    ],
    # sqrt(0.5 * 0.5^2 * 4 + 0.14) = 0.8; times 3 * 0.25 * (2 + 4)^2 / 2.
    "ffn-gated-estimate": [
        (
            {
                "sigma_1": 0.5,
                "sigma_2": 3.0,
                "sigma_3": 0.25,
                "sigma_xp": 2.0,
                "d": 4,
                "d_ffn": 16,
                "slope_square": 0.5,
                "value_square": 0.14,
            },
            10.8,
            1e-15,
        )
    ],
    "gaussian-opnorm-estimate": [({"sigma": 0.5, "rows": 16, "columns": 9}, 3.5, 1e-15)],
    "ffn-estimate": [
        ({"sigma_1": 0.5, "sigma_2": 0.25, "sigma_xp": 2.0, "d": 4, "d_ffn": 16}, 2.25, 1e-15),
        *(
            (
                {"sigma_1": _SIGMA, "sigma_2": _SIGMA / math.sqrt(48), "sigma_xp": sigma_xp, "d": 1024, "d_ffn": 4096},
                excess,
                0.01,  # the numbers are stated to two or three digits
            )
            for sigma_xp, excess in ((_SIGMA, 26.3), (math.sqrt(2 / 5), 0.82), (1.0, 0.52))
        ),
    ],
    "attention-estimate": [({"sigma_O": 0.5, "sigma_x": 2.0, "d": 9, "J_Z": 0.7}, 1.05, 1e-15)],
}


@pytest.mark.parametrize("name", ESTIMATES)
def test_estimate_equals_a_hand_calculation(name: str) -> None:
    assert name in BY_HAND, f"calculate {name} once by hand in tests/test_statements.py"
    for values, expected, relative in BY_HAND[name]:
        assert value(name, values) == pytest.approx(expected, rel=relative)


def test_eq_15_of_the_350m_preset() -> None:
    """The same numbers from the preset: its recipe is the one the hand calculation used."""
    vanilla = preset("350m")
    expected = {"vanilla": 26.3, "scaled-embed": 0.82, "embed-ln": 0.52}
    for treatment, excess in expected.items():
        a = vanilla.with_embedding(treatment)  # type: ignore[arg-type]
        sigma_e = 1.0 if a.embedding_norm else a.embedding_multiplier * a.stds.embedding
        values = {"sigma_1": a.stds.ffn_in, "sigma_2": a.stds.ffn_out, "d": a.d_model, "d_ffn": a.d_ffn}
        assert value("ffn-estimate", values | {"sigma_xp": sigma_e}) == pytest.approx(excess, rel=0.01)


# --- expressions, composition, sources --------------------------------------------------------------------------

# Where formulas are compared: widths from 64 (a sharp value's domain), stds of initialised matrices.
_INTEGERS = {
    "rows": (64, 2048), "columns": (64, 2048), "d": (64, 2048), "d_ffn": (64, 8192), "n_heads": (4, 64),
    "d_head": (16, 128), "kv_group": (1, 4),
}  # fmt: skip


# Seconds each at the sizes they are for, so compared at tiny ones.
SECONDS = (
    "attention-simulated", "attention-half-layer-sharp", "attention-half-layer-simulated",
    "attention-variants-simulated", "attention-uneven-sharp", "attention-full-simulated",
    "experts-sharp-relu", "experts-sharp-gated-silu", "tied-simulated",
)  # fmt: skip
_TINY = {
    "kv_group": (1, 1),
    "d_head": (2, 2),
    "alibi": (0, 1),
    "qk_norm": (0, 2),
    "n_chosen": (1, 2),
    "vocab_size": (3, 9),
}


@st.composite
def symbol_values(draw: st.DrawFn, statement: Statement) -> dict[str, float]:
    values: dict[str, float] = {}
    slow = statement.name in SECONDS
    for name in statement.parameters:
        if SYMBOLS[name].integer:
            values[name] = draw(st.integers(*(_TINY.get(name, (2, 3)) if slow else _INTEGERS.get(name, (1, 64)))))
        elif name == "rotary":
            values[name] = draw(st.sampled_from([0.0, 1.0]))
        elif name == "gates_renormalised":
            values[name] = draw(st.integers(0, 1))
        elif name == "alibi":  # excludes RoPE
            values[name] = 0 if values["rotary"] else draw(st.integers(0, 1))
        elif name.startswith("sigma"):
            values[name] = draw(st.floats(1e-3, 0.05))
        else:
            values[name] = draw(st.floats(1e-2, 5.0))
    return values


@cache
def expression_as_function(name: str) -> Callable[..., Any]:
    return sp.lambdify([symbol(parameter) for parameter in ALL[name].parameters], ALL[name].expression, modules="numpy")


@pytest.mark.parametrize("name", [name for name in ALL if name not in SHARP])
@given(data=st.data())
def test_expression_is_the_formula(name: str, data: st.DataObject) -> None:
    """The sympy expression, turned into a function, gives what `evaluate` gives, to rounding of a few operations."""
    compare_expression(name, data)


@pytest.mark.parametrize("name", SHARP)
@settings(max_examples=10)
@given(data=st.data())
def test_sharp_expression_is_the_formula(name: str, data: st.DataObject) -> None:
    """The same, of what mostly calls one function by name, slowly."""
    compare_expression(name, data)


def compare_expression(name: str, data: st.DataObject) -> None:
    statement = ALL[name]
    values = data.draw(symbol_values(statement))
    with patch.object(experts_outlier, "MOST_ROUTERS", 2):  # quickly, of either
        computed = float(expression_as_function(name)(*values.values()))
        assert computed == pytest.approx(float(statement.evaluate(values)), rel=1e-12)


@pytest.mark.parametrize("name", ALL)
def test_expression_prints_and_evaluates_exactly(name: str) -> None:
    """Substituting numbers agrees as well, wherever the expression is elementary; and it has a LaTeX form."""
    from theory.symbols import latex_names

    expression = ALL[name].expression
    assert expression.free_symbols <= {symbol(parameter) for parameter in ALL[name].parameters}
    assert sp.latex(expression, symbol_names=latex_names())
    if expression.atoms(sp.core.function.AppliedUndef):
        return
    values = {parameter: 64 if SYMBOLS[parameter].integer else Fraction(3, 8) for parameter in ALL[name].parameters}
    exact = expression.subs({symbol(parameter): sp.sympify(number) for parameter, number in values.items()})
    numbers = {parameter: float(number) for parameter, number in values.items()}
    assert float(exact.evalf(30)) == pytest.approx(value(name, numbers), rel=1e-12)


def test_arrays_broadcast() -> None:
    sigma = np.array([0.1, 0.2])[:, None]
    rows = np.array([64, 128, 256])
    for name in ("gaussian-opnorm-estimate", "gaussian-opnorm-sharp"):
        table = find(name).evaluate({"sigma": sigma, "rows": rows, "columns": 64})
        assert table.shape == (2, 3)
        assert table[1, 2] == pytest.approx(value(name, {"sigma": 0.2, "rows": 256, "columns": 64}), rel=1e-15)
    edges = find("ffn-sharp-gelu").evaluate(
        {"sigma_1": 0.05, "sigma_2": 0.05, "d": 256, "d_ffn": np.array([256, 1024])}
    )
    assert edges.shape == (2,)


def test_residual_then_repeat() -> None:
    """`residual(f).then(residual(g)).repeat(n)` is ((1 + f)(1 + g))^n, and remains a bound if both were."""
    norm, branch = find("ffn-upper"), find("norm-jacobian-upper")
    layer = residual(norm).then(residual(branch)).repeat(3)
    values = {"lipschitz": 1.5, "opnorm_1": 2.0, "opnorm_2": 0.5, "gain": 3.0, "s": 2.0}
    assert layer.evaluate(values) == pytest.approx(((1 + 1.5) * (1 + 1.5)) ** 3, rel=1e-14)
    assert layer.kind == "upper"
    assert set(layer.parameters) == set(values)
    assert set(layer.assumptions) == {*norm.assumptions, *branch.assumptions}
    assert sp.simplify(layer.expression - (residual(norm).expression * residual(branch).expression) ** 3) == 0
    assert not layer.tight


@pytest.mark.parametrize(
    ("first", "after", "kind"),
    [
        ("ffn-upper", "norm-jacobian-upper", "upper"),
        ("ffn-upper", "norm-jacobian-estimate", "estimate"),
        ("norm-jacobian-estimate", "ffn-upper", "estimate"),
        ("ffn-sharp-relu", "attention-sharp", "estimate"),  # a product of sharp norms predicts nothing
        ("ffn-sharp-relu", "ffn-upper", "estimate"),
        ("ffn-estimate", "attention-estimate", "estimate"),
    ],
)
def test_kind_of_a_composition(first: str, after: str, kind: str) -> None:
    for composed in (find(first).then(find(after)), residual(find(first)).then(find(after)).repeat(2)):
        assert composed.kind == kind
        assert composed.target is None


@pytest.mark.parametrize("name", ALL)
def test_residual_and_repeat_keep_only_bounds(name: str) -> None:
    expected = "upper" if ALL[name].kind == "upper" else "estimate"
    assert residual(ALL[name]).kind == ALL[name].repeat(2).kind == expected


@given(random=st.randoms(use_true_random=False), width=st.integers(1, 6))
def test_composed_bound_holds_for_a_stack(random: Random, width: int) -> None:
    """|(I + J_2)(I + J_1)| <= (1 + bound_1)(1 + bound_2) for two feed-forward half-layers on one token."""
    branch = find("ffn-branch-upper")
    bench, covers = find_bench("ffn_branch"), {**branch.covers, "d_model": (width,), "n_tokens": (1,)}
    x = normal(random.getrandbits(31), 1, width)
    jacobian, bound, rounding = eye(width), 1.0, 0.0
    for _ in range(2):
        try:
            case = bench.draw(random, "wild", covers, attempts=1)
        except Undefined:
            reject()
        module, _ = case.fitted()
        assume(bench.defined(module, x))
        observation = observe(branch, module, x, **case.choices)

        def half(x: Tensor, module: Any = module) -> Tensor:
            return x + module(x)

        jacobian = explicit_jacobian(half, x) @ jacobian
        factor = float(residual(branch).evaluate(observation.numbers))
        bound, rounding = bound * factor, rounding * factor + observation.rounding * bound
        x = half(x)
    assert not Observation(values={}, norm=observables.opnorm(jacobian), rounding=rounding).violates(bound)


@pytest.mark.parametrize("name", ALL)
def test_statement_is_sourced_and_argued(name: str) -> None:
    statement = ALL[name]
    assert statement.name == name
    assert statement.source.key in REFERENCES
    assert statement.source.label
    assert statement.why
    assert all(parameter in SYMBOLS for parameter in statement.parameters)


def test_errors_parameterthe_remedy() -> None:
    with pytest.raises(ValueError, match=r"unknown statement 'ffn-uper'; did you mean ffn-upper"):
        find("ffn-uper")
    with pytest.raises(ValueError, match="ffn-upper needs a value for opnorm_1, opnorm_2"):
        find("ffn-upper").evaluate({"lipschitz": 1.0})
    fields = {field: getattr(find("ffn-upper"), field) for field in Statement.__dataclass_fields__}
    with pytest.raises(ValueError, match="set target="):
        Statement(**(fields | {"kind": "sharp", "tight": False}))
    with pytest.raises(ValueError, match="unknown kind 'uper'; use one of estimate, upper, sharp"):
        Statement(**(fields | {"kind": "uper"}))
    with pytest.raises(ValueError, match="drop tight=True"):
        Statement(**(fields | {"kind": "estimate"}))

    def ffn_upper() -> Statement:
        return find("ffn-upper")

    with pytest.raises(
        ValueError, match=r"two statements are called 'ffn-upper', in theory/feedforward.py and in \S+\.py"
    ):
        register(ffn_upper)
    assert find("ffn-upper") is ALL["ffn-upper"]


@pytest.mark.parametrize("name", ["half-layer-sharp-relu", "half-layer-sharp-gated-silu"])
def test_numbers_beyond_floating_point_are_named_and_no_file_is_blamed(name: str) -> None:
    values = {"sigma_1": 0.02, "sigma_2": 0.02, "sigma_3": 0.02, "s": 1e-300, "d": 256, "d_ffn": 1024}
    with pytest.raises(OutOfRange, match=r"range of floating-point numbers at .*; use less extreme ones") as error:
        find(name).evaluate(values)
    assert "s=1e-300" in str(error.value)
    assert "file" not in str(error.value)
    assert find(name).predict(values) == Answer(value=None, reasons=("it has no finite value here",))
    assert find(name).evaluate(values | {"s": 1.0}) > 1  # the control
    assert find(name).evaluate(values | {"s": 1e300}) == 1  # a branch that adds nothing overflows nowhere


def test_a_sharp_statement_answers_unknown_outside_its_domain() -> None:
    whole = {"heads fill the stream": lambda n_heads, d_head, d: n_heads * d_head == d}
    statement = replace(find("gaussian-opnorm-sharp"), relations=whole)
    inside = {"sigma": 1.0, "rows": 64, "columns": 64, "n_heads": 4, "d_head": 16, "d": 64}
    assert statement.predict(inside).value == pytest.approx(float(statement.evaluate(inside)))
    assert statement.predict(inside | {"n_heads": 3}).reasons == ("it does not hold that heads fill the stream",)
    assert statement.predict(inside | {"rows": 63}).reasons == ("rows=63 is not within 64 to inf",)
    assert statement.predict({k: v for k, v in inside.items() if k != "d"}).reasons == ("d is not given",)
    assert statement.predict(inside | {"sigma": math.inf}).reasons == ("it has no finite value here",)
    assert statement.predict(inside | {"sigma": math.nan}).reasons == ("sigma=nan is not >= 0",)
    assert all(statement.predict(inside | {"rows": n}).value is None for n in (0, 1, 63))
    with pytest.raises(ValueError, match="no prediction but of kind upper"):
        find("ffn-upper").predict(inside)


# --- where a statement is claimed -------------------------------------------------------------------------------


def test_statements_say_where_they_are_claimed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["statements", "--kind", "sharp", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["gaussian-opnorm-sharp"]["domain"]["rows"] == [64, None]
    assert "alibi and qk_norm are whole numbers" in rows["attention-variants-simulated"]["relations"]


def test_what_a_symbol_cannot_be_is_outside() -> None:
    """Half a head and the like: a sharp value of it would be a number without a meaning."""
    statement = find("ffn-sharp-relu")
    good = {"sigma_1": 0.1, "sigma_2": 0.1, "d": 256, "d_ffn": 1024}
    assert statement.outside(good) == ()
    assert statement.outside(good | {"d": 256.5}) == ("d=256.5 is not integer >= 1",)
    assert statement.outside(good | {"sigma_1": -0.1}) == ("sigma_1=-0.1 is not >= 0",)
    assert statement.outside(good | {"d_ffn": math.nan})
    variants = {
        "c_VO": 1.0, "d": 128, "n_heads": 4, "d_head": 32, "kv_group": 1, "n_tokens": 32, "logit_variance": 1.0,
        "rotary": 0.0, "rope_base": 1e4, "alibi": 1, "n_seen": 32, "softcap": 0.0, "qk_norm": 0,
        "numbers": 32 * 128,
    }  # fmt: skip
    simulated = find("attention-variants-simulated")
    assert simulated.outside(variants) == ()
    for name, wrong, words in (
        ("alibi", 0.5, "0 or 1"),
        ("n_heads", 4.5, "integer >= 1"),
        ("qk_norm", 1.5, "0, 1 or 2"),
    ):
        assert f"{name}={wrong} is not {words}" in simulated.outside(variants | {name: wrong})


@pytest.mark.parametrize(
    ("change", "reasons"),
    [
        ({"n_heads": -4}, ("n_heads=-4 is not integer >= 1",)),
        ({"d": math.nan}, ("d=nan is not within 256 to inf", "d=nan is not integer >= 1")),
        ({"d": math.inf}, ("d=inf is not integer >= 1",)),
        ({"kv_group": 0}, ("kv_group=0 is not integer >= 1",)),
    ],
)
def test_relations_are_not_asked_of_what_is_no_size(change: dict[str, float], reasons: tuple[str, ...]) -> None:
    """They solve for an edge, which has none there: unknown, and not an error of the solver."""
    sizes = {"c_VO": 1.0, "d": 256, "n_heads": 4, "d_head": 64, "n_tokens": 16, "logit_variance": 0.1, "kv_group": 1}
    for name in ("attention-sharp", "attention-half-layer-sharp"):
        assert find(name).predict(sizes | {"s": 1.0} | change).reasons == reasons
