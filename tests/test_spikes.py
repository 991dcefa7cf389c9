"""What counts as a spike, on series made by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from empirics.spikes import (
    DEFINITIONS,
    REFRACTORY,
    count_events,
    paired_difference,
    paired_ratio,
    robust_deviation,
    six_sigma,
    twice_median,
)


def series(length: int = 100, level: float = 1.0, wobble: float = 0.01, **values: float) -> np.ndarray:
    """A level that wobbles by -1, 1/2, -1/2, 1 times `wobble`, with `at<step>` values put in.

    Over whole periods the mean and median are the level, the median absolute deviation is 3/4 of the wobble and the
    standard deviation sqrt(5/8) of it.
    """
    made = level + wobble * np.resize([-1.0, 0.5, -0.5, 1.0], length)
    for name, value in values.items():
        made[int(name.removeprefix("at"))] = value
    return made


EVERY = pytest.mark.parametrize("find", DEFINITIONS.values(), ids=DEFINITIONS)


@EVERY
def test_quiet_series_has_no_event(find: Any) -> None:
    assert find(series()) == ()
    assert find(np.linspace(5, 1, 200) + series(200, level=0.0)) == ()
    for length in (0, 1, 5, 20):
        assert find(series(length)) == ()


@EVERY
def test_one_spike_is_one_event(find: Any) -> None:
    assert find(series(at60=3.0)) == (60,)


@EVERY
def test_a_fall_is_no_spike(find: Any) -> None:
    assert find(series(at60=-3.0)) == ()


@EVERY
def test_nearby_high_values_are_one_event_and_distant_ones_are_two(find: Any) -> None:
    near, far = 60 + REFRACTORY, 60 + REFRACTORY + 1
    assert find(series(**{"at60": 3.0, f"at{near}": 8.0})) == (60,)
    assert find(series(**{"at60": 3.0, f"at{far}": 8.0})) == (60, far)


def test_a_run_of_high_values_extends_its_event() -> None:
    """The pause is counted from the last high value, not from the first."""
    values = {f"at{step}": 5.0 for step in range(60, 90, REFRACTORY)}
    assert twice_median(series(**values)) == (60,)


def test_twice_median_is_strict_and_needs_ten_steps() -> None:
    flat = np.ones(60)
    flat[40] = 2.0
    assert twice_median(flat) == ()
    flat[40] = np.nextafter(2.0, 3)
    assert twice_median(flat) == (40,)
    early = np.ones(60)
    early[[9, 25]] = 5.0
    assert twice_median(early) == (25,)
    early = np.ones(60)
    early[10] = 5.0
    assert twice_median(early) == (10,)


def test_windows_look_back_fifty_and_a_hundred_and_twenty_eight_steps() -> None:
    """A level that doubled long ago is forgotten: the median is of the last 50 steps, the mean of the last 128."""
    step = np.concatenate([np.ones(100), np.full(200, 3.0)])
    step[200] = 5.9  # below twice the new level, above twice the old one
    assert twice_median(step) == (100,)
    step[200] = 6.1
    assert twice_median(step) == (100, 200)


def test_robust_deviation_by_hand() -> None:
    """Steps 10 to 59: median 1, MAD 0.0075, threshold 1 + 7 * 1.4826 * 0.0075 = 1.0778365."""
    assert robust_deviation(series(at60=1.0778)) == ()
    assert robust_deviation(series(at60=1.0779)) == (60,)
    assert robust_deviation(series(at19=3.0)) == ()
    assert robust_deviation(series(at20=3.0)) == (20,)


def test_robust_deviation_is_not_blinded_by_an_earlier_spike() -> None:
    """Six standard deviations of a window that holds a spike of 100 hide one of 3; the median does not mind."""
    twice = series(120, at50=100.0, at80=3.0)
    assert robust_deviation(twice) == (50, 80)
    assert six_sigma(twice) == (50,)


def test_six_sigma_by_hand() -> None:
    """All 60 steps, later the last 128: mean 1, deviation 0.0079057, threshold 1 + 6 of it = 1.0474342."""
    assert six_sigma(series(at60=1.0474)) == ()
    assert six_sigma(series(at60=1.0475)) == (60,)
    assert six_sigma(series(at19=3.0)) == ()
    assert six_sigma(series(300, at260=1.0474)) == ()
    assert six_sigma(series(300, at260=1.0475)) == (260,)
    late = series(300, at20=1000.0, at160=1.0475)  # 140 steps later, the outlier is out of the window
    assert six_sigma(late) == (20, 160)


def test_constant_series_and_any_rise() -> None:
    """With no spread at all, the two spread-based definitions see any rise; the relative one does not."""
    flat = np.ones(60)
    flat[40] = 1.001
    assert robust_deviation(flat) == (40,)
    assert twice_median(flat) == ()


@EVERY
@given(seed=st.integers(0, 500), cut=st.integers(1, 119), scale=st.floats(0.01, 100))
def test_only_the_past_decides_and_units_do_not(find: Any, seed: int, cut: int, scale: float) -> None:
    generator = np.random.default_rng(seed)
    made = 3 + 0.3 * generator.standard_normal(120)
    made[generator.integers(20, 120, 4)] *= generator.uniform(2, 4, 4)
    events = find(made)
    assert find(made[:cut]) == tuple(step for step in events if step < cut)
    assert find(made * 2.0 ** round(np.log2(scale))) == events  # a power of two: no rounding


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


@pytest.mark.parametrize("pair", [paired_difference, paired_ratio])
def test_pairs_of_unequal_length_are_cut_to_the_shorter(pair: Any) -> None:
    assert pair(np.ones(7), np.ones(5)).size == pair(np.ones(5), np.ones(7)).size == 5


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
