"""How far products of bounds are from the gradient they bound, place by place."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from figures import selection, style, wording
from figures.selection import Record, Records

WORDS = {"estimate": "the paper's product (estimate)", "upper": "product of rigorous bounds (upper)"}
SHORT = {"estimate": "paper's", "upper": "rigorous"}


def draw(records: Records) -> Figure:
    """One panel a method: measured gradient, the paper's product and the rigorous one, in powers of ten."""
    shown = selection.shown_network(selection.initialisations(records))
    labels = selection.labels_of(shown.records)
    with style.look():
        figure, grid = style.panels(1, len(labels), height=2.3, sharey=True)
        kinds: set[str] = set()
        for axes, label in zip(grid[0], labels):
            for record in selection.of_label(shown.records, label):
                kinds |= _panel(axes, record, style.mark(label, labels))
                _note(axes, record)
            axes.set_title(style.title(label))
            axes.set_xlabel("layers passed")
            style.whole_numbers(axes)
        grid[0, 0].margins(y=0.1)
        grid[0, 0].set_ylabel("log10 (gradient norm over\nthat at the last place)")
        grid[0, 0].yaxis.set_major_locator(MaxNLocator(6, integer=True))
        figure.suptitle(f"Products of bounds and the gradient itself: {shown.title}")
        used = [kind for kind in ("measured", "sharp", "estimate", "upper") if kind in kinds]
        style.legend(figure, style.kind_handles(used, **WORDS))
    return figure


def _panel(axes: Axes, record: Record, mark: style.Mark) -> set[str]:
    kinds: set[str] = set()
    for kind in ("upper", "estimate"):
        values = selection.prediction(record, "log10_gradient_bound", kind)
        if values is not None:
            style.line(axes, kind, np.arange(values.size) / 2, values)
            kinds.add(kind)
    sharp = selection.prediction(record, "gradient_profile", "sharp")
    if sharp is not None:
        style.line(axes, "sharp", np.arange(sharp.size) / 2, np.log10(sharp), linewidth=1.0)
        kinds.add("sharp")
    observed = selection.measurement(record, "gradient_profile")
    if observed is not None:
        values = np.log10(observed[0])
        style.measured(axes, np.arange(values.size) / 2, values, mark, markevery=max(1, values.size // 12))
        kinds.add("measured")
    return kinds


def gaps(record: Record) -> dict[str, float]:
    """Powers of ten between each product and the measured growth, at the first place."""
    observed = selection.measurement(record, "gradient_profile")
    products = {kind: selection.prediction(record, "log10_gradient_bound", kind) for kind in ("upper", "estimate")}
    if observed is None:
        return {}
    return {kind: float(p[0] - np.log10(observed[0][0])) for kind, p in products.items() if p is not None}


def _note(axes: Axes, record: Record) -> None:
    lines = [f"{SHORT[kind]}: $\\times 10^{{{gap:.1f}}}$" for kind, gap in gaps(record).items()]
    axes.text(1, 0.99, "\n".join(lines), transform=axes.transAxes, ha="right", va="top", fontsize=6.5)


def caption(records: Records) -> str:
    """What is shown and how far apart the curves are at the first place."""
    shown = selection.shown_network(selection.initialisations(records))
    ordered = [run for label in selection.labels_of(shown.records) for run in selection.of_label(shown.records, label)]
    texts = [
        f"{selection.label_of(record)} {', '.join(f'{gap:.1f} ({SHORT[kind]})' for kind, gap in gaps(record).items())}"
        for record in ordered
        if gaps(record)
    ]
    apart = f"Powers of ten above the measured growth at the first place: {'; '.join(texts)}. " if texts else ""
    return (
        f"Products of layer bounds from each place to the end, beside the gradient ({shown.title}). "
        f"{wording.kinds(selection.kinds(shown.records, 'log10_gradient_bound', 'gradient_profile'))} {apart}"
        f"{wording.initialisation_settings(shown.records)}"
    )
