"""What counts as a spike, on series made by hand, and the command that says it of a log."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from empirics import spike_definitions
from empirics.__main__ import main
from empirics.spike_definitions import DEFINITIONS, REFRACTORY, Definition
from empirics.spikes import RULE, count_events, events, pair, paired_difference, paired_ratio, recoveries
from theory.sources import REFERENCES

twice_median = DEFINITIONS["twice-median"].find
robust_deviation = DEFINITIONS["robust-deviation"].find
six_sigma = DEFINITIONS["six-sigma"].find
five_times = DEFINITIONS["five-times-twice-mean"].find
ten_times = DEFINITIONS["ten-times-first-maximum"].find


def series(length: int = 100, level: float = 1.0, wobble: float = 0.01, **values: float) -> np.ndarray:
    """A level that wobbles by -1, 1/2, -1/2, 1 times `wobble`, with `at<step>` values put in.

    Over whole periods the mean and median are the level, the median absolute deviation is 3/4 of the wobble and the
    standard deviation sqrt(5/8) of it.
    """
    made = level + wobble * np.resize([-1.0, 0.5, -0.5, 1.0], length)
    for name, value in values.items():
        made[int(name.removeprefix("at"))] = value
    return made


EVERY = pytest.mark.parametrize("definition", DEFINITIONS.values(), ids=DEFINITIONS)
VECTORS = [(definition, n) for definition in DEFINITIONS.values() for n in range(len(definition.vectors))]


@pytest.mark.parametrize(("definition", "n"), VECTORS, ids=lambda value: getattr(value, "name", str(value)))
def test_vector(definition: Definition, n: int) -> None:
    vector = definition.vectors[n]
    assert definition.find(vector.series) == vector.events


@EVERY
def test_a_definition_is_complete(definition: Definition) -> None:
    assert DEFINITIONS[definition.name] is definition
    assert definition.source.key in REFERENCES
    assert definition.source.key != "convention" or "no published source confirmed" in definition.source.label
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
    """With no spread at all, the two spread-based definitions see any rise; the relative one does not."""
    flat = np.ones(60)
    flat[40] = 1.001
    assert robust_deviation(flat) == (40,)
    assert twice_median(flat) == ()


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
def test_zeros_have_no_events(definition: Definition) -> None:
    assert definition.find(np.zeros(300)) == ()


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


def spike(length: int, high: int, *, at: int = 100, end: float | None = None) -> np.ndarray:
    """A spike at step `at` that lasts for `high` steps; `end` is put last."""
    made = series(length)
    made[at : at + high] = 5.0
    if end is not None:
        made[-1] = end
    return made


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


LOSS = spike(400, 14, at=200)  # slowly; two-valued noise before
CALM = series(400)


def write(path: Path, loss: Any, **columns: Any) -> str:
    """A log by its ending: .jsonl as train writes it, .csv, or .json for a record."""
    rows = [{"step": step, "loss": None if not np.isfinite(value) else float(value)} for step, value in enumerate(loss)]
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".csv":
        path.write_text("\ufeffloss,step\n" + "".join(f"{row['loss'] or 'nan'},{row['step']}\n" for row in rows))
    else:
        body = {"series": {"loss": [row["loss"] for row in rows], **columns}, "final": {"diverged_at": None}}
        path.write_text(json.dumps({"schema": 1, "kind": "training", **body}))
    return str(path)


def found_in(capsys: pytest.CaptureFixture[str], *argv: str) -> dict[str, Any]:
    assert main(["spikes", *argv, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("name", ["losses.jsonl", "log.csv", "run.json"])
def test_command_finds_the_same_in_every_kind_of_log(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run, calm = write(tmp_path / name, LOSS), write(tmp_path / "calm" / name, CALM)
    told = found_in(capsys, run, "--reference", calm)
    assert [definition["name"] for definition in told["definitions"]] == list(DEFINITIONS)
    assert (told["entries"], told["steps"], told["diverged_at"]) == (400, [0, 399], None)
    for definition in told["definitions"]:
        expected = [{"step": 200 + DEFINITIONS[definition["name"]].lag, "outcome": "slowly", "after": 14}]
        if definition["name"] == "ten-times-first-maximum":
            expected = []  # five times only
        assert definition["raw"] == definition["paired"] == {"entries": 400, "events": expected}
        assert definition["source"]
        assert definition["statement"]
    # The same spike in the reference: a hard batch, which the pair does not show.
    told = found_in(capsys, run, "--reference", run)
    assert all(definition["paired"]["events"] == [] for definition in told["definitions"])
    assert any(definition["raw"]["events"] for definition in told["definitions"])


def test_command_reads_what_training_leaves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    train = ["train", "tiny", "--layers", "1", "--steps", "24", "--warmup", "0", "--batch", "1", "--seq-len", "8"]
    assert main([*train, "--data", "sympy", "--tokenizer", "bytes", "--out", str(out)]) == 0
    capsys.readouterr()
    record = next((out / "records").glob("*.json"))
    series = json.loads(record.read_text())["series"]
    for path in (out, out / "losses.jsonl", record):
        told = found_in(capsys, str(path))
        assert told["entries"] == 24
        expected = list(DEFINITIONS["robust-deviation"].find(np.array(series["loss"])))
        (robust,) = [one for one in told["definitions"] if one["name"] == "robust-deviation"]
        assert [event["step"] for event in robust["raw"]["events"]] == expected
    assert found_in(capsys, str(out), "--column", "gradient_norm")["file"] == str(record)


def test_command_prints_definitions_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, calm = write(tmp_path / "losses.jsonl", [*LOSS[:208], np.nan]), write(tmp_path / "c.csv", CALM)
    assert main(["spikes", str(tmp_path), "--reference", calm]) == 0
    out = capsys.readouterr().out
    assert f"{run}: loss, 209 entries, steps 0 to 208; diverged at step 208" in out
    for definition in DEFINITIONS.values():
        assert definition.statement in out
        assert definition.deviation in out
    assert out.count("no published source confirmed") == 1
    assert out.count("200: never") == 6  # three definitions, raw and paired
    assert out.count("204: never") == 2
    assert main(["spikes", run, "--definition", "six-sigma", "--definition", "twice-median"]) == 0
    out = capsys.readouterr().out
    assert [line.split()[0] for line in out.splitlines()[2:4]] == ["six-sigma", "twice-median"]
    assert main(["spikes", write(tmp_path / "short.csv", LOSS[:100])]) == 0
    out = capsys.readouterr().out
    assert out.count("too short") == 2  # it does not say that they found nothing
    assert "105 entries needed, 100 there" in out
    many = series(600)
    many[20::20] = 50.0
    assert main(["spikes", write(tmp_path / "many.csv", many), "--out", str(tmp_path / "t" / "told.txt")]) == 0
    assert "and 17 more (--json has all)" in (tmp_path / "t" / "told.txt").read_text()


def test_steps_are_the_logs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "log.csv"
    path.write_text("step,train\n" + "".join(f"{1000 + 10 * n},{value}\n" for n, value in enumerate(LOSS)))
    told = found_in(capsys, str(path), "--column", "train", "--definition", "six-sigma")
    assert told["steps"] == [1000, 4990]
    assert told["definitions"][0]["raw"]["events"] == [{"step": 3000, "outcome": "slowly", "after": 14}]
    main(["spikes", str(path), "--column", "train"])
    assert "not every step is there" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("missing.jsonl", None, "does not exist"),
        ("missing.json", None, "does not exist"),
        ("missing", None, "does not exist"),
        ("log.txt", "1", "is not a log"),
        ("a.jsonl", "", "has no entries"),
        ("a.jsonl", "[1]", "line 1 of"),
        ("a.jsonl", '{"loss": 1}\n{"loss', "line 2 of"),
        ("a.jsonl", '{"step": 1, "nll": 2}', "no 'loss'; choose with --column from step, nll"),
        ("a.jsonl", '{"loss": "high"}', "has 'high' for loss and 0 for step, which are not numbers"),
        ("a.jsonl", '{"loss": true}', "has True for loss"),
        ("a.jsonl", '{"loss": [1]}', "which are not numbers"),
        ("a.jsonl", '{"loss": 1, "step": 0.5}', "not a whole number"),
        ("a.jsonl", '{"loss": 1, "step": 1e300}', "not a whole number"),
        ("a.jsonl", '{"loss": 1, "step": 7}\n{"loss": 1, "step": 5}', "step 5 follows step 7"),
        ("a.jsonl", '{"loss": 1, "step": 7}\n{"loss": 1}', "not a whole number"),
        ("a.jsonl", b"\xff\xfe", "not text"),
        ("a.csv", "step,nll\n1,2\n", "choose with --column from step, nll"),
        ("a.csv", "loss\n", "has no entries"),
        ("a.csv", "loss,x\n,1\n", "has '' for loss"),
        ("a.csv", "loss,x\n1,1\n1,2,3\n", ""),
        ("a.jsonl", '{"loss": 1' + "0" * 400 + "}", "which are not numbers"),
        ("a.json", '{"schema": 1, "kind": "training", "series": {"loss": [1' + "0" * 400 + "]}}", "beyond all floats"),
        ("a.json", '{"schema": 1, "kind": "training"}', "not a training record"),
        ("n" * 300 + ".csv", None, "cannot read"),
        ("a.json", "{}", "not a training record"),
        ("a.json", '{"schema": 1, "kind": "spikes", "rows": []}', "not a training record"),
        ("a.json", '{"schema": 1, "kind": "training", "series": {"nll": [1], "place": [[1]]}}', "from nll"),
        ("a.json", '{"schema": 1, "kind": "training", "series": {"loss": []}}', "has no entries"),
        ("folder", None, "0 training records"),
    ],
)
def test_bad_logs_are_one_line(
    tmp_path: Path, name: str, content: Any, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / name
    if name == "folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    status = main(["spikes", str(path)])
    error = capsys.readouterr().err
    if words:
        assert status == 2
        assert words in error
        assert error.count("\n") == 1
    else:
        assert status == 0  # a row with a cell too many still has its loss


def test_a_reference_of_other_steps_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write(tmp_path / "run.csv", LOSS)
    other = tmp_path / "other.csv"
    other.write_text("step,loss\n5,1.0\n6,1.0\n")
    assert main(["spikes", run, "--reference", str(other)]) == 2
    assert "name a reference that saw the same batches" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        main(["spikes", run, "--definition", "seven-sigma"])
    assert stop.value.code == 2
    write(tmp_path / "two" / "a.json", LOSS)
    write(tmp_path / "two" / "b.json", LOSS)
    assert main(["spikes", str(tmp_path / "two")]) == 2
    assert "2 training records" in capsys.readouterr().err


def written(folder: Path, digest: str = "aa", **changes: Any) -> str:
    """A finished run's folder, as `train` leaves it, but for what no log is read for."""
    spec = {"data": "a.txt", "tokenizer": "bpe", "data_bytes": None, "seed": 0, "batch_size": 8, "seq_len": 64}
    write(folder / "losses.jsonl", CALM)
    data = {"source": "a.txt", "digest": digest, "vocab_size": changes.pop("vocab_size", 512)}
    body = {"schema": 1, "kind": "training", "spec": spec | changes, "data": data, "series": {"loss": CALM.tolist()}}
    (folder / "records").mkdir()
    (folder / "records" / "run.json").write_text(json.dumps(body))
    return str(folder)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"seed": 1}, "seed 1 and not 0"),
        ({"batch_size": 4}, "sequences a batch 4 and not 8"),
        ({"seq_len": 32}, "tokens a sequence 32 and not 64"),
        ({"order": "epoch"}, "order epoch and not random"),
        ({"data": "b.txt", "digest": "bb"}, "text b.txt and not a.txt"),
        ({"tokenizer": "bytes", "digest": "bb"}, "tokenizer bytes and not bpe"),
        ({"vocab_size": 300, "digest": "bb"}, "vocabulary 300 and not 512"),
        ({"digest": "bb"}, "a text that has changed since"),
        ({"seed": 1, "order": "epoch"}, "seed 1 and not 0, order epoch and not random"),
    ],
)
def test_a_reference_of_other_batches_is_refused(
    tmp_path: Path, changes: dict[str, Any], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run, other = written(tmp_path / "run"), written(tmp_path / "other", **changes)
    for log, reference in ((run, other), (f"{run}/losses.jsonl", f"{other}/records/run.json")):
        assert main(["spikes", log, "--reference", reference]) == 2
        out, err = capsys.readouterr()
        assert (out, err.count("\n")) == ("", 1)
        assert f"is of other batches than {run}/losses.jsonl: {words}; name a reference that" in err


def test_a_reference_is_known_or_trusted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Another rate, or another copy of the text, leaves the batches; where a record is missing, nobody knows."""
    run = written(tmp_path / "run")
    calm = written(tmp_path / "calm", learning_rate=1e-4, steps=9, data="/copy/a.txt", order="random")
    assert found_in(capsys, run, "--reference", calm)["same_batches"] == "recorded"
    assert main(["spikes", run, "--reference", calm]) == 0
    assert f"paired with {calm}/losses.jsonl, on the same batches, as both records say\n" in capsys.readouterr().out
    for log, reference in ((run, write(tmp_path / "c.csv", CALM)), (write(tmp_path / "d.jsonl", CALM), run)):
        assert found_in(capsys, log, "--reference", reference)["same_batches"] == "on trust"
        assert main(["spikes", log, "--reference", reference]) == 0
        assert "taken on trust to have seen the same batches" in capsys.readouterr().out
    assert found_in(capsys, run)["same_batches"] is None
