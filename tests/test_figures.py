"""Figures and report: drawn from records of the documented shape, with the records' own numbers in them."""

from __future__ import annotations

import copy
import math
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
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
from figures.report import VERDICTS, write_report
from theory.architecture import METHODS, method, preset
from theory.records import plain, write_json

METHOD_NAMES = tuple(METHODS)
LAYERS = preset("tiny").n_layers
ABOUT_TRAINING = ("loss_curves", "gradient_norms", "learning_rates", "distributions", "while_training")
ABOUT_INITIALISATION = tuple(name for name in NAMES if name not in ABOUT_TRAINING)


# --- synthetic records -------------------------------------------------------------------------------------------


def distribution(rng: np.random.Generator) -> dict[str, Any]:
    return {"mean": 0.0, "std": 1.0, "normal_distance": float(rng.uniform(0.004, 0.1)), "entries": 4096}


def distributions(rng: np.random.Generator) -> dict[str, Any]:
    names = ("tokens.weight", "layers.0.attention.query.weight", "layers.11.feedforward.leave.weight", "head.weight")
    return {
        "places": [distribution(rng) for _ in range(2 * LAYERS + 1)],
        "weights": {name: distribution(rng) for name in names},
    }


def while_training(rng: np.random.Generator, steps: int) -> dict[str, Any]:
    """What the default probes leave at every twentieth step; nothing if there was none."""
    probed = list(range(0, steps, 20))
    inside = [f"layers.{n}.attention.query.weight" for n in range(LAYERS)]
    labels = {
        "attention_entropy_relative": [f"layer {n}" for n in range(LAYERS)],
        "gradient_growth": ["network"],
        "update_ratio": ["tokens.weight", *inside, "head.weight"],
    }
    return {
        name: {"labels": found, "steps": probed, "values": rng.uniform(0.1, 1, (len(probed), len(found))).tolist()}
        for name, found in labels.items()
        if probed
    }


def training(
    label: str, *, seed: int = 0, rate: float = 0.01, experiment: str = "sweep", lost: int | None = None, **spec: Any
) -> dict[str, Any]:
    """A training record; `lost` is the step at which its loss stopped being finite."""
    settings: dict[str, Any] = {"steps": 60, "batch_size": 16, "seq_len": 64, "schedule": "cosine", **spec}
    architecture = method(preset("tiny"), label) if label in METHODS else preset("tiny")
    rng = np.random.default_rng([seed, len(label), int(1e4 * rate)])
    steps = settings["steps"] if lost is None else lost
    norms = np.exp(rng.normal(size=(steps, LAYERS)))
    series = {
        "loss": [
            *(6 * np.exp(-np.arange(steps) / 80) + rng.uniform(size=steps) / 5),
            *([] if lost is None else [None]),
        ],
        "learning_rate": [rate] * steps,
        "gradient_norm": np.sqrt((norms**2).sum(1)).tolist(),
        "layer_gradient": norms.tolist(),
        "distributions": {"start": distributions(rng), **({"end": distributions(rng)} if lost is None else {})},
        "probes": while_training(rng, steps),
        "diverged_at": lost,
    }
    body = {
        "schema": 1,
        "kind": "training",
        "id": f"{experiment}-{label}-{rate:g}-{seed}",
        "spec": {
            "label": label,
            "experiment": experiment,
            "seed": seed,
            "learning_rate": rate,
            "architecture": architecture,
            **settings,
        },
        "environment": {"torch": "2"},
        "data": {"source": "synthetic text, 3 documents", "digest": "c0ffee1234567890", "vocab_size": 512},
        "series": series,
        "final": {"heldout_loss": 4 + rng.uniform() if lost is None else None, "diverged_at": lost},
    }
    return plain(body)


def prediction(quantity: str, kind: str, values: Any, in_domain: bool = True) -> dict[str, Any]:
    reasons = [] if in_domain else ["too narrow"]
    found = {"quantity": quantity, "kind": kind, "statement": "s", "source": "s", "values": list(values)}
    return {**found, "in_domain": in_domain, "reasons": reasons}


