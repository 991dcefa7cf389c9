"""What the default probes see while training: attention entropy, gradient growth, and how fast the matrices move."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from figures import selection, style, wording
from figures.selection import Array, Panel, Record, Records


class Row(NamedTuple):
    """One quantity through training.

    Attributes:
        probe: the series of the record; `reduce` makes one number a step of a row of its values and labels.
    """

    probe: str
    words: str
    reduce: Callable[[Array, list[str]], float]
    logarithmic: bool


def _mean(values: Array, labels: list[str]) -> float:
    return float(values.mean())


def _median_of_layers(values: Array, labels: list[str]) -> float:
    inside = [label.startswith("layers.") for label in labels]
    return float(np.median(values[inside])) if any(inside) else float(np.median(values))


ROWS = (
    Row("attention_entropy_relative", "attention entropy\nover its most", _mean, False),
    Row("gradient_growth", "gradient growth", _mean, True),
    Row("update_ratio", "update over weight\n(median matrix)", _median_of_layers, True),
)


def draw(records: Records, experiment: str | None = None) -> Figure:
    """One row a quantity, one column a setting and learning rate, one curve a method.

    Raises:
        ValueError: no record has such a series.
    """
    found = _probed(records, experiment)
    labels, panels = selection.labels_of(found), selection.by_rate(found)
    with style.look():
        figure, grid = style.panels(len(ROWS), len(panels), height=1.55, sharey="row", sharex="col")
        for column, panel in zip(grid.T, panels):
            column[0].set_title(panel.title)
            for axes, row in zip(column, ROWS):
                _panel(axes, panel, row, labels)
            column[-1].set_xlabel("step")
            style.whole_numbers(column[-1])
        for axes, row in zip(grid[:, 0], ROWS):
            axes.set_ylabel(row.words)
            if row.logarithmic:
                style.log_axis(axes.yaxis)
            else:
                axes.set_ylim(0, 1.03)
        handles = style.method_handles(labels)
        if any(map(selection.has_diverged, found)):
            handles.append(style.marker_handle("x", "diverged"))
        style.legend(figure, handles)
    return figure


def _probed(records: Records, experiment: str | None) -> list[Record]:
    """Trainings that have one of the series at least."""
    found = [run for run in selection.trainings(records, experiment) if any(_steps(run, row).size for row in ROWS)]
    if not found:
        wanted = ", ".join(row.probe for row in ROWS)
        raise ValueError(f"no training record has {wanted} to draw; train with the default probes first")
    return found


def _steps(run: Record, row: Row) -> Array:
    return selection.numbers((run["series"].get("probes") or {}).get(row.probe, {}).get("steps"))


def series(run: Record, row: Row) -> Array:
    """One number a probed step; empty where the record has none."""
    found = (run["series"].get("probes") or {}).get(row.probe)
    if found is None:
        return np.empty(0)
    return np.array([row.reduce(selection.numbers(values), found["labels"]) for values in found["values"]])


def _panel(axes: Axes, panel: Panel, row: Row, labels: list[str]) -> None:
    for place, label in enumerate(labels):
        runs = [run for run in selection.of_label(panel.records, label) if _steps(run, row).size]
        if not runs:
            continue
        mark = style.mark(label, labels)
        steps = max((_steps(run, row) for run in runs), key=len)
        over_seeds = selection.spread([series(run, row) for run in runs])
        if len(runs) > 1:
            style.band(axes, steps, over_seeds.low, over_seeds.high, mark.colour)
        style.curve(axes, steps, over_seeds.mean, mark, label, place=place)
        for run in runs:
            if selection.has_diverged(run):
                style.cross_at_end(axes, _steps(run, row), series(run, row), mark)


def caption(records: Records, experiment: str | None = None) -> str:
    """Settings, seeds and what the rows are."""
    found = _probed(records, experiment)
    return (
        "Measured at the probed steps. Attention entropy is that of a row of the softmax over log t, the most that the "
        "t keys it sees allow, averaged over rows, heads and layers: 1 for uniform attention, 0 where every row looks "
        "at one key. Gradient growth is the gradient norm entering the first layer over that leaving the last. Update "
        "over weight is a step's change of a matrix over the matrix, in the Frobenius norm; the median over the "
        "matrices inside the layers. Lines are means over seeds, bands their lowest and highest."
        f"{wording.diverged(found)} {wording.training_settings(found)}"
    )
