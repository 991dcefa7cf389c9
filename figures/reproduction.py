"""A scale's figures, claims and report, from its records alone."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from figures import FIGURES, device_distances, report_device, save
from figures.claims import judge_all
from figures.report import write_report
from figures.selection import Record, Records
from theory.records import write_json

Drawn = tuple[str, Path, str]


def draw_all(records: Records, out: Path, scale: str, checked: Record | None) -> str:
    """Draw everything into `out`, with the device check that is shown beside it, if any; the verdicts as a table."""
    claims = judge_all(records)
    write_json(out / "claims.json", claims)
    drawn: list[Drawn] = []
    for name, module in FIGURES.items():
        shown = _shown(name, records)
        try:
            figure = module.draw(shown)
        except ValueError as reason:  # a figure whose records this scale or --only does not make
            print(f"figure {name} left out: {reason}", file=sys.stderr)
            continue
        png, _ = save(figure, out / "figures", name)
        drawn.append((name, png, module.caption(shown)))
    write_report(
        out / "report.html",
        title="Spike No More: predicted and observed",
        claims=claims,
        figures=drawn,
        settings=settings(records, scale),
        notes=[*NOTES, _devices_used(records)],
        device=checked,
        device_figures=_distances(checked, out),
    )
    return table(claims)


def draw_check(records: Records, out: Path, scale: str, checked: Record) -> str:
    """Draw a device check alone into `out`; its rows as a table."""
    write_report(
        out / "report.html",
        title="A device held against a CPU",
        claims=[],
        figures=[],
        settings=settings(records, scale),
        notes=[],
        device=checked,
        device_figures=_distances(checked, out),
    )
    return report_device.text_table(checked)


def _distances(checked: Record | None, out: Path) -> list[Drawn]:
    if checked is None or not any(row["tolerance"] and not row.get("control") for row in checked["rows"]):
        return []
    png, _ = save(device_distances.draw(checked), out / "figures", "device_distances")
    return [("device_distances", png, device_distances.caption(checked))]


def _shown(name: str, records: Records) -> list[Record]:
    """A figure's share of the trainings: comparisons across learning rates show the sweep alone."""
    trainings = [record["spec"] for record in records if record["kind"] == "training"]
    fastest = max((spec["learning_rate"] for spec in trainings if spec["experiment"] == "sweep"), default=None)

    def wanted(record: Record) -> bool:
        if record["kind"] != "training":
            return True
        spec = record["spec"]
        if name == "gradient_norms":
            return spec["experiment"] == "long" or (spec["learning_rate"] == fastest and spec["experiment"] == "sweep")
        return spec["experiment"] in (("sweep", "long") if name == "loss_curves" else ("sweep",))

    return [record for record in records if wanted(record)]


NOTES = [
    "Sources: [C] confirmed from the paper, [S] from a published summary of it, [R] recalled and not confirmed.",
    "The networks use ReLU, rotary positions and an untied head; the paper's own choices are not confirmed.",
    "Nothing is fitted: predictions come from the configuration (on text, also from which tokens are equal).",
    "The error of a claim is relative: of what was observed, against what was predicted or the bound on it (negative: "
    "below the bound); for claims 3 and 4 it is the distance itself.",
]


def _devices_used(records: Records) -> str:
    """A sentence on what the trainings ran on."""
    names = sorted({record["environment"]["device"] for record in records if record["kind"] == "training"})
    if any(name != "cpu" for name in names):
        return f"Trained on: {', '.join(names)}."
    return "No GPU was used for the numbers of this scale; the paper's sizes are predicted here, not trained."


def settings(records: Records, scale: str) -> dict[str, Any]:
    """What the report says of the run."""
    trainings = [record for record in records if record["kind"] == "training"]
    values: dict[str, Any] = {"scale": scale, "records": len(records), "trainings": len(trainings)}
    if trainings:
        values |= {f"environment: {key}": value for key, value in trainings[0]["environment"].items()}
        values |= {f"data: {key}": value for key, value in trainings[0]["data"].items()}
    return values


def table(claims: Sequence[dict[str, Any]]) -> str:
    """The verdicts, one line each."""
    return "\n".join(f"{claim['id']:12} {claim['verdict']:26} {claim['claim']}" for claim in claims)
