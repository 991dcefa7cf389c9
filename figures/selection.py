"""What a figure needs of records: which belong together, their numbers as arrays, their settings in words."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from theory.architecture import METHODS as _METHODS

Record = dict[str, Any]
Records = Sequence[Record]
Array = NDArray[np.float64]

METHODS: tuple[str, ...] = tuple(_METHODS)


class Panel(NamedTuple):
    """Records that share every setting but the method and the seed."""

    title: str
    records: list[Record]


class Spread(NamedTuple):
    """Mean and extremes over seeds, at every step; not a number where no seed has one."""

    mean: Array
    low: Array
    high: Array


def trainings(records: Records, experiment: str | None = None) -> list[Record]:
    """Training records, of one experiment if it is named.

    Raises:
        ValueError: there are none.
    """
    found = [record for record in records if record["kind"] == "training"]
    found = [record for record in found if experiment in (None, record["spec"]["experiment"])]
    if not found:
        of = "" if experiment is None else f" of experiment {experiment!r}"
        raise ValueError(f"no training records{of} to draw; run the trainings first")
    return found


def events(records: Records, quantity: str, definition: str) -> dict[str, list[int]]:
    """Steps at which a run's events begin, by the run's id, as one definition counts them on the raw series."""
    rows = [row for record in records if record["kind"] == "spikes" for row in record["rows"]]
    return {row["id"]: row["raw"] for row in rows if (row["quantity"], row["definition"]) == (quantity, definition)}


def initialisations(records: Records) -> list[Record]:
    """Records of networks at initialisation.

    Raises:
        ValueError: there are none.
    """
    found = [record for record in records if record["kind"] == "initialisation"]
    if not found:
        raise ValueError("no initialisation records to draw; measure the networks at initialisation first")
    return found


def label_of(record: Record) -> str:
    """The method's name."""
    return str(record["spec"]["label"] if record["kind"] == "training" else record["label"])


def labels_of(records: Iterable[Record]) -> list[str]:
    """The methods present: the paper's in its order, then the others by name."""
    found = {label_of(record) for record in records}
    return [name for name in METHODS if name in found] + sorted(found - set(METHODS))


def of_label(records: Iterable[Record], label: str) -> list[Record]:
    """The records of one method."""
    return [record for record in records if label_of(record) == label]


def has_diverged(run: Record) -> bool:
    """Whether a training's loss stopped being finite."""
    return run["final"]["diverged_at"] is not None


def numbers(values: Any) -> Array:
    """Numbers as an array, null as not a number."""
    if values is None:
        return np.empty(0)
    return np.array(values, dtype=np.float64)


def spread(series: Sequence[Array]) -> Spread:
    """Mean and extremes over series that may end at different steps."""
    length = max((one.size for one in series), default=0)
    table = np.full((max(len(series), 1), length), np.nan)
    for row, one in zip(table, series):
        row[: one.size] = one
    known = np.isfinite(table)
    count = known.sum(0)
    mean = np.full(length, np.nan)
    np.divide(np.where(known, table, 0.0).sum(0), count, out=mean, where=count > 0)
    low, high = np.where(known, table, np.inf).min(0), np.where(known, table, -np.inf).max(0)
    return Spread(mean, np.where(count > 0, low, np.nan), np.where(count > 0, high, np.nan))


def prediction(record: Record, quantity: str, kind: str) -> Array | None:
    """A prediction's values, or None where the record has none."""
    for item in record.get("predictions") or ():
        if item["quantity"] == quantity and item["kind"] == kind:
            return numbers(item["values"])
    return None


def kinds(records: Records, *quantities: str) -> list[str]:
    """`measured`, then the kinds of prediction that the records have of these quantities."""
    found = {
        item["kind"] for record in records for item in record.get("predictions") or () if item["quantity"] in quantities
    }
    return ["measured", *(kind for kind in ("sharp", "estimate", "upper") if kind in found)]


