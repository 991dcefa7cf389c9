"""Every statement on a line: how tight a bound has been found, how right a sharp value."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from figures import style
from theory.records import read_record

UPPER, SHARP = "#0072B2", "#D55E00"
SMALLEST = 1e-3  # ratios below are drawn at the edge
ROW = 0.19  # inches


def tightness(records: Path) -> dict[str, Mapping[str, Any]]:
    """What attacks found, by statement; empty where there is no record."""
    attacks = (read_record(records / "attacks.json") or {}).get("attacks", {})
    return {name: record["tightness"] | {"attacked": record["worst_ratio"]} for name, record in attacks.items()}


def accuracy(records: Path) -> dict[str, list[Mapping[str, Any]]]:
    """Measured norms, by sharp statement."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for path in sorted((records / "accuracy").glob("norms-*.json")):
        for row in (read_record(path) or {}).get("rows", []):
            found.setdefault(row["statement"], []).append(row)
    return found


def draw(
    kinds: Mapping[str, str],
    tight: Mapping[str, Mapping[str, Any]],
    right: Mapping[str, Sequence[Mapping[str, Any]]],
) -> Figure:
    """Bounds on the left, truth over bound; sharp values on the right, predicted over measured.

    Args:
        kinds: kind of every statement by name; one without a record keeps its line, empty.
        tight: of bounds, as `tightness` finds them.
        right: of sharp values, as `accuracy` finds them.
    """
    uppers = [name for name, kind in kinds.items() if kind == "upper"]
    sharps = [name for name, kind in kinds.items() if kind == "sharp"]
    with style.look():
        figure, grid = style.panels(1, 2, height=0.9 + ROW * max(len(uppers), len(sharps)), width=1.35 * style.WIDTH)
        _uppers(grid[0, 0], uppers, tight)
        _sharps(grid[0, 1], sharps, right)
        figure.suptitle("Every statement: how tight, how right")
    return figure


def _lines(axes: Axes, names: Sequence[str], known: Mapping[str, Any]) -> None:
    axes.set_yticks(range(len(names)), [name if name in known else f"{name} (not measured)" for name in names])
    axes.tick_params(axis="y", labelsize=6.5, length=0)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.grid(axis="y", linewidth=0.3, alpha=0.5)


def _uppers(axes: Axes, names: Sequence[str], tight: Mapping[str, Mapping[str, Any]]) -> None:
    for place, name in enumerate(names):
        if name in tight:
            found = tight[name]
            middle, plain = (max(SMALLEST, found[key]) for key in ("median", "plain"))
            axes.plot([middle, found["attacked"]], [place, place], color=UPPER, linewidth=1.2)
            axes.plot([plain], [place], "o", markersize=3.5, markerfacecolor="white", color=UPPER)
            axes.plot([found["attacked"]], [place], "|", markersize=7, color=UPPER)
    axes.axvline(1, color=style.INK, linewidth=0.8)
    axes.set_xscale("log")
    axes.set_xlim(SMALLEST, 2)
    axes.set_xlabel("truth / bound: o as at initialisation,\nline from the median to the largest under attack")
    axes.set_title("upper")
    _lines(axes, names, tight)


def _sharps(axes: Axes, names: Sequence[str], right: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    for place, name in enumerate(names):
        rows = right.get(name, ())
        if rows:
            target = 100 * rows[0]["target"]
            axes.fill_between([-target, target], place - 0.4, place + 0.4, color=SHARP, alpha=0.15, linewidth=0)
        for row in rows:
            error = 100 * (row["predicted"] / row["measured"] - 1)
            face = SHARP if row["in_domain"] else "white"
            axes.errorbar(
                [error], [place], xerr=[100 * row["standard_error"]], fmt="o", markersize=3, color=SHARP,
                markerfacecolor=face, linewidth=0.7,
            )  # fmt: skip
    axes.axvline(0, color=style.INK, linewidth=0.8)
    axes.set_xscale("symlog", linthresh=5)
    axes.set_xticks([-30, -5, -2, 0, 2, 5], ["-30", "-5", "-2", "0", "2", "5"])
    axes.set_xlabel(
        "predicted against measured, %: filled inside\nthe domain; shaded, the target;\nbars, a standard error"
    )
    axes.set_title("sharp")
    _lines(axes, names, right)
