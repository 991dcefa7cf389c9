"""Spikes of runs: pairs with a reference, recoveries, and the events of records."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from helpers.series import EVERY, robust_deviation, series, spike, twice_median
from hypothesis import given, settings
from hypothesis import strategies as st

from empirics.spike_definitions import DEFINITIONS, Definition
from empirics.spikes import RULE, count_events, events, pair, paired_difference, paired_ratio, recoveries


def test_paired_difference_cancels_hard_batches() -> None:
    hard = series(120, at60=4.0)
    own = hard + 0.001 * np.arange(120)
    assert robust_deviation(own) == (60,)
    difference = paired_difference(own, hard)
    np.testing.assert_allclose(difference, 0.001 * np.arange(120), atol=1e-12)
    assert robust_deviation(difference) == ()
    own[90] += 2.0
    assert robust_deviation(paired_difference(own, hard)) == (90,)


def test_paired_ratio_keeps_the_reference_level() -> None:
    reference = series(120, level=2.0, at60=10.0)
    ratio = paired_ratio(reference * 1.5, reference)
    np.testing.assert_allclose(ratio, 1.5 * np.median(reference))
    own = reference * 1.5
    own[90] *= 4
    assert twice_median(paired_ratio(own, reference)) == (90,)


@pytest.mark.parametrize("paired", [paired_difference, paired_ratio])
def test_pairs_of_unequal_length_are_cut_to_the_shorter(paired: Any) -> None:
    assert paired(np.ones(7), np.ones(5)).size == paired(np.ones(5), np.ones(7)).size == 5


@EVERY
def test_a_pair_is_read_as_the_definition_can(definition: Definition) -> None:
    """A loss that differs by rounding from the reference's is no spike, whichever way it is paired."""
    hard = series(400, at200=40.0, at300=0.5)
    own = hard * (1 + 1e-3 * np.sin(np.arange(400)))
    own[350:355] += 20.0
    for quantity in ("loss", "gradient_norm"):
        (found,) = definition.find(pair(definition, quantity, own, hard))
        assert found == 350 + definition.lag
    assert definition.find(own)[0] < 350 or definition.lag  # the hard batch is in the raw series


def test_norms_are_paired_by_their_ratio_and_a_zero_ends_the_reference() -> None:
    own, other = series(300, level=6.0), series(300, level=2.0)
    robust, relative = DEFINITIONS["robust-deviation"], DEFINITIONS["twice-median"]
    np.testing.assert_allclose(np.median(pair(robust, "gradient_norm", own, other)), 6.0, rtol=0.01)
    np.testing.assert_allclose(np.median(pair(robust, "loss", own, other)), 4.0, rtol=0.01)
    other[200] = 0.0
    for definition, quantity, length in (
        (robust, "gradient_norm", 200),
        (relative, "loss", 200),
        (robust, "loss", 300),
    ):
        assert pair(definition, quantity, own, other).size == length


@EVERY
def test_only_the_run_itself_diverges_in_a_pair(definition: Definition) -> None:
    own, other = series(300), series(300)
    own[200:206] = 50.0
    own[206:] = 40.0
    for quantity in ("loss", "gradient_norm"):
        for diverged, outcome in ((other, "undecided"), (own, "never")):
            cut = [one.copy() for one in (own, other)]
            cut[1 if diverged is other else 0][260] = np.nan
            (event,) = events(definition, pair(definition, quantity, *cut))
            assert (event["step"], event["outcome"]) == (200 + definition.lag, outcome)


@pytest.mark.parametrize(
    ("made", "outcome", "after"),
    [
        (spike(400, 1), "quickly", 1),
        (spike(400, RULE.quick), "quickly", RULE.quick),
        (spike(400, RULE.quick + 1), "slowly", RULE.quick + 1),
        (spike(1000, 700), "slowly", 700),
        (spike(400, 300), "never", None),
        (spike(100 + RULE.patience + 1, 999), "never", None),
        (spike(100 + RULE.patience, 999), "undecided", None),
        (spike(140, 999, end=np.nan), "never", None),  # a divergence is no recovery
        (spike(140, 999, end=np.inf), "never", None),
        (spike(101, 1), "undecided", None),
        (spike(101 + RULE.hold, 1), "quickly", 1),
        (spike(100 + RULE.hold, 1), "undecided", None),  # one value too few to hold
    ],
)
def test_outcomes(made: np.ndarray, outcome: str, after: int | None) -> None:
    (found,) = recoveries(made, (100,))
    assert (found.outcome, found.after) == (outcome, after)


def test_a_dip_is_no_recovery_and_the_level_is_the_one_before() -> None:
    made = spike(400, 30)
    made[110 : 110 + RULE.hold - 1] = 1.0
    assert recoveries(made, (100,))[0].after == 30
    made[110 : 110 + RULE.hold] = 1.0
    assert recoveries(made, (100,))[0].after == 10
    # 50 steps before: median 1, deviation 0.0075; 3 x 1.4826 of it is 0.0333585.
    made[101:] = 1.03335
    assert recoveries(made, (100,))[0].after == 1
    made[101:] = 1.03337
    assert recoveries(made, (100,))[0].outcome == "never"


def test_a_rounded_log_comes_back_within_its_rounding() -> None:
    """50 steps of 2.3 have no deviation; half a step of two decimals is 0.005, and 3 x 1.4826 of it 0.022239."""
    made = np.full(400, 2.3)
    made[:50] = 2.29  # before the steps that the level is of
    made[100:110] = 5.0
    made[110:] = 2.32
    assert recoveries(made, (100,))[0].after == 10
    made[110:] = 2.33
    assert recoveries(made, (100,))[0].outcome == "never"