def initialisation(label: str, *, name: str = "tiny", tokens: str = "text", seeds: tuple[int, ...] = (0, 1, 2)) -> Any:
    """An initialisation record with every prediction the figures know."""
    architecture = method(preset(name), label)
    places = np.arange(2 * architecture.n_layers + 1)
    profile = 1 + (places[-1] - places) * (0.1 if label in ("Vanilla", "Embed Detach") else 0.01)
    branch = np.linspace(3, 1, architecture.n_layers)
    spread = [0.02] * places.size if len(seeds) > 1 else [None] * places.size
    predictions = [
        prediction("gradient_profile", "sharp", profile * 1.01),
        prediction("gradient_growth", "sharp", [profile[0] * 1.02], in_domain=name != "wide"),
        prediction("gradient_growth", "estimate", [profile[0] * 0.7]),
        prediction("residual_std", "sharp", profile),
        prediction("ffn_branch", "estimate", branch),
        prediction("ffn_branch", "upper", branch * 2),
        prediction("attention_branch", "estimate", branch * 1.5),
        prediction("log10_gradient_bound", "estimate", (places[-1] - places) * 0.4),
        prediction("log10_gradient_bound", "upper", (places[-1] - places) * 0.6),
    ]
    measured = {"seeds": list(seeds), "lower_estimate": False}
    measurements = [
        {"quantity": "gradient_growth", "values": [profile[0]], "log_sd": spread[:1], **measured},
        {"quantity": "gradient_profile", "values": profile, "log_sd": spread, **measured},
        {"quantity": "residual_std", "values": profile, "log_sd": None, **measured},
    ]
    layer = {"attention_branch": 0.9, "attention_half": 1.7, "J_Z": 1.0, "feedforward_branch": 0.8}
    layers = [{**layer, "feedforward_half": 1.5, "sigma_x": 1.0} for _ in range(architecture.n_layers)]
    body = {
        "schema": 1,
        "kind": "initialisation",
        "id": f"init-{name}-{tokens}-{label}",
        "label": label,
        "preset": name,
        "architecture": architecture,
        "seq_len": 64,
        "tokens": tokens,
        "seeds": seeds,
        "predictions": predictions,
        "measurements": measurements,
        "jacobians": {"seq_len": 64, "seed": 0, "layers": layers},
    }
    return plain({**body, "measurements": [{**m, "values": list(m["values"])} for m in measurements]})


def full() -> list[dict[str, Any]]:
    runs = [training(label, seed=s, rate=r) for label in METHOD_NAMES for s in (0, 1) for r in (0.01, 0.03)]
    runs += [training("Vanilla", seed=seed, rate=0.1, lost=20) for seed in (0, 1)]
    runs += [training("an arm of our own", seed=0, rate=0.01)]
    return runs + [initialisation(label, name=n) for label in METHOD_NAMES for n in ("tiny", "wide")]


MINIMAL = {
    "one run": [training("Vanilla"), initialisation("Vanilla", seeds=(0,))],
    "diverged at once": [training("Embed LN", lost=1), initialisation("Embed LN")],
    "diverged before a step": [training("Embed LN", lost=0), initialisation("Embed LN")],
    "nothing predicted": [training("Vanilla"), initialisation("Vanilla") | {"predictions": [], "jacobians": None}],
    "several experiments": [
        training("Vanilla"),
        training("Vanilla", experiment="long", steps=200, schedule="constant"),
        training("Scaled Embed", experiment="short-sequences", seq_len=16, batch_size=64),
        training("Scaled Embed", experiment="short-sequences", seq_len=32, batch_size=32),
        initialisation("Scaled Embed"),
    ],
}


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


# --- the report --------------------------------------------------------------------------------------------------

VOID = {"meta", "img", "link", "br", "circle", "line"}


