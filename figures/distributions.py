"""Assumption 1 put to the test: how far x, x' and the weights are from normal, before and after training."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from figures import selection, style, wording
from figures.selection import Record, Records, Spread

# Lilliefors (1967), n > 30: what independent normal entries exceed one time in twenty, times sqrt(n).
LILLIEFORS = 0.886
LETTERS = {
    "query": "$W_Q$",
    "key": "$W_K$",
    "value": "$W_V$",
    "output": "$W_O$",
    "enter": "$W_1$",
    "leave": "$W_2$",
    "gate": "$W_3$",
}
MOMENTS = {"start": "before training", "end": "after training"}


def draw(records: Records, experiment: str | None = None) -> Figure:
    """Above the residual stream's places, below the weight matrices; left before training, right after."""
    shown = selection.shown_rate(selection.trainings(records, experiment))
    labels = selection.labels_of(shown.records)
    with style.look():
        figure, grid = style.panels(2, 2, height=2.35, sharey="row", sharex="row")
        for column, (moment, words) in enumerate(MOMENTS.items()):
            _places(grid[0, column], shown.records, moment, labels)
            _weights(grid[1, column], shown.records, moment, labels)
            grid[0, column].set_title(f"Residual stream, {words}")
            grid[0, column].set_xlabel("layers passed (x at whole numbers, x' between)")
            grid[1, column].set_title(f"Weights, {words}")
        for row in grid:
            row[0].set_ylabel("distance to normal\n(Kolmogorov)")
            style.log_axis(row[0].yaxis)
        handles = style.method_handles(labels, linestyle="none")
        handles.append(style.reference_handle("5 % level of independent normal entries"))
        style.legend(figure, handles)
    return figure


def _items(record: Record, moment: str, names: list[str] | None) -> list[dict[str, Any]]:
    """What was found at the places, or of the named matrices; empty if the run did not come so far."""
    found = record["series"]["distributions"].get(moment)
    if found is None:
        return []
    return found["places"] if names is None else [found["weights"].get(name, {}) for name in names]


def _distances(records: Records, moment: str, names: list[str] | None = None) -> Spread:
    found = [_items(record, moment, names) for record in records]
    return selection.spread([selection.numbers([item.get("normal_distance") for item in items]) for items in found])


def _level(records: Records, moment: str, names: list[str] | None = None) -> list[float]:
    """Lilliefors' level at the number of entries that each distance was judged by."""
    items = max((_items(record, moment, names) for record in records), key=len)
    return [LILLIEFORS / np.sqrt(item.get("entries", np.nan)) for item in items]


def _places(axes: Axes, records: Records, moment: str, labels: list[str]) -> None:
    for label in labels:
        mark = style.mark(label, labels)
        over_seeds = _distances(selection.of_label(records, label), moment)
        layers = np.arange(over_seeds.mean.size) / 2
        style.band(axes, layers, over_seeds.low, over_seeds.high, mark.colour)
        every = 2 * max(1, layers.size // 25)  # a marker at x, none at x'
        style.curve(axes, layers, over_seeds.mean, mark, label, markevery=every, linewidth=0.75 * mark.width)
    level = _level(records, moment)
    style.reference(axes, np.arange(len(level)) / 2, level)


def _weights(axes: Axes, records: Records, moment: str, labels: list[str]) -> None:
    names = _matrices(records)
    for place, label in enumerate(labels):
        mark = style.mark(label, labels)
        over_seeds = _distances(selection.of_label(records, label), moment, names)
        if over_seeds.mean.size:
            x = np.arange(len(names)) + (place - (len(labels) - 1) / 2) * 0.7 / len(labels)
            axes.vlines(x, over_seeds.low, over_seeds.high, color=mark.colour, linewidth=0.9)
            style.measured(axes, x, over_seeds.mean, mark, label=label)
    level = _level(records, moment, names)
    style.reference(axes, np.arange(len(level)), level, drawstyle="steps-mid")
    axes.set_xticks(
        range(len(names)), [_short(name) for name in names], rotation=60, ha="right", rotation_mode="anchor"
    )


def _matrices(records: Records) -> list[str]:
    """Names of the matrices, in the records' order."""
    names: dict[str, None] = {}
    for record in records:
        for moment in record["series"]["distributions"].values():
            names |= dict.fromkeys(moment["weights"])
    return list(names)


def _short(name: str) -> str:
    """`layers.0.attention.query.weight` as `1: $W_Q$`."""
    words = [word for word in name.split(".") if word not in ("weight", "layers", "attention", "feedforward")]
    words = [f"{int(word) + 1}:" if word.isdigit() else LETTERS.get(word, word) for word in words]
    return " ".join(words)


def caption(records: Records, experiment: str | None = None) -> str:
    """Settings and seeds, and what the distance is."""
    shown = selection.shown_rate(selection.trainings(records, experiment))
    ended = sum("end" in record["series"]["distributions"] for record in shown.records)
    return (
        "Distance to normality, measured: the largest gap between the distribution function of the entries and that of "
        "the normal law with their mean and standard deviation. Markers and lines are means over seeds, bands and "
        "bars their lowest and highest; the grey line is what as many independent normal entries exceed one time in "
        f"twenty (Lilliefors). After training: {ended} of {len(shown.records)} runs, those that did not diverge. "
        f"{wording.training_settings(shown.records)}"
    )
