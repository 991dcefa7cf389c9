"""Corruptions of the records: under each the claim that it belongs to must not be called reproduced."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from figures.selection import Record, Records

Corruption = Callable[[Records], list[Record]]


def edited(edit: Callable[[dict[str, Any]], None]) -> Corruption:
    """Copies of the records, each changed in place by `edit`."""

    def control(records: Records) -> list[Record]:
        changed = [copy.deepcopy(dict(record)) for record in records]
        for record in changed:
            edit(record)
        return changed

    return control


def relabelled(swap: dict[str, str]) -> Corruption:
    """Exchange methods' names: what was measured on one is reported of the other."""

    def rename(record: dict[str, Any]) -> None:
        for place in (record, record.get("spec") or {}, *record.get("rows", ())):
            if "label" in place:
                place["label"] = swap.get(place["label"], place["label"])

    return edited(rename)


def scaled_prediction(quantity: str, factor: float) -> Corruption:
    """Multiply one prediction of whatever kind, as a wrong constant in its formula would."""

    def scale(record: dict[str, Any]) -> None:
        for item in record.get("predictions") or ():
            if item["quantity"] == quantity:
                item["values"] = [factor * value for value in item["values"]]

    return edited(scale)


SWAPPED = relabelled(
    {"Vanilla": "Scaled Embed", "Scaled Embed": "Vanilla", "Embed Detach": "Embed LN", "Embed LN": "Embed Detach"}
)


def far_from_normal(record: dict[str, Any]) -> None:
    """Every place of the residual stream is far from normal at the start."""
    for item in (record.get("series", {}).get("distributions", {}).get("start") or {}).get("places", ()):
        item["normal_distance"] = 0.2


def longer_norm(record: dict[str, Any]) -> None:
    """The normalisation's Jacobian has a norm a tenth above 1/sigma."""
    if record.get("norm_jacobian"):
        record["norm_jacobian"]["opnorm_sigma"] *= 1.1


def detached_too_late(record: dict[str, Any]) -> None:
    """A detach after the first block: it scales the gradient below it, which the places before it show."""
    if record["kind"] == "training" and record["spec"]["label"] == "Embed Detach":
        for gradients in record["series"]["place_gradient"][:1]:
            gradients[:2] = [0.1 * value for value in gradients[:2]]


def no_events(record: dict[str, Any]) -> None:
    """No log has an event of any definition."""
    for row in record.get("rows", ()):
        row["raw"] = []
        row["paired"] = None if row["paired"] is None else []
