"""The attack itself: it breaks no true bound and every false one, and what it finds can be replayed."""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import sympy as sp
import torch
from helpers.catalogue import QUANTITIES, TIGHT, UPPER
from helpers.weights import normal
from hypothesis import given
from hypothesis import strategies as st

from empirics import falsify, observables
from empirics.adversaries import MATRICES, STRUCTURED_MATRICES, STYLES, TOKENS, matrix, tokens
from empirics.attack import Observation, attack, bound_of, climb, evaluate
from empirics.benches import INPUT, find_bench, replay
from theory import functions
from theory.quantities import quantity
from theory.statements import Statement, find

DEFAULT = 200  # evaluations that a user gets without asking


def changed(statement: Statement, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Statement:
    """The statement with other values put into its formula."""
    formula = statement.formula

    def wrong(**values: Any) -> Any:
        return formula(**change(values))

    wrong.__signature__ = inspect.signature(formula)  # type: ignore[attr-defined]
    return replace(statement, formula=wrong)


# --- true bounds hold, false ones do not --------------------------------------------------------------------------


@pytest.mark.parametrize("name", UPPER)
def test_attack_breaks_no_bound_and_its_witness_replays(name: str) -> None:
    found = attack(UPPER[name], budget=60, seed=1)
    assert found["evaluations"] == 60
    assert found["violations"] == 0, found
    assert 0 < found["worst_ratio"] <= 1 + 1e-9
    witness = json.loads(json.dumps(found["witness"]))
    observation, bound = evaluate(UPPER[name], replay(witness))
    assert observation.ratio(bound) == pytest.approx(found["worst_ratio"], rel=1e-12)  # the same computation


@pytest.mark.parametrize("name", TIGHT)
def test_attack_breaks_a_tight_bound_that_is_a_tenth_too_small(name: str) -> None:
    found = attack(UPPER[name], budget=DEFAULT, shrink=0.9)
    assert found["violations"] > 0
    assert 1 < found["worst_ratio"] <= (1 + 1e-9) / 0.9


@pytest.mark.parametrize("name", TIGHT)
def test_climbing_alone_reaches_a_tight_bound(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a structured case to start from."""
    monkeypatch.setattr("empirics.attack.SHARES", {"plain": 0.1, "wild": 0.1})
    assert attack(UPPER[name], budget=2 * DEFAULT)["worst_ratio"] > 0.9


# A term left out or a factor forgotten, at two seeds that do not depend on each other. A climb has to find the few
# cases on which that shows: a query bias of the right size, keys across the input, one head width.
FALSE: dict[str, list[tuple[str, Callable[[dict[str, Any]], dict[str, Any]], int]]] = {
    "ffn-upper": [("no slope above 1", lambda v: v | {"lipschitz": 1.0}, DEFAULT)],
    "ffn-gated-upper": [("the slope's term alone", lambda v: v | {"gate_slope": 0.7 * v["gate_slope"]}, DEFAULT)],
    "attention-upper-apriori": [
        ("no group factor", lambda v: v | {"kv_group": 1}, DEFAULT),
        ("no query bias", lambda v: v | {"head_VQ": 0.0}, 6 * DEFAULT),
    ],
    "attention-upper-aposteriori": [
        ("no group factor", lambda v: v | {"kv_group": 1}, DEFAULT),
        ("no key term", lambda v: v | {"key_term": 0.0}, 3 * DEFAULT),
        ("no query term", lambda v: v | {"query_term": 0.0}, 3 * DEFAULT),
    ],
    "attention-general-upper": [("no window", lambda v: v | {"n_seen": 1}, DEFAULT)],
    "attention-blocks-upper": [
        ("no deviation of heads", lambda v: v | {"P_deviation": 0.0}, DEFAULT),
        ("no blocks through the keys", lambda v: v | {"key_blocks": 0.0}, DEFAULT),
        ("no blocks through the queries", lambda v: v | {"query_blocks": 0.0}, DEFAULT),
    ],
    "attention-window-upper": [("no rows beyond the window", lambda v: v | {"n_tokens": v["n_seen"]}, DEFAULT)],
    "attention-full-probability-upper": [("no spread", lambda v: v | {"logit_spread": 0.0}, DEFAULT)],
    "attention-probability-upper": [("no spread", lambda v: v | {"logit_spread": 0.0}, DEFAULT)],
    "gaussian-opnorm-upper": [("no deviation", lambda v: v | {"t": 0.0}, DEFAULT)],
}


@pytest.mark.parametrize(
    ("name", "change", "budget"),
    [
        pytest.param(name, change, budget, id=f"{name}: {what}")
        for name, rows in FALSE.items()
        for what, change, budget in rows
    ],
)
def test_attack_finds_what_is_missing(name: str, change: Callable[..., dict[str, Any]], budget: int) -> None:
    found = attack(changed(UPPER[name], change), budget=budget)
    assert found["violations"] > 0, found["worst_ratio"]


def test_attack_finds_the_key_bias_that_rope_turns() -> None:
    """Where there are biases and something turns; few of all cases have both and a bias of the right size."""
    without = changed(UPPER["attention-upper-apriori"], lambda v: v | {"head_VK": 0.0})
    turning = {"positions": ("rope",), "rope_fraction": (0.25, 0.5, 1.0), "biases": (True,)}
    narrowed = replace(without, covers={**without.covers, **turning})
    assert any(attack(narrowed, budget=4 * DEFAULT, seed=seed)["violations"] for seed in range(4))


def test_climb_ascends() -> None:
    """Its last ratio is above its first, from most starts; and it moves the weights and the input."""
    gains, statement = [], UPPER["attention-upper-aposteriori"]
    for seed in range(8):
        start = find_bench("attention_jacobian").draw(Random(seed), "plain", statement.covers)
        steps = list(climb(statement, start, Random(seed)))
        ratios = [observation.ratio(bound) for _, observation, bound in steps]
        gains.append(max(ratios) / ratios[0])
        moved = {name for name, tensor in steps[-1][0].tensors.items() if not tensor.equal(start.tensors[name])}
        assert {INPUT, "query.weight", "output.weight"} <= moved
    assert np.median(gains) > 1.1


def test_same_seed_same_attack_and_another_seed_another() -> None:
    one, same, other = (attack(UPPER["ffn-gated-upper"], budget=20, seed=seed) for seed in (3, 3, 4))
    assert one == same
    assert one["witness"] != other["witness"]


def test_several_tokens_are_counted_apart() -> None:
    """One token attains the bound with any logits; what several attain is less, and is of cases that have several."""
    found = attack(UPPER["attention-upper-apriori"], budget=DEFAULT)
    assert found["worst_ratio"] > 0.999
    assert 0 < found["tightness"]["several"] < 0.9
    assert attack(UPPER["ffn-upper"], budget=10)["tightness"]["several"] is None
    bench = find_bench("attention_jacobian")
    assert bench.several is not None
    cases = [bench.draw(Random(seed), "wild") for seed in range(60)]
    several = [case for case in cases if bench.several(*case.fitted())]
    assert 0 < len(several) < len(cases)
    assert all(case.choices["n_tokens"] > 1 for case in several)
    equal = replace(several[0], tensors={**several[0].tensors, INPUT: several[0].tensors[INPUT][:1].expand(4, -1)})
    assert not bench.several(*equal.fitted())
    embedding = find_bench("embedding_jacobian")
    assert embedding.several is not None
    for seed in range(20):
        case = embedding.draw(Random(seed), "wild")
        assert embedding.several(*case.fitted()) == (len(set(case.choices["sequence"])) > 1)


@pytest.mark.slow
@pytest.mark.parametrize("name", UPPER)
def test_no_violation_in_ten_thousand_evaluations(name: str) -> None:
    assert attack(UPPER[name], budget=10_000, seed=2)["violations"] == 0


def test_ratio_allows_rounding_and_no_more() -> None:
    one = Observation(values={}, norm=torch.tensor(2.0, dtype=torch.float64), rounding=0.5)
    assert not one.violates(1.5)
    assert one.violates(1.5 * (1 - 1e-8))
    assert one.violates(0.0)
    assert one.violates(math.nan)
    assert one.ratio(math.inf) == 0
    assert not Observation(values={}, norm=torch.zeros(())).violates(0.0)
    assert Observation(values={}, norm=torch.tensor(math.nan)).violates(1.0)


# --- the benches --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", QUANTITIES)
@pytest.mark.parametrize("style", STYLES)
def test_bench_draws_defined_cases_of_every_choice(name: str, style: Any) -> None:
    bench, random = find_bench(name), Random(5)
    assert quantity(name).name == bench.quantity == name
    seen: dict[str, set[Any]] = {choice: set() for choice in bench.choices}
    for _ in range(400):
        case = bench.draw(random, style)
        for choice, value in case.choices.items():
            seen[choice].add(value)
        module, x = case.fitted()
        assert bench.defined(module, x)
        assert all(tensor.dtype == torch.float64 for tensor in case.tensors.values())
    # 400 draws miss one of 40 sizes with a chance of 4e-5
    assert all(seen[choice] == set(values) for choice, values in bench.choices.items())


@pytest.mark.parametrize("name", QUANTITIES)
def test_truth_and_symbols_are_differentiable(name: str) -> None:
    """Against central differences, along a random direction of all tensors at once, from where no norm is a tie."""
    bench = find_bench(name)
    covering = [statement for statement in UPPER.values() if statement.quantity.name == name]
    for seed, statement in enumerate(covering):
        # The constant is a number wherever it is from, and these two have the same everywhere.
        constant = {"activation": ("identity", "relu")} if "lipschitz" in statement.parameters else {}
        case = bench.draw(Random(seed), "plain", {**statement.covers, **constant})
        off = {key: tensor + normal(seed + 5, *tensor.shape) / 4 for key, tensor in case.tensors.items()}
        case = replace(case, tensors=off)
        along = {key: normal(seed + 9, *tensor.shape) for key, tensor in case.tensors.items()}

        def height(step: torch.Tensor, case: Any = case, along: Any = along, statement: Any = statement) -> Any:
            moved = {key: tensor + step * along[key] for key, tensor in case.tensors.items()}
            observation, _ = evaluate(statement, replace(case, tensors=moved))
            bound = torch.as_tensor(statement.evaluate(observation.values), dtype=torch.float64)
            return observation.norm.log() - bound.log()

        step = torch.zeros((), dtype=torch.float64, requires_grad=True)
        value = height(step)
        if not value.requires_grad:
            assert not statement.parameters or bench.lawful
            continue
        (slope,) = torch.autograd.grad(value, step)
        h = 1e-5
        above, below = (height(torch.tensor(sign * h, dtype=torch.float64)).item() for sign in (1, -1))
        assert slope.item() == pytest.approx((above - below) / (2 * h), rel=1e-4, abs=1e-6)


@given(seed=st.integers(0, 2**31 - 1), rows=st.integers(1, 6), columns=st.integers(1, 6))
def test_adversaries_have_their_shapes(seed: int, rows: int, columns: int) -> None:
    for kind in (*MATRICES, *STRUCTURED_MATRICES):
        drawn = matrix(kind, seed, rows, columns)
        assert drawn.shape == (rows, columns)
        assert (drawn.abs().max() > 0) or kind in ("zero", "sparse")
    assert torch.linalg.matrix_rank(matrix("rank-one", seed, rows, columns)) == 1
    gram = matrix("orthogonal", seed, rows, columns)
    singular = torch.linalg.svdvals(gram)
    assert torch.allclose(singular, torch.ones_like(singular))
    for kind in TOKENS:
        assert tokens(kind, seed, rows, columns).shape == (rows, columns)


def test_explicit_jacobian_is_the_difference_quotient() -> None:
    case = find_bench("attention_jacobian").draw(Random(1), "plain")
    module, x = case.fitted()
    function = observables.PlainAttention(module)  # type: ignore[arg-type]
    found, h = observables.jacobian(function, x[None]), 1e-6
    for column in range(x.numel()):
        step = torch.zeros(x.numel(), dtype=torch.float64)
        step[column] = h
        step = step.view_as(x)[None]
        quotient = (function(x[None] + step) - function(x[None] - step)) / (2 * h)
        assert torch.allclose(found[:, column], quotient.flatten(), rtol=1e-5, atol=1e-8)


def test_covers_of_a_composition_are_what_both_cover() -> None:
    plain, gated, norm = find("ffn-upper"), find("ffn-gated-upper"), find("norm-jacobian-upper")
    assert plain.then(gated).covers == {"gated": ()}
    assert norm.then(plain).covers == plain.repeat(2).covers == {"gated": (False,)}


# --- formulas on tensors ------------------------------------------------------------------------------------------


@given(left=st.floats(1e-3, 1e3), right=st.floats(1e-3, 1e3))
def test_functions_agree_on_numbers_and_tensors(left: float, right: float) -> None:
    one = torch.tensor(left, dtype=torch.float64, requires_grad=True)
    two = torch.tensor(right, dtype=torch.float64)
    for name in ("sqrt", "log"):
        assert getattr(functions, name)(one).item() == pytest.approx(float(getattr(functions, name)(left)), rel=1e-15)
    small = one / 1e3
    assert functions.exp(small).item() == pytest.approx(float(functions.exp(left / 1e3)), rel=1e-15)
    for name in ("minimum", "maximum"):
        function = getattr(functions, name)
        expected = float(function(left, right))
        for found in (function(one, right), function(left, two), function(one, two), function(right, one)):
            assert found.item() == expected
    assert functions.opaque("halved", lambda value: value / 2, one) == left / 2
    (slope,) = torch.autograd.grad(functions.sqrt(one), one)
    assert slope.item() == pytest.approx(1 / (2 * math.sqrt(left)), rel=1e-14)


def test_exp_of_a_tensor_leaves_no_gradient_of_what_a_minimum_discards() -> None:
    spread = torch.tensor(1e4, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(functions.minimum(2.0, functions.exp(spread)), spread)
    assert slope.item() == 0
    assert float(functions.exp(1e4)) == math.inf  # of a number it stays infinite: an infinite bound is still one
    assert functions.exp(sp.Integer(1)) == sp.E


@pytest.mark.parametrize("name", [name for name in UPPER if "logit_spread" in UPPER[name].parameters])
def test_a_bound_on_loud_logits_overflows_nowhere(name: str) -> None:
    """e^D times a sum beyond the largest double, e^709.78, is infinite and loses to the other bound; no warning."""
    values = dict.fromkeys(UPPER[name].parameters, 3.0) | {"n_tokens": 2**12, "n_seen": 2**12}
    given = {parameter: values[parameter] for parameter in UPPER[name].parameters}
    bounds = [float(UPPER[name].evaluate(given | {"logit_spread": spread})) for spread in (709.0, 709.7, 710.0, 1e4)]
    assert math.isfinite(bounds[0])
    assert bounds == bounds[:1] * 4
    assert bounds[0] > float(UPPER[name].evaluate(given | {"logit_spread": 0.0}))
    spreads = np.array([0.0, 709.7, 1e4])
    assert UPPER[name].evaluate(given | {"logit_spread": spreads}).tolist()[1:] == bounds[:2]


def test_two_processes_give_the_records_of_one(tmp_path: Path) -> None:
    some = {name: UPPER[name] for name in ("ffn-upper", "softmax-jacobian", "norm-jacobian-upper")}
    options: dict[str, Any] = {"budget": 6, "seed": 0, "shrink": 1.0}
    for processes in (1, 2):
        falsify.attack_all(some, tmp_path / f"{processes}.json", processes=processes, **options)
    assert (tmp_path / "1.json").read_bytes() == (tmp_path / "2.json").read_bytes()


def test_formula_of_a_fraction_is_a_number() -> None:
    case = find_bench("softmax_jacobian").draw(Random(0))
    observation, bound = evaluate(UPPER["softmax-jacobian"], case)
    assert bound == Fraction(1, 2) == bound_of(UPPER["softmax-jacobian"], observation)
