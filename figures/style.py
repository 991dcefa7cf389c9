"""One look for every figure.

Two codes that never mix: a *method* is a colour and a marker, a *kind* of number is a line style. Measured
values carry markers; a sharp prediction is a solid line, an estimate dashed, an upper bound dotted.
The colours are those of Okabe and Ito, told apart by colour-blind readers; markers repeat what they say.
"""

from __future__ import annotations

import io
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from figures.selection import METHODS

WIDTH = 7.2  # inches: a page's text width
DPI = 200
INK = "#222222"
GREY = "#666666"
HANDLE = "#333333"  # of a legend entry that stands for every method
EVENT = "#009E73"


class Mark(NamedTuple):
    """How a method is drawn."""

    colour: str
    marker: str
    width: float = 1.1


_METHODS = dict(
    zip(
        METHODS,
        (
            Mark("#D55E00", "o", 2.0),
            Mark("#E69F00", "s"),
            Mark("#0072B2", "^"),
            Mark("#009E73", "D"),
            Mark("#CC79A7", "v"),
        ),
        strict=True,
    )
)
_OTHERS = (Mark("#56B4E9", "X"), Mark("#000000", "P"), Mark("#8C6D1F", "*"), Mark("#666666", "h"), Mark("#0072B2", "p"))

# kind: line style and words for the legend.
KINDS: dict[str, tuple[Any, str]] = {
    "sharp": ("-", "predicted (sharp)"),
    "estimate": ((0, (4, 1.6)), "paper's estimate"),
    "upper": ((0, (1, 1.4)), "rigorous upper bound"),
}

_RC: dict[str, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.titleweight": "normal",
    "figure.titleweight": "bold",
    "axes.labelsize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7.5,
    "legend.frameon": False,
    "legend.handlelength": 2.4,
    "figure.titlesize": 8.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E4E4E4",
    "grid.linewidth": 0.5,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "lines.linewidth": 1.3,
    "lines.markersize": 3.6,
    "lines.markeredgewidth": 0.7,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "savefig.bbox": "standard",
    "figure.constrained_layout.h_pad": 0.05,
    "figure.constrained_layout.w_pad": 0.05,
    "svg.fonttype": "path",
    "svg.hashsalt": "figures",
    "path.simplify": True,
}


def look() -> Any:
    """Context in which figures are drawn and saved; it starts from matplotlib's defaults, not from the user's."""
    return style.context(["default", _RC])


def render(figure: Figure, file_format: str) -> bytes:
    """The figure's file, the same bytes every time."""
    buffer = io.BytesIO()
    metadata: dict[str, Any] = {"Software": None} if file_format == "png" else {"Date": None, "Creator": None}
    with look():
        figure.savefig(buffer, format=file_format, dpi=DPI, metadata=metadata)
    return buffer.getvalue()


def mark(label: str, labels: Iterable[str] = ()) -> Mark:
    """A method's colour and marker; those the paper does not name take what is left, in the order of `labels`."""
    if label in _METHODS:
        return _METHODS[label]
    others = [other for other in labels if other not in _METHODS]
    return _OTHERS[others.index(label) % len(_OTHERS)] if label in others else _OTHERS[0]


def panels(rows: int, columns: int, *, height: float, width: float = WIDTH, **share: Any) -> tuple[Figure, Any]:
    """A figure of rows x columns axes, `height` inches a row, without pyplot's global state."""
    figure = Figure(figsize=(width, height * rows + 0.55), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **share)


def line(axes: Axes, kind: str, x: Any, y: Any, **options: Any) -> Line2D:
    """A line of the style of its kind, above the markers."""
    settings = {"linestyle": KINDS[kind][0], "color": INK, "label": KINDS[kind][1], "zorder": 3, **options}
    return axes.plot(x, y, **settings)[0]


def measured(axes: Axes, x: Any, y: Any, look: Mark, **options: Any) -> Line2D:
    """Measured values: markers alone."""
    settings = {"marker": look.marker, "linestyle": "none", "label": "measured", "markerfacecolor": "white", **options}
    return axes.plot(x, y, color=look.colour, **settings)[0]


