"""Numbers that the theory refuses: one line that names the remedy; and what a failure probability pays for."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from theory.architecture import preset
from theory.arguments import require_failure, require_tokens
from theory.attention_simulation import simulated_norms
from theory.evaluate import closed_form, closed_form_sweep
from theory.grams import Blocks
from theory.growth import gradient_growth, growth_closed_form
from theory.random_matrix import cesaro_opnorm
from theory.stack import _embedding_reach, paper_bound, rigorous_bound
from theory.verdict import check

TINY = preset("tiny")
LEARNED = replace(TINY, positions="learned", context=16)
OF_TOKENS: dict[str, Callable[[Any], Any]] = {
    "gradient_growth": lambda n: gradient_growth(TINY, n),
    "growth_closed_form": lambda n: growth_closed_form(TINY, n),
    "paper_bound": lambda n: paper_bound(TINY, n),
    "rigorous_bound": lambda n: rigorous_bound(TINY, n),
    "check": lambda n: check(TINY, n),
    "closed_form": lambda n: closed_form(np.array([64]), np.array([2]), "vanilla", n),
    "closed_form_sweep": lambda n: closed_form_sweep([64], [2], None, n),
    "simulated_norms": lambda n: simulated_norms(TINY, n),
    "blocks": Blocks.of,
    "cesaro_opnorm": cesaro_opnorm,
}
LEARNS: dict[str, Callable[[int], Any]] = {
    "gradient_growth": lambda n: gradient_growth(LEARNED, n),
    "growth_closed_form": lambda n: growth_closed_form(LEARNED, n),
    "paper_bound": lambda n: paper_bound(LEARNED, n),
    "rigorous_bound": lambda n: rigorous_bound(LEARNED, n),
    "check": lambda n: check(LEARNED, n),
    "simulated_norms": lambda n: simulated_norms(LEARNED, n),
}


@pytest.mark.parametrize("name", OF_TOKENS)
@pytest.mark.parametrize("n_tokens", [0, -3])
def test_no_token_is_refused(name: str, n_tokens: int) -> None:
    with pytest.raises(ValueError, match=rf"n_tokens={n_tokens} leaves no token; use at least 1"):
        OF_TOKENS[name](n_tokens)


@pytest.mark.parametrize("name", [name for name in OF_TOKENS if name != "cesaro_opnorm"])  # which is of arrays
def test_part_of_a_token_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"n_tokens=1\.5 is not a whole number; use for example 1024"):
        OF_TOKENS[name](1.5)


@pytest.mark.parametrize("name", LEARNS)
def test_positions_that_were_not_learned_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="n_tokens=17 exceeds the 16 learned positions of tiny; use fewer tokens"):
        LEARNS[name](17)
    assert require_tokens(np.int64(17), TINY) == 17  # turned positions have no end
    assert LEARNS[name](16) is not None


@pytest.mark.parametrize("failure", [0, 1, -1e-6, 2.0, math.nan, math.inf, "one in a million", None])
def test_what_is_no_probability_is_refused(failure: Any) -> None:
    with pytest.raises(ValueError, match="is not a probability between 0 and 1; use for example 1e-6"):
        rigorous_bound(TINY, 8, failure=failure)


def test_a_name_is_no_architecture() -> None:
    for function in (gradient_growth, growth_closed_form, check):
        with pytest.raises(ValueError, match=r"^architecture='tiny' is not an Architecture; use theory\.preset"):
            function("tiny", 64)  # pyright: ignore[reportArgumentType]


def test_a_larger_failure_is_a_smaller_bound() -> None:
    assert require_failure(0.5) == 0.5
    found = [rigorous_bound(TINY, 8, failure=failure).log10_product for failure in (1e-12, 1e-6, 0.5)]
    assert found == sorted(found, reverse=True)


@pytest.mark.parametrize("what", ["tokens", "targets"])
def test_ids_are_one_for_each_token(what: str) -> None:
    ids: dict[str, Any] = {what: np.zeros(7, dtype=np.int64)}
    with pytest.raises(ValueError, match=rf"{what} has shape \(7,\); give one id for each of n_tokens=8"):
        gradient_growth(TINY, 8, **ids)


def test_sizes_below_one_are_refused() -> None:
    for widths, depths in (([0], [2]), ([64], [0]), ([64, -1], [2])):
        with pytest.raises(ValueError, match="use at least 1 for each"):
            closed_form_sweep(widths, depths, None, 8)


def drawn(distribution: str, sigma: float, shape: tuple[int, ...], rng: np.random.Generator, cutoff: float) -> Any:
    if distribution == "uniform":
        return rng.uniform(-1, 1, shape) * sigma * math.sqrt(3)
    values = rng.standard_normal(shape)
    if distribution == "truncated":
        while (outside := np.abs(values) > cutoff).any():
            values[outside] = rng.standard_normal(int(outside.sum()))
        values /= values.std()
    return values * sigma


@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm"])
@pytest.mark.parametrize("distribution", ["normal", "uniform", "truncated", "torch"])  # torch's tables are normal
def test_every_event_is_paid_for(distribution: str, norm: str) -> None:
    """At a failure of a half, with a table of one row so that no union over rows hides a missing event."""
    init = replace(TINY.init, distribution=distribution)
    a = replace(TINY, init=init, norm=norm, vocab_size=1, eps=1e-5, d_model=128, d_head=32, block="post-ln")
    failure = 0.5
    reach = _embedding_reach(a, 4, failure)
    sigma = a.embedding_multiplier * a.stds.embedding
    rows = drawn(distribution, sigma, (20_000, a.d_model), np.random.default_rng(0), init.cutoff)
    lengths = np.linalg.norm(rows, axis=1)
    centred = np.linalg.norm(rows - rows.mean(axis=1, keepdims=True), axis=1) if norm == "layernorm" else lengths
    outside = (centred < reach.low) | (lengths > reach.high)
    assert outside.mean() <= failure
    # Each event alone has its share, exp(-x): x as in the bounds that the function names.
    events = 4 if distribution != "normal" and norm == "layernorm" else 2
    x = math.log(events / failure)
    assert events * math.exp(-x) == pytest.approx(failure)
    spread = sigma * init.gaussian_factor * (math.sqrt(a.d_model) + math.sqrt(2 * x))
    assert reach.high == pytest.approx(spread, rel=1e-12)
    half = _embedding_reach(a, 4, failure / 2)
    assert half.low <= reach.low
    assert half.high > reach.high
