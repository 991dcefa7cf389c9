"""Gradient norm while training: all parameters, the first layer, the last layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from textwrap import fill

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from figures import selection, style, wording
from figures.selection import Array, Panel, Record, Records

Spikes = Mapping[str, Sequence[int]]

# part: name, how it is drawn.
PARTS = {
    "all parameters": style.Mark("#000000", "o"),
    "first layer": style.Mark("#D55E00", "^"),
    "last layer": style.Mark("#56B4E9", "s"),
}


def draw(records: Records, experiment: str | None = None, spikes: Spikes | None = None) -> Figure:
    """One row a setting, one column a method.

    Args:
        spikes: steps at which an event begins, by the record's id, drawn as ticks along the top; counted in the
            records if not given.
    """
    found = selection.trainings(records, experiment)
    spikes = _events(records) if spikes is None else spikes
    labels = selection.labels_of(found)
    panels = selection.by_rate(found)
    with style.look():
        figure, grid = style.panels(len(panels), len(labels), height=1.55, sharey="row", sharex="row")
        for row, panel in zip(grid, panels):
            for axes, label in zip(row, labels):
                _panel(axes, panel, label, spikes)
            row[0].set_ylabel(f"{fill(panel.title, 24)}\ngradient norm")
            style.whole_numbers(row[0])
            style.log_axis(row[0].yaxis)
        for column, label in zip(grid.T, labels):
            column[0].set_title(style.title(label))
            ran = [axes for axes, panel in zip(column, panels) if selection.of_label(panel.records, label)]
            ran[-1].set_xlabel("step")
        handles = style.named_handles(PARTS)
        if any(spikes.get(record["id"]) for record in found):
            handles.append(style.marker_handle("|", "event", colour=style.EVENT))
        if any(map(selection.has_diverged, found)):
            handles.append(style.marker_handle("x", "diverged"))
        style.legend(figure, handles)
    return figure


def _events(records: Records) -> Spikes:
    """Gradient-norm events above twice the median of the last steps."""
    return selection.events(records, "gradient_norm", "twice-median")


def parts(record: Record) -> dict[str, Array]:
    """The three norms of a run, step by step."""
    layers = record["series"]["layer_gradient"]
    return {
        "all parameters": selection.numbers(record["series"]["gradient_norm"]),
        "first layer": selection.numbers([layer[0] for layer in layers]),
        "last layer": selection.numbers([layer[-1] for layer in layers]),
    }


def _panel(axes: Axes, panel: Panel, label: str, spikes: Spikes) -> None:
    runs = selection.of_label(panel.records, label)
    if not runs:
        axes.text(0.5, 0.5, "not run", transform=axes.transAxes, ha="center", va="center", color=style.GREY)
        axes.tick_params(bottom=False, left=False, labelbottom=False)
        axes.grid(visible=False)
        for side in axes.spines.values():
            side.set_visible(False)
        return
    for name, mark in PARTS.items():
        series = [parts(run)[name] for run in runs]
        over_seeds = selection.spread(series)
        steps = np.arange(over_seeds.mean.size)
        if len(runs) > 1:
            style.band(axes, steps, over_seeds.low, over_seeds.high, mark.colour)
        style.curve(axes, steps, over_seeds.mean, mark, name, linewidth=0.9)
        for run, values in zip(runs, series):
            if selection.has_diverged(run) and name == "all parameters":
                style.cross_at_end(axes, np.arange(values.size), values, mark)
    events = sorted(step for run in runs for step in spikes.get(run["id"], ()))
    if events:
        style.ticks_along_top(axes, events)


def caption(records: Records, experiment: str | None = None, spikes: Spikes | None = None) -> str:
    """Settings, seeds and what is marked."""
    found = selection.trainings(records, experiment)
    spikes = _events(records) if spikes is None else spikes
    marked = ""
    if spikes:
        count = sum(len(spikes.get(record["id"], ())) for record in found)
        marked = f" Ticks along the top: an event begins, the norm above twice its recent median ({count} in all)."
    return (
        "Norm of the parameter gradient before clipping, measured at every step: all parameters, the first layer, the "
        f"last layer. Lines are means over seeds, bands their lowest and highest; nothing is smoothed.{marked}"
        f"{wording.diverged(found)} {wording.training_settings(found)}"
    )