def curve(axes: Axes, x: Any, y: Any, look: Mark, label: str, *, place: int = 0, **options: Any) -> Line2D:
    """A measured series of many steps: a line with a few markers, moved on by `place` so that curves show through."""
    every = max(1, int(np.size(x)) // 9)
    first = (every // 4 + place * every // 5) % every
    settings = {"linewidth": look.width, "markevery": (first, every), "markerfacecolor": "white", **options}
    return axes.plot(x, y, marker=look.marker, color=look.colour, label=label, **settings)[0]


def band(axes: Axes, x: Any, low: Any, high: Any, colour: str) -> None:
    """The spread over seeds."""
    axes.fill_between(x, low, high, color=colour, alpha=0.18, linewidth=0)


def cross(axes: Axes, x: float, y: float, look: Mark, **options: Any) -> None:
    """Where a run diverged."""
    axes.plot(
        [x], [y], marker="x", color=look.colour, markersize=6, markeredgewidth=1.6, linestyle="none", zorder=5,
        clip_on=False, label="diverged", **options,
    )  # fmt: skip


def cross_at_end(axes: Axes, x: Any, y: Any, look: Mark) -> None:
    """Where a series that is cut short has its last number; nothing where it has none."""
    known = np.flatnonzero(np.isfinite(y))
    if known.size:
        cross(axes, float(x[known[-1]]), float(y[known[-1]]), look)


def reference(axes: Axes, x: Any, y: Any, **options: Any) -> None:
    """A level to compare with; neither measured nor predicted."""
    axes.plot(x, y, color=GREY, linewidth=3.0, alpha=0.35, zorder=1, label="reference", **options)


def ticks_along_top(axes: Axes, x: Any) -> None:
    """Short ticks along the upper edge."""
    axes.plot(
        x, np.full(len(x), 0.97), marker="|", color=EVENT, linestyle="none", markersize=6, markeredgewidth=1.1,
        transform=axes.get_xaxis_transform(), label="event",
    )  # fmt: skip


def kind_handles(kinds: Iterable[str], **words: str) -> list[Line2D]:
    """Legend entries of the kinds in use; `words` replaces what an entry says."""
    handles: list[Line2D] = []
    for kind in kinds:
        if kind == "measured":
            handle = Line2D([], [], linestyle="none", marker="o", color=HANDLE, markerfacecolor="white")
        else:
            handle = Line2D([], [], linestyle=KINDS[kind][0], color=HANDLE)
        handle.set_label(words.get(kind, KINDS.get(kind, ("", "measured"))[1]))
        handles.append(handle)
    return handles


def named_handles(marks: dict[str, Mark], *, linestyle: Any = "-") -> list[Line2D]:
    """Legend entries of colours and markers."""
    return [
        Line2D(
            [], [], linestyle=linestyle, linewidth=look.width, color=look.colour, marker=look.marker, label=name,
            markerfacecolor="white",
        )
        for name, look in marks.items()
    ]  # fmt: skip


def method_handles(labels: list[str], *, linestyle: Any = "-") -> list[Line2D]:
    """Legend entries of the methods."""
    return named_handles({label: mark(label, labels) for label in labels}, linestyle=linestyle)


def marker_handle(marker: str, label: str, *, colour: str = HANDLE, filled: bool = False) -> Line2D:
    """Legend entry of a marker."""
    fill = colour if filled else "white"
    return Line2D([], [], linestyle="none", marker=marker, color=colour, markerfacecolor=fill, label=label)


def reference_handle(label: str) -> Line2D:
    """Legend entry of `reference`."""
    return Line2D([], [], color=GREY, linewidth=3.0, alpha=0.35, label=label)


def legend(figure: Figure, handles: list[Any], *, columns: int | None = None) -> None:
    """One legend below the panels, where it covers nothing."""
    names = [str(handle.get_label()) for handle in handles]
    if columns is None:  # as many entries a line as fit the page
        columns = max(1, min(len(handles), int(100 / (8 + max(map(len, names))))))
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, columnspacing=1.4)


def whole_numbers(axes: Axes) -> None:
    """Ticks of the x axis at a few whole numbers."""
    axes.xaxis.set_major_locator(MaxNLocator(nbins=4, integer=True, min_n_ticks=2, steps=[1, 2, 4, 5, 10]))


def title(label: str) -> str:
    """A method's name on as many lines as a narrow panel needs."""
    return label if len(label) < 16 else label.replace(" + ", " +\n")


def log_axis(axis: Any) -> None:
    """A logarithmic axis labelled 0.5, 1, 2, 5, 10 over few decades, and by powers of ten over many."""
    axes = axis.axes
    (axes.set_xscale if axis.axis_name == "x" else axes.set_yscale)("log")
    low, high = (np.log10(max(limit, 1e-300)) for limit in axis.get_view_interval())
    decades = high - low
    subs = (1.0, 2.0, 3.0, 5.0, 7.0) if decades < 0.7 else (1.0, 2.0, 5.0) if decades < 2.2 else (1.0,)
    axis.set_major_locator(LogLocator(subs=subs, numticks=8 if decades >= 2.2 else 12))
    if decades < 4:
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())