def outside_domain(record: Record, quantity: str) -> tuple[str, ...]:
    """Why the record's sharp prediction of a quantity is outside its domain; empty where it is inside."""
    for item in record.get("predictions") or ():
        if item["quantity"] == quantity and item["kind"] == "sharp" and not item["in_domain"]:
            return tuple(item["reasons"]) or ("no reason given",)
    return ()


def measurement(record: Record, quantity: str) -> tuple[Array, Array] | None:
    """A measurement's values and the standard deviation of their logs over seeds (0 where unknown)."""
    for item in record.get("measurements") or ():
        if item["quantity"] == quantity:
            values = numbers(item["values"])
            deviation = numbers(item["log_sd"]) if item.get("log_sd") else np.zeros_like(values)
            return values, np.nan_to_num(deviation)
    return None


# What tells settings of one experiment apart, and in which words.
_SHAPE: tuple[tuple[Callable[[Record], Any], str], ...] = (
    (lambda spec: spec["architecture"]["d_model"], "d {}"),
    (lambda spec: spec["architecture"]["n_layers"], "{} layers"),
    (lambda spec: spec["seq_len"], "T {}"),
    (lambda spec: spec["batch_size"], "batch {}"),
    (lambda spec: spec["steps"], "{:,} steps"),
    (lambda spec: spec["schedule"], "{}"),
)


def by_setting(records: Records) -> list[Panel]:
    """Training records by everything but method, seed and learning rate; the largest experiment first.

    A title names the experiment where there are several, and a setting where the experiment has several.
    """
    groups: dict[tuple[Any, ...], list[Record]] = {}
    runs: dict[str, list[Record]] = {}
    for record in records:
        spec = record["spec"]
        groups.setdefault((spec["experiment"], *(read(spec) for read, _ in _SHAPE)), []).append(record)
        runs.setdefault(spec["experiment"], []).append(record)
    ordered = sorted(groups, key=lambda key: (-len(runs[key[0]]), *(str(part).zfill(9) for part in key)))
    panels: list[Panel] = []
    for key in ordered:
        words = [key[0]] if len(runs) > 1 else []
        same = [other for other in groups if other[0] == key[0]]
        for place, (_, text) in enumerate(_SHAPE, start=1):
            if len({other[place] for other in same}) > 1:
                words.append(text.format(key[place]))
        panels.append(Panel(", ".join(words), groups[key]))
    return panels


def by_rate(records: Records) -> list[Panel]:
    """The groups of `by_setting`, divided by learning rate."""
    panels: list[Panel] = []
    for title, members in by_setting(records):
        for rate in sorted({record["spec"]["learning_rate"] for record in members}):
            chosen = [record for record in members if record["spec"]["learning_rate"] == rate]
            panels.append(Panel(f"{title}, lr {rate:g}" if title else f"learning rate {rate:g}", chosen))
    return panels


def by_network(records: Records) -> list[Panel]:
    """Initialisation records by preset, sequence length and tokens; the smallest network first."""
    groups: dict[tuple[Any, ...], list[Record]] = {}
    for record in records:
        size = record["architecture"]["d_model"] * record["architecture"]["n_layers"]
        groups.setdefault((size, record["preset"], record["seq_len"], record["tokens"]), []).append(record)
    return [
        Panel(f"{preset}, {seq_len} {tokens} tokens", groups[key])
        for key in sorted(groups)
        for _, preset, seq_len, tokens in (key,)
    ]


def shown_network(records: Records) -> Panel:
    """The network a per-place figure shows: the one with most methods; of those, the largest."""
    return max(reversed(by_network(records)), key=lambda panel: len(labels_of(panel.records)))


def shown_rate(records: Records) -> Panel:
    """The setting a figure of one setting shows: most methods, then most runs, then the highest learning rate."""
    return max(
        by_rate(records),
        key=lambda panel: (
            len(labels_of(panel.records)),
            len(panel.records),
            panel.records[0]["spec"]["learning_rate"],
        ),
    )
