"""What counts as a spike: every definition on series made by hand and by chance."""

from __future__ import annotations

import numpy as np
import pytest
from helpers.series import EVERY, robust_deviation, series, twice_median
from hypothesis import given, settings
from hypothesis import strategies as st

from empirics import spike_definitions
from empirics.spike_definitions import (
    DEFINITIONS,
    REFRACTORY,
    Definition,
    hidden_deviation,
    median_and_deviation,
    resolution,
)
from theory.sources import REFERENCES

six_sigma = DEFINITIONS["six-sigma"].find
VECTORS = [(definition, n) for definition in DEFINITIONS.values() for n in range(len(definition.vectors))]


@pytest.mark.parametrize(("definition", "n"), VECTORS, ids=lambda value: getattr(value, "name", str(value)))
def test_vector(definition: Definition, n: int) -> None:
    vector = definition.vectors[n]
    assert definition.find(vector.series) == vector.events


@EVERY
def test_a_definition_is_complete(definition: Definition) -> None:
    assert DEFINITIONS[definition.name] is definition
    assert definition.source.key in REFERENCES
    assert definition.published or "no published source confirmed" in definition.source.label
    assert {bool(vector.events) for vector in definition.vectors} == {True, False}  # one to find, one to pass over
    for value in definition.parameters.values():
        words = definition.statement.replace("five", "5").replace("1.4826", "")
        assert f"{value:g}" in words, f"{value:g} is not in the statement"


@pytest.mark.parametrize(
    ("definition", "name"),
    [(definition, name) for definition in DEFINITIONS.values() for name in definition.parameters],
    ids=lambda value: getattr(value, "name", value),
)
def test_vectors_hold_every_parameter_in_place(definition: Definition, name: str) -> None:
    """Half of any parameter changes what is found in a vector, or in a series whose level rises and falls."""
    drifting = np.concatenate([series(150), series(150, level=3.0), series(150), series(9, level=100.0), series(60)])
    drifting[[420, 445]] = 2.2, 1.1
    changed = definition.parameters | {name: definition.parameters[name] * 0.5}
    changed[name] = int(changed[name]) if name != "factor" else changed[name]
    tried = [drifting, *(vector.series for vector in definition.vectors)]
    assert any(
        not np.array_equal(definition.high(one, **definition.parameters), definition.high(one, **changed))
        for one in tried
    )


@EVERY
def test_nothing_is_noticed_before_a_definition_begins(definition: Definition) -> None:
    made = series(definition.begins + 1)
    made[-1 - definition.lag :] = 5000.0
    assert definition.find(made) == (definition.begins,)
    assert definition.find(made[1:]) == ()


@EVERY
def test_quiet_series_has_no_event(definition: Definition) -> None:
    assert definition.find(series(300)) == ()
    assert definition.find(np.linspace(5, 1, 400) + series(400, level=0.0)) == ()
    assert definition.find(-series(300)) == ()
    for length in (0, 1, 5, 20, 64, 100, 101, 128, 129):
        assert definition.find(series(length)) == ()


@EVERY
def test_one_lasting_spike_is_one_event(definition: Definition) -> None:
    made = series(400)
    made[150:156] = 30.0
    assert definition.find(made) == (150 + definition.lag,)
    made[150:156] = -30.0 if definition.name != "ten-times-first-maximum" else 0.0  # a fall; that one reads |x|
    assert definition.find(made) == ()


@EVERY
def test_nearby_high_values_are_one_event_and_distant_ones_are_two(definition: Definition) -> None:
    high = np.full(5, 30.0) if definition.lag else np.array([30.0])
    near, far = REFRACTORY, REFRACTORY + 1
    for gap, expected in ((near, 1), (far, 2)):
        made = series(400)
        made[150 : 150 + high.size] = high
        start = 150 + gap
        made[start : start + high.size] = 80.0 if definition.name == "twice-median" else 2000.0
        assert len(definition.find(made)) == expected


@EVERY
@pytest.mark.parametrize("end", [np.nan, np.inf, -np.inf])
def test_events_are_found_up_to_a_divergence(definition: Definition, end: float) -> None:
    made = series(400)
    made[150:156] = 30.0
    made[300:310] = 500.0
    whole = definition.find(made)
    assert len(whole) == 2
    made[200] = end
    assert definition.find(made) == whole[:1]
    assert definition.find(np.full(200, end)) == ()
    made[:] = 1e300  # whose squares are infinite: no warning, no event
    assert definition.find(made) == ()


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
    twice = series(120, at70=100.0, at100=3.0)
    assert robust_deviation(twice) == (70, 100)
    assert six_sigma(twice) == (70,)


