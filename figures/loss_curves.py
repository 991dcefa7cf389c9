"""Training loss by method, one panel a learning rate."""

from __future__ import annotations

from textwrap import fill

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from figures import selection, style, wording
from figures.selection import Array, Panel, Records

COLUMNS = 3
SMOOTHED = 30  # a curve keeps about this many independent values


def window(records: Records) -> int:
    """Steps averaged over: one thirtieth of the run, at least one."""
    return max(1, max(record["spec"]["steps"] for record in records) // SMOOTHED)


def running_mean(values: Array, width: int) -> Array:
    """Centred mean over `width` steps, fewer at the ends and around what is missing."""
    known = np.isfinite(values)
    kernel = np.ones(min(width, max(values.size, 1)))
    total = np.convolve(np.where(known, values, 0.0), kernel, mode="same")
    count = np.convolve(known.astype(float), kernel, mode="same")
    mean = np.full(values.size, np.nan)
    np.divide(total, count, out=mean, where=known & (count > 0))
    return mean


def draw(records: Records, experiment: str | None = None) -> Figure:
    """Mean and range over seeds, smoothed; diverged runs end in a cross."""
    found = selection.trainings(records, experiment)
    labels = selection.labels_of(found)
    panels = selection.by_rate(found)
    columns = min(COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    with style.look():
        figure, grid = style.panels(rows, columns, height=2.35)
        for axes, panel in zip(grid.flat, panels):
            _panel(axes, panel, labels)
        for axes in grid.flat[len(panels) :]:
            axes.set_visible(False)
        for row in grid:
            row[0].set_ylabel("training loss (nats per token)")
        handles = style.method_handles(labels)
        if any(map(selection.has_diverged, found)):
            handles.append(style.marker_handle("x", "diverged"))
        style.legend(figure, handles)
    return figure


def _panel(axes: Axes, panel: Panel, labels: list[str]) -> None:
    width = window(panel.records)
    highest: list[float] = []
    for label in selection.labels_of(panel.records):
        runs = selection.of_label(panel.records, label)
        mark = style.mark(label, labels)
        losses = [running_mean(selection.numbers(run["series"]["loss"]), width) for run in runs]
        over_seeds = selection.spread(losses)
        steps = np.arange(over_seeds.mean.size)
        if len(runs) > 1:
            style.band(axes, steps, over_seeds.low, over_seeds.high, mark.colour)
        style.curve(axes, steps, over_seeds.mean, mark, label, place=labels.index(label))
        for run, loss in zip(runs, losses):
            if selection.has_diverged(run):
                style.cross_at_end(axes, np.arange(loss.size), loss, mark)
        late = over_seeds.high[steps >= 0.06 * steps.size]
        highest.extend(late[np.isfinite(late)])
    lowest = axes.dataLim.y0
    if highest:  # the first steps' loss is the same for all; it must not set the scale
        axes.set_ylim(lowest - 0.05 * (max(highest) - lowest), max(highest) + 0.08 * (max(highest) - lowest) + 1e-9)
    axes.set_title(fill(panel.title, 34))
    axes.set_xlabel("step" if width == 1 else f"step (mean over {width})")


def caption(records: Records, experiment: str | None = None) -> str:
    """Settings, seeds and smoothing."""
    found = selection.trainings(records, experiment)
    widths = wording.listed(window(panel.records) for panel in selection.by_rate(found))
    return (
        f"Training loss, measured, as a centred running mean over {widths} steps. Lines are means over seeds, bands "
        f"their lowest and highest; the axis leaves out the fall of the first steps.{wording.diverged(found)} "
        f"{wording.training_settings(found)}"
    )