class Reader(HTMLParser):
    """Checks that tags nest, and collects addresses and text."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.tags: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "action", "data")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture
def claims() -> list[dict[str, Any]]:
    base = {
        "kind": "upper",
        "criterion": "a < b & c",
        "source": "someone, eq. (1)",
        "seeds": [0, 1],
        "error": 0.01234567,
    }
    return [
        {**base, "id": f"c{n}", "claim": f"<script>alert({n})</script>", "verdict": verdict, "observed": None}
        for n, verdict in enumerate(VERDICTS)
    ]


def report(path: Path, claims: list[dict[str, Any]]) -> tuple[str, Reader]:
    png, svg = save(loss_curves.draw([training("Vanilla")]), path.parent, "loss_curves")
    figures = [("loss_curves", png, "a <b>caption</b>"), ("again", svg, "the same as a drawing")]
    settings = {"scale": "smoke", "versions": {"numpy": "2"}, "rates": [0.01, 0.03]}
    write_report(path, title="A & B", claims=claims, figures=figures, settings=settings, notes=["1 < 2"])
    page = path.read_text()
    reader = Reader()
    reader.feed(page)
    reader.close()
    return page, reader


def test_report_is_whole_and_self_contained(tmp_path: Path, claims: list[dict[str, Any]]) -> None:
    page, reader = report(tmp_path / "report.html", claims)
    assert not reader.open
    assert "script" not in reader.tags
    assert "link" not in reader.tags
    assert len(reader.addresses) == 2
    assert all(address.startswith("data:image/") for address in reader.addresses)
    assert "url(" not in page
    assert "@import" not in page
    assert (tmp_path / "report.html").read_bytes().isascii()


def test_report_says_every_verdict_in_words_and_symbols(tmp_path: Path, claims: list[dict[str, Any]]) -> None:
    _, reader = report(tmp_path / "report.html", claims)
    for verdict, symbol in zip(VERDICTS, "\u2713\u2717\u25cb"):
        assert f"{symbol} {verdict}" in reader.text
    for kind in ("Sharp prediction", "Estimate", "Rigorous upper bound", "Measured"):
        assert kind in reader.text
    assert "0.01235" in reader.text
    assert "0, 1" in reader.text
    assert "versions" in reader.text


def test_report_escapes_what_it_is_given(tmp_path: Path, claims: list[dict[str, Any]]) -> None:
    page, reader = report(tmp_path / "report.html", claims)
    assert "<script>alert(0)</script>" in reader.text
    assert "<script>" not in page
    assert "a < b & c" in reader.text
    assert "a <b>caption</b>" in reader.text
    assert "1 < 2" in reader.text


def test_report_is_the_same_twice(tmp_path: Path, claims: list[dict[str, Any]]) -> None:
    assert report(tmp_path / "1.html", claims)[0] == report(tmp_path / "2.html", claims)[0]


def test_letters_of_a_narrow_figure_are_no_larger(tmp_path: Path) -> None:
    wide, _ = save(loss_curves.draw([training("Vanilla")]), tmp_path, "wide")
    narrow, vector = save(learning_rates.draw([training("Vanilla")]), tmp_path, "narrow")
    figures = [(path.name, path, "") for path in (wide, narrow, vector)]
    write_report(tmp_path / "r.html", title="t", claims=[], figures=figures, settings={}, notes=[])
    widths = [int(found) for found in re.findall(r'<img style="max-width: (\d+)px"', (tmp_path / "r.html").read_text())]
    assert widths == [920, round(0.62 * 920), 920]


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


def test_report_of_nothing_is_still_a_page(tmp_path: Path) -> None:
    write_report(tmp_path / "r.html", title="t", claims=[], figures=[], settings={}, notes=[])
    assert "How to read this" in (tmp_path / "r.html").read_text()


def test_report_names_the_remedy(tmp_path: Path, claims: list[dict[str, Any]]) -> None:
    claims[0]["verdict"] = "maybe"
    with pytest.raises(ValueError, match="use one of reproduced"):
        write_report(tmp_path / "r.html", title="t", claims=claims, figures=[], settings={}, notes=[])
    for path, remedy in ((tmp_path / "a.gif", "save the figure"), (tmp_path / "a.png", "draw the figure")):
        with pytest.raises(ValueError, match=remedy):
            write_report(tmp_path / "r.html", title="t", claims=[], figures=[("a", path, "")], settings={}, notes=[])


def test_drawing_leaves_the_records_alone(records: list[dict[str, Any]]) -> None:
    before = copy.deepcopy(records)
    loss_curves.draw(records)
    FIGURES["gradient_growth"].draw(records)
    assert records == before