def test_six_sigma_by_hand() -> None:
    """64 steps: sample deviation 0.01 sqrt(5/8 64/63) = 0.0079682, threshold 1.0478090; 128: 0.0079366, 1.0476199."""
    assert six_sigma(series(65, at64=1.04780)) == ()
    assert six_sigma(series(65, at64=1.04782)) == (64,)
    assert six_sigma(series(300, at260=1.04761)) == ()
    assert six_sigma(series(300, at260=1.04763)) == (260,)
    late = series(300, at100=1000.0, at240=1.05)  # 140 steps later, the outlier is out of the window
    assert six_sigma(late) == (100, 240)
    late = series(300, at100=1000.0, at228=1.05)  # 128 steps later, it is the oldest value of the window
    assert six_sigma(late) == (100,)


def test_constant_series_and_any_rise() -> None:
    """With no spread at all, six-sigma as published sees any rise; one of five steps of rounding is no deviation."""
    flat = np.ones(100)
    flat[80] = 1.001
    assert six_sigma(flat) == (80,)
    assert robust_deviation(flat) == twice_median(flat) == ()
    flat[80] = 1.005
    assert robust_deviation(flat) == ()
    flat[80] = 1.006
    assert robust_deviation(flat) == (80,)


# --- rounded logs ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("log", ["two decimals", "three binary digits", "two values", "a pair of two decimals"])
def test_a_rounded_log_has_the_events_of_the_one_before_rounding(log: str) -> None:
    """A loss of 2.30 +- 0.004 has none, and one spike if there is one; the definition as published has many."""
    generator = np.random.default_rng(0)
    loss, reference = 2.3 + 0.004 * generator.standard_normal((2, 2000))
    loss[1500] = 2.6
    if log == "two decimals":
        loss = np.round(loss, 2)
    elif log == "three binary digits":
        loss, reference = np.round(loss * 8) / 8, np.round(reference * 8) / 8  # all the same but for the spike
        loss[generator.integers(0, 1400, 30)] += 0.125
        loss[1500] = 3.25
    elif log == "two values":
        loss = np.where(generator.random(2000) < 0.3, 1.1, 1.0)
        loss[1500] = 1.7
    else:
        loss = np.round(loss, 2) - np.round(reference, 2)  # 2.31 - 2.3 and 2.3 - 2.29 differ in their last bits
    assert robust_deviation(loss) == (1500,)
    median, spread = np.array([median_and_deviation(loss[None, n - 50 : n])[:, 0] for n in range(50, 2000)]).T
    as_published = np.flatnonzero(loss[50:] - median > 7 * spread)
    assert as_published.size > 20


def test_a_log_that_is_not_rounded_is_read_as_published() -> None:
    """Of values that are all different, the median absolute deviation is never below half a step of their grid."""
    for seed in range(20):
        made = np.random.default_rng(seed).permutation(np.arange(400) * 0.25)  # as close to it as it gets
        spreads = [median_and_deviation(made[None, n - 20 : n])[1, 0] for n in range(20, 400)]
        assert (np.array(spreads) >= hidden_deviation(made)[20:]).all()
    normal = 3 + 0.2 * np.random.default_rng(0).standard_normal(400)
    assert hidden_deviation(normal).max() < 1e-10
    assert hidden_deviation(normal.astype(np.float32).astype(np.float64))[50:].max() < 1e-6  # a float32's last bit


@pytest.mark.parametrize(
    ("values", "step"),
    [
        ((2.3, 2.31, 2.4), 0.01), ((2.0, 3.0), 1.0), ((10.0, 500.0), 1.0), ((0.0, 0.0), 1.0), ((-2.25, 1.5), 0.25),
        ((2.296875, 2.3125), 0.015625), ((0.0005, 7.0), 0.0001), ((1e300, 1e-5), 1.0), ((0.1 + 0.2, 0.3), 0.1),
        ((2.31 - 2.30, 2.30 - 2.29), 0.01), ((0.1234567890123456, 1.0), 1e-12),
    ],
)  # fmt: skip
def test_resolution_by_hand(values: tuple[float, ...], step: float) -> None:
    """Nothing is resolved below 2^-40 of the largest value: no small number beside a huge one, no sixteen digits."""
    assert resolution(np.array(values))[-1] == pytest.approx(step, rel=1e-12)


