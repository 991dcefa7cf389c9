"""How much the gradient grows from the last layer to the first: predicted and observed, and by how much they differ."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter

from figures import selection, style, wording
from figures.selection import Panel, Record, Records

LINEAR = 5.0  # per cent; errors beyond it are drawn on a logarithmic scale
BANDS = (1.0, 5.0)


def draw(records: Records) -> Figure:
    """Above, the gradient along the depth in one network; below, every network's error of prediction."""
    found = selection.initialisations(records)
    labels = selection.labels_of(found)
    shown = selection.shown_network(found)
    shown_labels = selection.labels_of(shown.records)
    networks = selection.by_network(found)
    below = 0.55 + (0.115 * len(labels) + 0.12) * len(networks)
    with style.look():
        figure = Figure(figsize=(style.WIDTH, 2.0 + below + 0.95), layout="constrained")
        grid = figure.add_gridspec(2, len(shown_labels), height_ratios=(2.0, below))
        first: Axes | None = None
        for column, label in enumerate(shown_labels):
            axes = figure.add_subplot(grid[0, column], sharey=first)
            for record in selection.of_label(shown.records, label):
                _profile(axes, record, style.mark(label, labels))
            axes.set_title(style.title(label))
            axes.set_xlabel("layers passed")
            style.whole_numbers(axes)
            if first is None:
                first = axes
                axes.set_ylabel("gradient norm over\nthat at the last place")
            else:
                axes.tick_params(labelleft=False)
        assert first is not None
        style.log_axis(first.yaxis)
        figure.suptitle(f"Gradient along the depth: {shown.title}")
        errors = figure.add_subplot(grid[1, :])
        kinds = _errors(errors, networks, labels)
        handles = style.method_handles(labels, linestyle="none")
        handles += style.kind_handles(["measured", "sharp"], measured="measured (band: one sd over seeds)")
        if "sharp" in kinds:
            handles.append(style.marker_handle("o", "error of the sharp prediction", filled=True))
        if "estimate" in kinds:
            handles.append(style.marker_handle("o", "error of the closed form (estimate)"))
        style.legend(figure, handles, columns=3)
    return figure


def _profile(axes: Axes, record: Record, mark: style.Mark) -> None:
    sharp = selection.prediction(record, "gradient_profile", "sharp")
    if sharp is not None:
        style.line(axes, "sharp", np.arange(sharp.size) / 2, sharp, linewidth=1.0)
    observed = selection.measurement(record, "gradient_profile")
    if observed is not None:
        values, deviation = observed
        layers = np.arange(values.size) / 2
        style.band(axes, layers, values * np.exp(-deviation), values * np.exp(deviation), mark.colour)
        every = max(1, values.size // 12)
        style.measured(axes, layers, values, mark, markevery=every)


def _errors(axes: Axes, networks: list[Panel], labels: list[str]) -> set[str]:
    """Predicted over observed growth less one, in per cent, with the observation's standard error."""
    for band, shade in zip(BANDS[::-1], ("#F1F1F1", "#DDDDDD"), strict=True):
        axes.axvspan(-band, band, color=shade, zorder=0, linewidth=0)
    axes.axvline(0, color="#888888", linewidth=0.7)
    present: set[str] = set()
    reach = LINEAR
    for row, network in enumerate(networks):
        for record in network.records:
            label = selection.label_of(record)
            height = row + (labels.index(label) - (len(labels) - 1) / 2) * 0.8 / max(len(labels), 1)
            mark = style.mark(label, labels)
            observed = selection.measurement(record, "gradient_growth")
            for kind in ("sharp", "estimate"):
                predicted = selection.prediction(record, "gradient_growth", kind)
                if observed is None or predicted is None:
                    continue
                (value,), (deviation,) = observed
                error = 100 * (predicted[0] / value - 1)
                standard = 100 * predicted[0] / value * deviation / np.sqrt(len(record["seeds"]))
                axes.errorbar(
                    [error],
                    [height],
                    xerr=[standard] if kind == "sharp" and standard > 0 else None,
                    fmt=mark.marker,
                    color=mark.colour,
                    markerfacecolor=mark.colour if kind == "sharp" else "white",
                    elinewidth=0.9,
                    alpha=0.45 if kind == "sharp" and selection.outside_domain(record, "gradient_growth") else 1,
                    label=f"{kind}: {label}",
                )
                present.add(kind)
                reach = max(reach, abs(error) + standard)
    axes.set_xscale("symlog", linthresh=LINEAR, linscale=1.6)
    axes.set_xlim(-1.25 * reach, 1.25 * reach)
    ticks = [t for t in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000) if t <= 1.25 * reach]
    axes.xaxis.set_major_locator(FixedLocator([-t for t in reversed(ticks)] + [0, *ticks]))
    axes.xaxis.set_minor_locator(FixedLocator([]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:+g}" if value else "0"))
    axes.set_yticks(range(len(networks)), [network.title for network in networks])
    axes.set_ylim(len(networks) - 0.4, -0.6)
    axes.grid(visible=False, axis="y")
    for row in range(1, len(networks)):
        axes.axhline(row - 0.5, color="#CCCCCC", linewidth=0.5)
    axes.set_title("Error of predicted gradient growth (bands: 1 % and 5 %)", fontweight="bold", fontsize=8.5)
    axes.set_xlabel(f"predicted over observed growth, less one (%); logarithmic beyond {LINEAR:g} %")
    return present


def caption(records: Records) -> str:
    """What is shown, how it was measured and which line is which."""
    found = selection.initialisations(records)
    shown = selection.shown_network(found)
    outside = [
        f"{selection.label_of(record)} ({panel.title}: {', '.join(reasons)})"
        for panel in selection.by_network(found)
        for record in panel.records
        if (reasons := selection.outside_domain(record, "gradient_growth"))
    ]
    pale = f"Pale: outside the prediction's domain, {'; '.join(outside)}. " if outside else ""
    return (
        "Gradient growth at initialisation. Above: norm of the loss gradient at each place of the residual stream over "
        f"that at the last ({shown.title}; {_seeds(shown.records)}). "
        f"{wording.kinds(selection.kinds(shown.records, 'gradient_profile'))} "
        "Shaded: one standard deviation over seeds. Below: error of the predicted growth from the last place to the "
        "first for every network and method; filled markers are the sharp prediction with the standard error of the "
        "observation's geometric mean, open markers the closed-form estimate that ignores correlation between tokens; "
        f"grey bands are 1 % and 5 %. {pale}{wording.initialisation_settings(found)}"
    )


def _seeds(records: list[Record]) -> str:
    numbers = wording.listed(len(record["seeds"]) for record in records)
    return f"{numbers} {'seed' if numbers == '1' else 'seeds'}"
