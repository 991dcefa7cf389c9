"""Spikes of a run by every definition side by side, raw and paired on the same batches, and what became of each.

Most raw loss spikes at a small scale are hard batches: a run on the same batches shows them too, and pairing
removes them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from empirics.spike_definitions import DEFINITIONS, Definition, Series, finite, hidden_deviation, median_and_deviation

BLOCK = 1024  # values of which one minimum is kept, to search long series


class Outcome(StrEnum):
    """What became of an event."""

    QUICKLY = "quickly"
    SLOWLY = "slowly"
    NEVER = "never"
    UNDECIDED = "undecided"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """When an event has recovered; every number is a convention of this project, none is fitted.

    The series has recovered at the first step from which on `hold` values running are at most the median of the
    `window` steps before the event's first value plus `deviations` x 1.4826 x their median absolute deviation, taken
    to be at least half a step of the log's rounding.
    Counted from the event's first value, that is quickly within `quick` steps and slowly later. It is never if the
    series goes on for `patience` steps or more and does not, or diverges first; else undecided.
    """

    window: int = 50
    deviations: float = 3.0
    hold: int = 3
    quick: int = 10
    patience: int = 200


RULE = Rule()


@dataclass(frozen=True, slots=True, kw_only=True)
class Recovery:
    """An event's outcome; `after` counts the steps from its first value to recovery (None: not seen)."""

    outcome: Outcome
    after: int | None


def recoveries(series: Series, events: Sequence[int], *, lag: int = 0, rule: Rule = RULE) -> tuple[Recovery, ...]:
    """What became of each event.

    Args:
        series: shape (steps,); a value that is not finite is a divergence.
        events: steps at which they were noticed, increasing, each at least `lag` + 1.
        lag: the definition's.
    """
    values = finite(series)
    diverged = values.size < series.size
    # Step t is settled below x if held[t], the largest of the values t, ..., t + hold - 1, is.
    held = sliding_window_view(values, rule.hold).max(axis=1) if values.size >= rule.hold else values[:0]
    minima = np.minimum.reduceat(held, np.arange(0, held.size, BLOCK)) if held.size else held
    found: list[Recovery] = []
    starts = np.array(events, dtype=np.int64) - lag
    for start, level in zip(starts.tolist(), _levels(values, starts, rule).tolist(), strict=True):
        settled = _first_at_most(held, minima, start, level)
        if settled is not None:
            after = settled - start
            found.append(Recovery(outcome=Outcome.QUICKLY if after <= rule.quick else Outcome.SLOWLY, after=after))
        else:
            seen = diverged or values.size - start > rule.patience
            found.append(Recovery(outcome=Outcome.NEVER if seen else Outcome.UNDECIDED, after=None))
    return tuple(found)


def _levels(values: Series, starts: NDArray[np.int64], rule: Rule) -> Series:
    """The value at which each event counts as settled, from the steps before its first."""
    past = [values[None, :start] for start in starts[starts < rule.window]]  # events increase: these come first
    later = starts[starts >= rule.window]
    if later.size:
        past.append(sliding_window_view(values, rule.window)[later - rule.window])
    if not past:
        return values[:0]
    median, spread = np.concatenate([median_and_deviation(rows) for rows in past], axis=1)
    return median + rule.deviations * np.maximum(spread, hidden_deviation(values)[starts])


def _first_at_most(values: Series, minima: Series, start: int, level: float) -> int | None:
    """First step from `start` on whose value is at most `level`; whole blocks are skipped by their minima."""
    block = start // BLOCK + 1
    low = np.flatnonzero(values[start : block * BLOCK] <= level)
    if low.size:
        return start + int(low[0])
    below = minima[block:] <= level
    if not below.any():
        return None
    start = (block + int(np.argmax(below))) * BLOCK
    return start + int(np.argmax(values[start : start + BLOCK] <= level))