def test_resolution_is_of_the_past() -> None:
    assert resolution(np.array([5.0, 2.5, 3.0, 2.71, 2.5])).tolist() == [1.0, 0.5, 0.5, 0.01, 0.01]
    assert resolution(np.array([])).size == 0


@EVERY
@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 500), cut=st.integers(1, 399), scale=st.integers(-20, 20), later=st.floats())
def test_only_the_past_decides_and_units_do_not(
    definition: Definition, seed: int, cut: int, scale: int, later: float
) -> None:
    generator = np.random.default_rng(seed)
    made = 3 + 0.3 * generator.standard_normal(400)
    for start in generator.integers(20, 390, 4):
        made[start : start + generator.integers(1, 9)] *= generator.uniform(2, 15)
    found = definition.find(made)
    before = tuple(step for step in found if step < cut)
    assert definition.find(made[:cut]) == before
    assert definition.find(made * 2.0**scale) == found  # a power of two: no rounding
    other = made.copy()
    other[cut:] = later  # any number, nan and infinity too
    assert tuple(step for step in definition.find(other) if step < cut) == before


def test_the_series_of_that_property_have_events() -> None:
    """The property above would hold of a definition that finds nothing."""
    for definition in DEFINITIONS.values():
        made = 3 + 0.3 * np.random.default_rng(0).standard_normal(400)
        made[200:208] *= 14
        assert definition.find(made)


@pytest.mark.parametrize("definition", [d for d in DEFINITIONS.values() if not d.relative], ids=lambda d: d.name)
def test_a_level_does_not_move_deviations(definition: Definition) -> None:
    made = np.round(np.random.default_rng(1).standard_normal(400) * 64) / 64
    made[200] = 40.0
    assert definition.find(made) == definition.find(made + 1024.0) == (200,)  # exact: dyadic numbers


def test_a_level_does_move_multiples() -> None:
    for definition in DEFINITIONS.values():
        made = series(400)
        made[200:205] = 15.0
        assert bool(definition.find(made + 1000)) is not definition.relative


@EVERY
def test_long_series_are_cut_into_rows_without_a_seam(definition: Definition, monkeypatch: pytest.MonkeyPatch) -> None:
    made = 3 + 0.3 * np.random.default_rng(2).standard_normal(1500)
    made[[*range(700, 708), 1100, *range(1300, 1306)]] *= 11
    whole = definition.find(made)
    monkeypatch.setattr(spike_definitions, "ROWS", 7)
    assert definition.find(made) == whole != ()


def plainly(name: str, made: np.ndarray) -> list[bool]:
    """Which steps are high, one step at a time as a training would see them."""
    most, run, high = 0.0, 0, []
    for step, value in enumerate(made):
        last = {window: made[max(0, step - window) : step] for window in (50, 100, 128)}
        if name == "twice-median":
            high.append(step >= 10 and value > 2 * np.median(last[50]))
        elif name == "robust-deviation":
            spread = 1.4826 * np.median(np.abs(last[50] - np.median(last[50]))) if step else 0.0
            high.append(step >= 20 and value - np.median(last[50]) > 7 * spread)
        elif name == "six-sigma":
            high.append(step >= 63 and value - np.mean(last[128]) > 6 * np.std(last[128], ddof=1))
        elif name == "five-times-twice-mean":
            run = run + 1 if step >= 100 and value >= 2 * np.mean(last[100]) else 0
            high.append(run >= 5)
        else:
            high.append(step >= 100 and abs(value) >= 10 * most)
            most = max(most, abs(value)) if step < 100 else most
    return [bool(one) for one in high]


@EVERY
@pytest.mark.parametrize("seed", range(4))
def test_windows_at_once_are_steps_one_by_one(definition: Definition, seed: int) -> None:
    generator = np.random.default_rng(seed)
    made = 3 + 0.2 * generator.standard_normal(500)
    for start in generator.integers(5, 480, 12):
        made[start : start + generator.integers(1, 9)] *= generator.uniform(1.2, 15)
    made[300:306] = 1e6
    expected = plainly(definition.name, made)
    assert any(expected)
    assert definition.high(made, **definition.parameters).tolist() == expected


@EVERY
def test_zeros_have_no_events(definition: Definition) -> None:
    assert definition.find(np.zeros(300)) == ()
