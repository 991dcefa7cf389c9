"""Figures: drawn from records of the documented shape, with the records' own numbers in them."""

from __future__ import annotations

import copy
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.figure_records import LAYERS, METHOD_NAMES, MINIMAL, full, initialisation, training
from matplotlib.figure import Figure

from figures import (
    FIGURES,
    NAMES,
    device_distances,
    gradient_bounds,
    gradient_norms,
    learning_rates,
    loss_curves,
    save,
    selection,
    style,
    wording,
)
from theory.records import write_json

ABOUT_TRAINING = ("loss_curves", "gradient_norms", "learning_rates", "distributions", "while_training")


@pytest.fixture(scope="module")
def records() -> list[dict[str, Any]]:
    return full()


def lines(figure: Figure, label: str) -> list[np.ndarray]:
    """y values of every line of that label."""
    return [
        np.asarray(line.get_ydata(), float)
        for axes in figure.axes
        for line in axes.get_lines()
        if line.get_label() == label
    ]


def holds(found: list[np.ndarray], expected: Any) -> bool:
    """Whether one of the lines carries exactly these numbers."""
    wanted = np.asarray(expected, float)
    return any(y.shape == wanted.shape and np.allclose(y, wanted, equal_nan=True) for y in found)


# --- every figure ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_figure_is_labelled_and_captioned(name: str, records: list[dict[str, Any]]) -> None:
    figure = FIGURES[name].draw(records)
    assert figure.legends
    assert figure.legends[0].get_texts()
    shown = [axes for axes in figure.axes if axes.get_visible()]
    assert any(axes.get_xlabel() for axes in shown)
    assert any(axes.get_ylabel() for axes in shown)
    caption = FIGURES[name].caption(records)
    assert "seeds" in caption
    assert "d_model " in caption
    assert "Vanilla" in caption
    if name in ABOUT_TRAINING:
        assert "synthetic text, 3 documents (digest c0ffee12)" in caption
        assert "16 x 64 tokens" in caption
        assert "60 steps" in caption


@pytest.mark.parametrize("case", MINIMAL)
@pytest.mark.parametrize("name", NAMES)
def test_figure_draws_what_is_there(name: str, case: str) -> None:
    if (name, case) == ("while_training", "diverged before a step"):
        with pytest.raises(ValueError, match="train with the default probes first"):
            FIGURES[name].draw(MINIMAL[case])
        return
    FIGURES[name].draw(MINIMAL[case]).draw_without_rendering()
    assert FIGURES[name].caption(MINIMAL[case])


@pytest.mark.parametrize("name", NAMES)
def test_figure_is_saved_in_both_formats(name: str, tmp_path: Path) -> None:
    png, svg = save(FIGURES[name].draw(MINIMAL["one run"]), tmp_path, name)
    assert png.read_bytes().startswith(b"\x89PNG")
    assert b"<svg" in svg.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == [png.name, svg.name]


@pytest.mark.parametrize("name", NAMES)
def test_figure_without_records_says_what_to_do(name: str) -> None:
    with pytest.raises(ValueError, match="first"):
        FIGURES[name].draw([])


def test_an_unknown_figure_lists_the_known() -> None:
    with pytest.raises(KeyError, match="loss_curves"):
        FIGURES["nonsense"]


def test_files_are_the_same_bytes_in_another_process(tmp_path: Path, records: list[dict[str, Any]]) -> None:
    name = "gradient_growth"
    here = save(FIGURES[name].draw(records), tmp_path / "here", name)
    write_json(tmp_path / "records.json", records)
    code = (
        "import json, sys; from pathlib import Path; from figures import FIGURES, save; folder = Path(sys.argv[1]);"
        "records = json.loads((folder / 'records.json').read_text());"
        f"save(FIGURES['{name}'].draw(records), folder / 'there', '{name}')"
    )
    environment = os.environ | {"PYTHONHASHSEED": "7", "MPLBACKEND": "svg"}
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, env=environment, timeout=60)
    for file in here:
        assert file.read_bytes() == (tmp_path / "there" / file.name).read_bytes()
    assert "dc:date" not in here[1].read_text()