def paired_difference(series: Series, reference: Series) -> Series:
    """A loss less a reference run's loss on the same batches: hard batches cancel."""
    length = min(series.size, reference.size)
    return series[:length] - reference[:length]


def paired_ratio(series: Series, reference: Series) -> Series:
    """A series over a reference run's on the same batches, times the reference's median: it keeps a level."""
    length = min(series.size, reference.size)
    if length == 0:  # one of them diverged at once: there is no median
        return series[:0]
    return series[:length] / reference[:length] * float(np.median(reference[:length]))


def pair(definition: Definition, quantity: str, series: Series, reference: Series) -> Series:
    """The paired series that a definition can read.

    A loss less the reference's lies about 0, so definitions by a multiple of a level, and norms, read the ratio. It
    ends where the reference does, which is no divergence; a value of the series that is not finite stays, and is one.
    """
    if not definition.relative and "norm" not in quantity:
        return paired_difference(series, finite(reference))
    return paired_ratio(series, finite(np.where(reference > 0, reference, np.nan)))


def events(definition: Definition, series: Series) -> list[dict[str, Any]]:
    """Every event: the step at which it is noticed, its outcome, and the steps until it recovered (or None)."""
    steps = definition.find(series)
    found = recoveries(series, steps, lag=definition.lag)
    return [
        {"step": step, "outcome": recovery.outcome.value, "after": recovery.after}
        for step, recovery in zip(steps, found, strict=True)
    ]


def count_events(records: Sequence[Mapping[str, Any]], references: tuple[str, ...]) -> list[dict[str, Any]]:
    """Spikes of every training record, by every definition, raw and paired on the same batches.

    Args:
        references: methods whose runs stand for an undisturbed one, by preference; a run is paired with the first
            that is not its own and shares its experiment, seed, learning rate and shape.

    Returns:
        One row a run, quantity and definition, with the steps of the events and, in the same order, their outcomes;
        `paired` and `paired_outcomes` are None without a reference.
    """
    runs = {(*_pairing(record), record["spec"]["label"]): record for record in records}
    rows: list[dict[str, Any]] = []
    for record in records:
        spec = record["spec"]
        names = [name for name in references if name != spec["label"] and (*_pairing(record), name) in runs]
        reference = runs[(*_pairing(record), names[0])] if names else None
        for quantity in ("loss", "gradient_norm"):
            series = series_of(record, quantity)
            for definition in DEFINITIONS.values():
                raw = events(definition, series)
                paired = None
                if reference is not None:
                    paired = events(definition, pair(definition, quantity, series, series_of(reference, quantity)))
                rows.append(
                    {
                        "id": record["id"],
                        "experiment": spec["experiment"],
                        "label": spec["label"],
                        "seed": spec["seed"],
                        "learning_rate": spec["learning_rate"],
                        "seq_len": spec["seq_len"],
                        "quantity": quantity,
                        "definition": definition.name,
                        "raw": [event["step"] for event in raw],
                        "raw_outcomes": [event["outcome"] for event in raw],
                        "paired": None if paired is None else [event["step"] for event in paired],
                        "paired_outcomes": None if paired is None else [event["outcome"] for event in paired],
                        "reference": names[0] if names else None,
                    }
                )
    return rows


def _pairing(record: Mapping[str, Any]) -> tuple[Any, ...]:
    spec = record["spec"]
    return tuple(spec[name] for name in ("experiment", "seed", "learning_rate", "seq_len", "batch_size", "steps"))


def series_of(record: Mapping[str, Any], quantity: str) -> Series:
    """A record's series; a number that was not finite (null in the record) is nan.

    Every series of a diverged run ends with one: a loss that is not finite has no gradient, so the norms get the nan
    that they lack, and a finite loss whose gradient was not is followed by it.
    """
    values = list(record["series"][quantity])
    at = (record.get("final") or {}).get("diverged_at")
    if at is not None and len(values) >= at and None not in values:
        values.append(None)
    return np.array(values, dtype=np.float64)
