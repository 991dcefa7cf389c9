"""The network of the device check's tests, and the check's rows by the quantity compared."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from figures.devices import compare
from theory.architecture import Architecture, preset

Records = list[dict[str, Any]]


def mini() -> Architecture:
    return replace(
        preset("tiny"), name="mini", d_model=32, n_layers=2, n_heads=2, n_kv_heads=2, d_head=16, d_ffn=64,
        vocab_size=300, activation="gelu",
    )  # fmt: skip


def rows_by_name(records: Records) -> dict[str, dict[str, Any]]:
    rows = compare(records)
    assert len({row["quantity"] for row in rows}) == len(rows)
    return {row["quantity"]: row for row in rows}
