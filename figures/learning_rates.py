"""Final held-out loss against the peak learning rate."""

from __future__ import annotations

from textwrap import fill

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from figures import selection, style, wording
from figures.selection import Panel, Record, Records


def draw(records: Records, experiment: str | None = None) -> Figure:
    """One panel a setting that was trained at several rates (every setting, if none was)."""
    found, panels = _chosen(records, experiment)
    labels = selection.labels_of(found)
    with style.look():
        width = style.WIDTH if len(panels) > 1 else 0.62 * style.WIDTH
        figure, grid = style.panels(1, len(panels), height=2.9, width=width)
        for axes, panel in zip(grid[0], panels):
            _panel(axes, panel, labels)
            title = panel.title or "Held-out loss by learning rate"
            axes.set_title(fill(title, max(14, 72 // len(panels))))
        grid[0, 0].set_ylabel("final held-out loss (nats per token)")
        handles = style.method_handles(labels)
        if any(map(selection.has_diverged, found)):
            handles.append(style.marker_handle("x", "diverged, of the seeds"))
        style.legend(figure, handles, columns=None if len(panels) > 1 else 2)
    return figure


def _chosen(records: Records, experiment: str | None) -> tuple[list[Record], list[Panel]]:
    panels = selection.by_setting(selection.trainings(records, experiment))
    several = [panel for panel in panels if len({run["spec"]["learning_rate"] for run in panel.records}) > 1]
    chosen = several or panels
    return [record for panel in chosen for record in panel.records], chosen


def _panel(axes: Axes, panel: Panel, labels: list[str]) -> None:
    lost: list[tuple[float, int, int, style.Mark]] = []
    for label in selection.labels_of(panel.records):
        mark = style.mark(label, labels)
        runs = selection.of_label(panel.records, label)
        rates = sorted({run["spec"]["learning_rate"] for run in runs})
        mean, low, high = np.full((3, len(rates)), np.nan)
        for place, rate in enumerate(rates):
            here = [run for run in runs if run["spec"]["learning_rate"] == rate]
            losses = selection.numbers([run["final"]["heldout_loss"] for run in here])
            finite = losses[np.isfinite(losses)]
            if finite.size:
                mean[place], low[place], high[place] = finite.mean(), finite.min(), finite.max()
            if finite.size < losses.size:
                lost.append((rate, losses.size - finite.size, losses.size, mark))
        style.band(axes, rates, low, high, mark.colour)
        style.curve(axes, rates, mean, mark, label, markevery=1, markersize=3.2 + 1.3 * mark.width)
    every_rate = sorted({run["spec"]["learning_rate"] for run in panel.records})
    axes.set_xscale("log")
    axes.set_xticks(every_rate, [f"{rate:g}" for rate in every_rate])
    axes.set_xticks([], minor=True)
    axes.margins(x=0.12)
    _lost(axes, lost)
    axes.set_xlabel("peak learning rate")


def _lost(axes: Axes, lost: list[tuple[float, int, int, style.Mark]]) -> None:
    """Diverged runs have no loss: they are counted above the data, one line a method."""
    for rate in {entry[0] for entry in lost}:
        for place, (_, count, of, mark) in enumerate(entry for entry in lost if entry[0] == rate):
            height = 0.97 - 0.06 * place
            frame = axes.get_xaxis_transform()
            style.cross(axes, rate, height, mark, transform=frame)
            axes.annotate(
                f"{count} of {of}",
                (rate, height),
                xycoords=frame,
                xytext=(5, 0),
                textcoords="offset points",
                va="center",
                fontsize=7,
                color=mark.colour,
            )
    if lost:
        low, high = axes.get_ylim()
        axes.set_ylim(low, high + 0.3 * (high - low))


def caption(records: Records, experiment: str | None = None) -> str:
    """Settings and seeds."""
    found, _ = _chosen(records, experiment)
    return (
        "Loss on held-out text after the last step, measured. Lines are means over seeds, bands their lowest and "
        f"highest.{wording.diverged(found)} {wording.training_settings(found)}"
    )
