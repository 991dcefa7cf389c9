"""Bound and measured spectral norm of every layer's Jacobian at initialisation."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from figures import selection, style, wording
from figures.selection import Record, Records

# row: measured branch, measured half-layer, quantity of the predictions, title.
ROWS = (
    ("attention_branch", "attention_half", "attention_branch", "Attention"),
    ("feedforward_branch", "feedforward_half", "ffn_branch", "Feed-forward"),
)
WORDS = {
    "measured": "measured: branch, without the shortcut",
    "estimate": "paper's estimate (eqs. 15 and 20), less 1",
    "upper": "rigorous upper bound of the branch",
}


def draw(records: Records) -> Figure:
    """Two rows, attention and feed-forward; one column a method."""
    shown = _shown(records)
    labels = selection.labels_of(shown.records)
    with style.look():
        figure, grid = style.panels(2, len(labels), height=1.75, sharex=True, sharey="row")
        kinds: set[str] = set()
        for row, (branch, half, quantity, title) in zip(grid, ROWS):
            for axes, label in zip(row, labels):
                mark = style.mark(label, labels)
                for record in selection.of_label(shown.records, label):
                    kinds |= _panel(axes, record, branch, half, quantity, mark)
            row[0].set_ylabel(f"{title}: Jacobian\nnorm in excess of 1")
            style.log_axis(row[0].yaxis)
        for top, bottom, label in zip(grid[0], grid[1], labels):
            top.set_title(style.title(label))
            bottom.set_xlabel("layer")
            style.whole_numbers(bottom)
        figure.suptitle(f"Jacobian norms at initialisation: {_title(shown)}")
        used = [kind for kind in ("measured", "sharp", "estimate", "upper") if kind in kinds]
        handles = style.kind_handles(used, **WORDS)
        if "half" in kinds:
            dash = style.marker_handle("_", "measured: half-layer with its shortcut, less 1")
            dash.set_markersize(7)
            handles.insert(1, dash)
        style.legend(figure, handles, columns=2)
    return figure


def _shown(records: Records) -> selection.Panel:
    """The largest network whose norms were measured; without any, the largest that was predicted."""
    found = selection.initialisations(records)
    return selection.shown_network([record for record in found if record.get("jacobians")] or found)


def _title(shown: selection.Panel) -> str:
    """The network, and the tokens that its norms were measured on, which may be fewer than its growth was."""
    lengths = [record["jacobians"]["seq_len"] for record in shown.records if record.get("jacobians")]
    first = shown.records[0]
    return f"{first['preset']}, {wording.listed(lengths)} {first['tokens']} tokens" if lengths else shown.title


def _panel(axes: Axes, record: Record, branch: str, half: str, quantity: str, mark: style.Mark) -> set[str]:
    kinds: set[str] = set()
    for kind in ("upper", "estimate", "sharp"):
        values = selection.prediction(record, quantity, kind)
        if values is not None:
            style.line(axes, kind, np.arange(1, values.size + 1), values, linewidth=1.1)
            kinds.add(kind)
    layers = (record.get("jacobians") or {}).get("layers") or []
    numbers = np.arange(1, len(layers) + 1)
    if layers:
        whole = selection.numbers([layer[half] for layer in layers]) - 1
        style.measured(axes, numbers, whole, mark, marker="_", markersize=5, markeredgewidth=1.2, label="half-layer")
        style.measured(axes, numbers, selection.numbers([layer[branch] for layer in layers]), mark)
        kinds |= {"measured", "half"}
    return kinds


def caption(records: Records) -> str:
    """What is shown, on what, and which line is which."""
    shown = _shown(records)
    measured_on = [record["jacobians"] for record in shown.records if record.get("jacobians")]
    lengths = wording.listed(jacobians["seq_len"] for jacobians in measured_on)
    seeds = wording.listed(jacobians["seed"] for jacobians in measured_on)
    probe = (
        f"Measured: one sequence of {lengths} tokens, seed {seeds}, by an iterative method whose values can only be "
        "too small; dashes are the half-layer with its identity, less one. "
        if measured_on
        else ""
    )
    return (
        "Spectral norms of each layer's Jacobians over the whole sequence, without the identity. "
        f"{wording.kinds(selection.kinds(shown.records, 'ffn_branch', 'attention_branch'))} {probe}"
        f"The attention estimate uses the measured norm of the concatenated heads. "
        f"{wording.initialisation_settings(shown.records)}"
    )