def test_recovery_is_counted_from_the_first_value_of_an_event_noticed_late() -> None:
    definition = DEFINITIONS["five-times-twice-mean"]
    (event,) = events(definition, spike(500, 12, at=200))
    assert event == {"step": 204, "outcome": "slowly", "after": 12}
    (event,) = events(definition, spike(500, 10, at=200))
    assert event == {"step": 204, "outcome": "quickly", "after": 10}


@given(seed=st.integers(0, 200))
@settings(max_examples=25, deadline=None)
def test_recovery_is_the_first_by_a_plain_search(seed: int) -> None:
    """Against a loop over every step, on a random walk long enough to skip blocks."""
    generator = np.random.default_rng(seed)
    made = np.cumsum(generator.standard_normal(5000)) * 0.1 + np.where(np.arange(5000) > 100, 4.0, 0.0)
    for start in (100, 1023, 1024, 3000):
        past = made[start - RULE.window : start]
        level = np.median(past) + RULE.deviations * 1.4826 * np.median(np.abs(past - np.median(past)))
        held = (step for step in range(start, 5000 - RULE.hold + 1) if made[step : step + RULE.hold].max() <= level)
        step = next(held, None)
        assert recoveries(made, (start,))[0].after == (None if step is None else step - start)


def record(label: str, loss: Any, norm: Any, **changes: Any) -> dict[str, Any]:
    spec = {"experiment": "spikes", "label": label, "seed": 0, "learning_rate": 1e-3, "seq_len": 8, "batch_size": 2}
    spec |= {"steps": 100} | changes
    return {"id": f"{label} {spec}", "spec": spec, "series": {"loss": list(loss), "gradient_norm": list(norm)}}


def test_events_of_records() -> None:
    calm = record("Scaled Embed", series(at60=3.0), series())
    spiky = record("Vanilla", series(at60=3.0, at80=4.0), series(at80=4.0))
    alone = record("Vanilla", series(at60=3.0), series(), seed=1)
    rows = count_events([calm, spiky, alone], references=("Scaled Embed", "Embed LN"))
    assert len(rows) == 3 * 2 * len(DEFINITIONS)

    def row(seed: int, label: str, quantity: str, definition: str = "twice-median") -> dict[str, Any]:
        (found,) = (
            r for r in rows
            if (r["seed"], r["label"], r["quantity"], r["definition"]) == (seed, label, quantity, definition)
        )  # fmt: skip
        return found

    assert row(0, "Vanilla", "loss")["raw"] == [60, 80]
    assert row(0, "Vanilla", "loss")["raw_outcomes"] == ["quickly", "quickly"]
    assert row(0, "Vanilla", "loss")["paired"] == [80]
    assert row(0, "Vanilla", "loss")["paired_outcomes"] == ["quickly"]
    assert row(0, "Scaled Embed", "loss")["paired_outcomes"] is None
    assert row(0, "Vanilla", "loss", "robust-deviation")["paired"] == [80]  # the hard batch is gone
    assert row(0, "Vanilla", "gradient_norm")["paired"] == [80]
    assert row(0, "Vanilla", "loss")["reference"] == "Scaled Embed"
    assert row(0, "Scaled Embed", "loss")["paired"] is None  # it is its own reference
    assert row(1, "Vanilla", "loss")["reference"] is None  # another seed sees other batches
    assert row(1, "Vanilla", "loss")["raw"] == [60]


def test_a_reference_is_paired_with_the_next_one() -> None:
    calm, other = record("Scaled Embed", series(at60=3.0), series()), record("Embed LN", series(), series())
    rows = count_events([calm, other], references=("Scaled Embed", "Embed LN"))
    references = {row["label"]: row["reference"] for row in rows}
    assert references == {"Scaled Embed": "Embed LN", "Embed LN": "Scaled Embed"}


def test_runs_that_diverged_at_once_have_no_events() -> None:
    empty = [record(label, [None], []) for label in ("Vanilla", "Scaled Embed")]
    rows = count_events(empty, references=("Scaled Embed",))
    assert all(row["raw"] == [] and not row["paired"] for row in rows)


def test_diverged_run_counts_up_to_its_end() -> None:
    loss: list[Any] = [*series(70, at60=3.0), None]
    rows = count_events([record("Vanilla", loss, [*series(70), None])], references=())
    assert {row["quantity"]: row["raw"] for row in rows if row["definition"] == "twice-median"} == {
        "loss": [60],
        "gradient_norm": [],
    }


def test_the_norms_of_a_run_whose_loss_diverged_never_recover() -> None:
    norm = series(70)
    norm[60:] = 9.0
    run = record("Vanilla", [*series(70), None], norm)  # a loss that is not finite has no gradient
    for final, outcome in (({"diverged_at": 70}, "never"), ({"diverged_at": None}, "undecided")):
        rows = count_events([run | {"final": final}], references=())
        (found,) = [r for r in rows if (r["quantity"], r["definition"]) == ("gradient_norm", "twice-median")]
        assert (found["raw"], found["raw_outcomes"]) == ([60], [outcome])


def test_a_finite_loss_whose_gradient_was_not_never_recovers() -> None:
    loss = series(70)
    loss[60:] = 9.0
    run = record("Vanilla", loss, [*series(69), None])
    for final, outcome in (({"diverged_at": 69}, "never"), ({"diverged_at": None}, "undecided")):
        rows = count_events([run | {"final": final}], references=())
        (found,) = [r for r in rows if (r["quantity"], r["definition"]) == ("loss", "twice-median")]
        assert (found["raw"], found["raw_outcomes"]) == ([60], [outcome])