def test_figures_need_neither_torch_nor_pyplot() -> None:
    code = (
        "import sys, figures.report; from figures import FIGURES; list(FIGURES.values());"
        "assert not {'torch', 'empirics', 'matplotlib.pyplot'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


# --- the numbers in them -----------------------------------------------------------------------------------------


def test_growth_carries_measured_and_predicted(records: list[dict[str, Any]]) -> None:
    figure = FIGURES["gradient_growth"].draw(records)
    shown = selection.shown_network(selection.initialisations(records))
    for record in shown.records:
        measured = selection.measurement(record, "gradient_profile")
        assert measured is not None
        assert holds(lines(figure, "measured"), measured[0])
        assert holds(lines(figure, "predicted (sharp)"), selection.prediction(record, "gradient_profile", "sharp"))


def test_growth_errors_are_predicted_over_observed() -> None:
    figure = FIGURES["gradient_growth"].draw([initialisation("Vanilla")])
    containers = {c.get_label(): c for axes in figure.axes for c in axes.containers}
    for kind, error in (("sharp", 2.0), ("estimate", -30.0)):
        data = containers[f"{kind}: Vanilla"][0]
        np.testing.assert_allclose(np.asarray(data.get_xdata(), float), [error])
    (segment,) = containers["sharp: Vanilla"][2][0].get_segments()
    np.testing.assert_allclose(np.ptp(np.asarray(segment, float)[:, 0]) / 2, 102 * 0.02 / math.sqrt(3))


def test_growth_names_what_is_outside_its_domain(records: list[dict[str, Any]]) -> None:
    assert "outside the prediction's domain" in FIGURES["gradient_growth"].caption(records)
    inside = [record for record in records if record.get("preset") == "tiny"]
    assert "outside" not in FIGURES["gradient_growth"].caption(inside)


def test_bounds_and_their_gaps_are_the_records() -> None:
    record = initialisation("Vanilla")
    figure = FIGURES["gradient_bounds"].draw([record])
    for kind in ("estimate", "upper"):
        drawn = lines(figure, style.KINDS[kind][1])
        assert holds(drawn, selection.prediction(record, "log10_gradient_bound", kind))
    growth = math.log10(1 + 2 * LAYERS * 0.1)
    assert gradient_bounds.gaps(record) == pytest.approx({"upper": 14.4 - growth, "estimate": 9.6 - growth})


def test_kinds_have_their_own_line_styles() -> None:
    figure = FIGURES["jacobian_norms"].draw([initialisation("Vanilla")])
    drawn = {line.get_label(): line for axes in figure.axes for line in axes.get_lines()}
    assert drawn["measured"].get_linestyle() == "None"
    assert drawn["measured"].get_marker() == "o"
    dashes = {name: str(line._unscaled_dash_pattern) for name, line in drawn.items() if name != "measured"}
    assert dashes["paper's estimate"] != dashes["rigorous upper bound"]
    assert len({str(pattern) for pattern, _ in style.KINDS.values()}) == len(style.KINDS)


def test_norms_are_titled_with_the_tokens_they_were_measured_on() -> None:
    record = initialisation("Vanilla")
    record["jacobians"]["seq_len"] = 13  # of a record that measured its growth on 64
    assert FIGURES["jacobian_norms"].draw([record]).get_suptitle().endswith("tiny, 13 text tokens")
    record["jacobians"] = None
    assert f"{record['seq_len']} text tokens" in FIGURES["jacobian_norms"].draw([record]).get_suptitle()


def test_methods_differ_in_colour_and_in_marker() -> None:
    names = [*METHOD_NAMES, *(f"arm {n}" for n in range(3))]
    marks = [style.mark(name, names) for name in names]
    assert len({mark.colour for mark in marks}) == len({mark.marker for mark in marks}) == len(names)


def test_loss_curve_is_the_smoothed_mean_over_seeds() -> None:
    runs = [training("Vanilla", seed=seed) for seed in (0, 1)]
    width = loss_curves.window(runs)
    loss = np.array([run["series"]["loss"] for run in runs])
    middle = slice(width, -width)
    expected = np.convolve(loss.mean(0), np.ones(width) / width, mode="same")
    (drawn,) = lines(loss_curves.draw(runs), "Vanilla")
    np.testing.assert_allclose(drawn[middle], expected[middle])
    assert f"running mean over {width} steps" in loss_curves.caption(runs)


def test_running_mean_keeps_gaps_and_reaches_the_ends() -> None:
    values = np.array([1.0, 3.0, np.nan, 5.0])
    np.testing.assert_allclose(loss_curves.running_mean(values, 3), [2, 2, np.nan, 5])
    np.testing.assert_allclose(loss_curves.running_mean(values, 1), values)


def test_a_diverged_run_ends_in_a_cross() -> None:
    runs = [training("Vanilla", lost=20), training("Scaled Embed")]
    figure = loss_curves.draw(runs)
    (cross,) = [line for axes in figure.axes for line in axes.get_lines() if line.get_label() == "diverged"]
    assert list(cross.get_xdata()) == [19]
    assert "diverged (1 here)" in loss_curves.caption(runs)
    assert "diverged" in [text.get_text() for text in figure.legends[0].get_texts()]


def test_gradient_norms_carry_the_series_and_the_events() -> None:
    run = training("Vanilla")
    figure = gradient_norms.draw([run], spikes={run["id"]: (7, 30), "another": (9,)})
    assert holds(lines(figure, "all parameters"), run["series"]["gradient_norm"])
    assert holds(lines(figure, "first layer"), [row[0] for row in run["series"]["layer_gradient"]])
    assert holds(lines(figure, "last layer"), [row[-1] for row in run["series"]["layer_gradient"]])
    (events,) = [line for axes in figure.axes for line in axes.get_lines() if line.get_label() == "event"]
    assert list(events.get_xdata()) == [7, 30]
    assert "(2 in all)" in gradient_norms.caption([run], spikes={run["id"]: (7, 30)})


def test_learning_rates_are_means_over_seeds_and_count_the_lost(records: list[dict[str, Any]]) -> None:
    figure = learning_rates.draw(records)
    runs = [r for r in selection.trainings(records) if selection.label_of(r) == "Embed LN"]
    means = [
        np.mean([r["final"]["heldout_loss"] for r in runs if r["spec"]["learning_rate"] == x]) for x in (0.01, 0.03)
    ]
    assert holds(lines(figure, "Embed LN"), means)
    assert np.isnan(lines(figure, "Vanilla")[0][-1])
    assert "2 of 2" in [text.get_text() for text in figure.axes[0].texts]


def test_while_training_carries_the_probes_of_records_that_have_them() -> None:
    """Means over layers and over seeds; an older record, without the series, is left out and not in the way."""
    runs = [training("Vanilla", seed=seed) for seed in (0, 1)]
    older = training("Scaled Embed")
    del older["series"]["probes"]
    figure = FIGURES["while_training"].draw([*runs, older])
    probes = [run["series"]["probes"] for run in runs]
    entropy = [np.mean(found["attention_entropy_relative"]["values"], axis=1) for found in probes]
    growth = [np.array(found["gradient_growth"]["values"])[:, 0] for found in probes]
    ratio = [np.median(np.array(found["update_ratio"]["values"])[:, 1:-1], axis=1) for found in probes]
    for expected in (entropy, growth, ratio):
        assert holds(lines(figure, "Vanilla"), np.mean(expected, axis=0))
    assert not lines(figure, "Scaled Embed")
    with pytest.raises(ValueError, match="train with the default probes first"):
        FIGURES["while_training"].draw([older])


def test_distributions_carry_distances_of_places_and_weights() -> None:
    run = training("Vanilla")
    figure = FIGURES["distributions"].draw([run])
    for moment in ("start", "end"):
        found = run["series"]["distributions"][moment]
        assert holds(lines(figure, "Vanilla"), [place["normal_distance"] for place in found["places"]])
        assert holds(lines(figure, "Vanilla"), [weight["normal_distance"] for weight in found["weights"].values()])


# --- selection and wording ---------------------------------------------------------------------------------------


def test_one_experiment_can_be_drawn_alone() -> None:
    several = MINIMAL["several experiments"]
    assert len(selection.by_rate(selection.trainings(several))) == 4
    assert len(selection.by_rate(selection.trainings(several, "long"))) == 1
    with pytest.raises(ValueError, match="'none'"):
        selection.trainings(several, "none")
    titles = [panel.title for panel in selection.by_rate(selection.trainings(several))]
    assert "short-sequences, T 16, batch 64, lr 0.01" in titles


def test_spread_over_series_of_unequal_length() -> None:
    mean, low, high = selection.spread([np.array([1.0, 3.0]), np.array([3.0])])
    assert (mean.tolist(), low.tolist(), high.tolist()) == ([2, 3], [1, 3], [3, 3])
    assert np.isnan(selection.spread([np.array([np.nan])]).mean).all()
    assert selection.spread([]).mean.size == 0


def test_listed_values() -> None:
    assert wording.listed(["b", "a"]) == "a, b"
    assert wording.listed(range(1, 100, 2)) == "1, 3, 5, 7, 9, 11, 13, ..., 99"


def test_a_device_check_is_drawn_beside_its_tolerances() -> None:
    def row(quantity: str, difference: float | None, verdict: str) -> dict[str, Any]:
        return {"quantity": quantity, "difference": difference, "tolerance": 1e-6, "verdict": verdict}

    rows = [row("a", 0.0, "agrees"), row("b", 5e-7, "agrees"), row("c", None, "differs")]
    measured = row("d", None, "measured") | {"tolerance": None}
    record = {"rows": [*rows, measured], "gpu": True, "environment": {"device": "H100"}}
    (axes,) = device_distances.draw(record).axes
    shares = [float(np.asarray(line.get_xdata())[0]) for line in axes.lines[:3]]
    np.testing.assert_allclose(shares, [device_distances.SMALLEST, 0.5, 100.0])
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "b", "c"]
    assert axes.lines[2].get_marker() != axes.lines[0].get_marker()
    assert "no evidence" in device_distances.caption(record | {"gpu": False})
    with pytest.raises(ValueError, match="nothing to compare"):
        device_distances.draw({"rows": [measured]})


def test_drawing_leaves_the_records_alone(records: list[dict[str, Any]]) -> None:
    before = copy.deepcopy(records)
    loss_curves.draw(records)
    FIGURES["gradient_growth"].draw(records)
    assert records == before
