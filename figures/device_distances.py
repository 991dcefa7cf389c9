"""How far a device is from the CPU, as a share of what rounding allows: one dot a comparison."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure

from figures import style
from figures.devices import DIFFERS, Row

SMALLEST = 1e-3  # a share below it is drawn there


def draw(record: dict[str, Any]) -> Figure:
    """One line a comparison of a `device-check` record, in its order.

    Raises:
        ValueError: the record has no comparison.
    """
    rows = [row for row in record["rows"] if row["tolerance"] and not row.get("control")]
    if not rows:
        raise ValueError("the device check has nothing to compare; run its other steps first")
    with style.look():
        figure, grid = style.panels(1, 1, height=0.24 + 0.17 * len(rows))
        axes = grid[0, 0]
        for place, row in enumerate(rows):
            axes.plot(
                [_share(row)], [place], linestyle="none", marker="X" if row["verdict"] == DIFFERS else "o",
                color="#D55E00" if row["verdict"] == DIFFERS else "#0072B2", markersize=4.5, clip_on=False,
            )  # fmt: skip
        style.reference(axes, [1, 1], [-0.6, len(rows) - 0.4])
        axes.set_yticks(range(len(rows)), [row["quantity"] for row in rows], fontsize=6.5)
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.set_xscale("log")
        axes.set_xlim(SMALLEST, 10 * max(1.0, *(_share(row) for row in rows)))
        axes.set_xlabel(f"difference over tolerance (at most {SMALLEST:g} at the left edge)")
        style.legend(
            figure,
            [
                style.marker_handle("o", "agrees", colour="#0072B2", filled=True),
                style.marker_handle("X", "differs", colour="#D55E00", filled=True),
                style.reference_handle("the tolerance"),
            ],
        )
    return figure


def _share(row: Row) -> float:
    """Difference over tolerance, within the axis; what is not finite is far beyond it."""
    if row["difference"] is None:
        return 100.0
    return min(100.0, max(SMALLEST, row["difference"] / row["tolerance"]))


def caption(record: dict[str, Any]) -> str:
    """What is shown, and of which device."""
    about = "a GPU against the CPU" if record["gpu"] else "a CPU against itself, no evidence about a GPU"
    same = "" if record["gpu"] else " At initialisation both sides are one computation, made twice."
    return (
        f"Differences over their tolerances, the worst of each comparison: {about} "
        f"({record['environment'].get('device', 'unknown device')}). A difference of 0 is drawn at the left edge.{same}"
    )
