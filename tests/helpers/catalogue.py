"""The catalogue of statements by kind, as the tests walk it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from theory.statements import Statement, catalogue, find


def of_kind(kind: str) -> dict[str, Statement]:
    return {name: statement for name, statement in ALL.items() if statement.kind == kind}


ALL = catalogue()
UPPER, SHARP, ESTIMATES = of_kind("upper"), of_kind("sharp"), of_kind("estimate")
TIGHT = [name for name, statement in UPPER.items() if statement.tight]
QUANTITIES = sorted({statement.quantity.name for statement in UPPER.values()})


def value(name: str, values: Mapping[str, Any]) -> float:
    """What a statement says at numbers."""
    return float(find(name).evaluate(values))
