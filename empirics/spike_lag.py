"""Whether spikes of gradient and update come before the loss's or each other's, after them or with them.

Three pairs of series are held against each other: gradient and loss, update and loss, update and gradient. Events of
two series are paired where they are near: the nearest first, each event once. A pair's lag is the step of the first
series' event less that of the second's, so that a negative one leads. Both are steps at which the same
definition notices an event, and a definition that notices late does so in both.

What chance gives is found by turning one series' events around the log, by numbers of steps at which no pair can stay
what it was, evenly spaced: both series keep all their events and the distances between them, and lose what they have
to do with each other. Nothing is drawn at random.

At one step the loss and the gradient are of the same batch and the same weights; the update is what follows from them,
and the first loss or gradient it can touch is the next step's. Against the gradient of its own step an update comes
together with it at the earliest, or after it where the optimizer's averages carry a large gradient on.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from empirics.spike_definitions import DEFINITIONS, Definition, Series, finite
from empirics.spike_log import Log, read_beside
from empirics.spikes import pair

WINDOW = 10  # steps between two events that are taken for a pair; a convention
LEVELS = (0.05, 0.95)  # of the shifts' median lags
MOST_SHIFTS = 2000
COLUMNS = ("gradient_norm", "update_norm")
LOSS = "loss"
HELD = (("gradient_norm", LOSS), ("update_norm", LOSS), ("update_norm", "gradient_norm"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Lag:
    """Pairs of events of two series, and what shifts of one of them give.

    Attributes:
        events, other_events: how many there are of either.
        lags: of the pairs, increasing.
        shifts: how many were taken; 0 where the log is too short for any, and then there is no chance to compare with.
        pairs_by_chance: mean number of pairs over the shifts.
        chance: share of the shifts, and of the log itself, with at least as many pairs.
        median_by_chance: 5 and 95 % of the median lag over the shifts that leave a pair; None if none does.
        chance_of_side: share of the shifts, and of the log itself, in which leading and lagging pairs differ by as
            many.
    """

    events: int
    other_events: int
    lags: tuple[int, ...]
    shifts: int
    pairs_by_chance: float | None
    chance: float | None
    median_by_chance: tuple[float, float] | None
    chance_of_side: float | None

    @property
    def median(self) -> float | None:
        """Median lag in steps; None without a pair."""
        return float(np.median(self.lags)) if self.lags else None

    def record(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "events": self.events,
            "other_events": self.other_events,
            "pairs": len(self.lags),
            "leading": sum(lag < 0 for lag in self.lags),
            "together": sum(lag == 0 for lag in self.lags),
            "lagging": sum(lag > 0 for lag in self.lags),
            "median_lag": self.median,
            "lags": list(self.lags),
            "shifts": self.shifts,
            "pairs_by_chance": self.pairs_by_chance,
            "chance": self.chance,
            "median_by_chance": None if self.median_by_chance is None else list(self.median_by_chance),
            "chance_of_side": self.chance_of_side,
        }


def pairs(events: Sequence[int], other_events: Sequence[int], window: int = WINDOW) -> tuple[int, ...]:
    """Lags of the pairs within the window: the nearest first, of equally near ones the earlier, each event once."""
    events = sorted(events)
    near = sorted(
        (abs(event - loss), event, loss)
        for loss in other_events
        for event in events[bisect_left(events, loss - window) : bisect_right(events, loss + window)]
    )
    taken: set[int] = set()
    loss_taken: set[int] = set()
    found: list[int] = []
    for _, event, loss in near:
        if event not in taken and loss not in loss_taken:
            taken.add(event)
            loss_taken.add(loss)
            found.append(event - loss)
    return tuple(sorted(found))


def lag(definition: Definition, series: Series, other: Series, window: int = WINDOW) -> Lag:
    """How the events of a series lie to those of another, by one definition.

    Both are read up to where either has diverged, and turned within the steps in which the definition can notice.

    Args:
        series, other: shape (steps,), of the same steps.
    """
    length = min(finite(series).size, finite(other).size)
    events, other_events = definition.find(series[:length]), definition.find(other[:length])
    lags = pairs(events, other_events, window)
    begins, around = definition.begins, length - definition.begins
    # A turn by up to twice the window may leave a pair one.
    possible = around - 4 * window - 1
    turns = range(2 * window + 1, around - 2 * window, max(1, math.ceil(possible / MOST_SHIFTS)))
    if not (events and other_events):
        turns = range(0)
    by_chance = [pairs([begins + (e - begins + turn) % around for e in events], other_events, window) for turn in turns]
    medians = [float(np.median(found)) for found in by_chance if found]

    def chance(statistic: Callable[[tuple[int, ...]], int]) -> float | None:
        """Share of all turns, none at all among them, at which a statistic is as large as in the log."""
        here = statistic(lags)
        return (1 + sum(statistic(found) >= here for found in by_chance)) / (1 + len(by_chance)) if by_chance else None

    return Lag(
        events=len(events),
        other_events=len(other_events),
        lags=lags,
        shifts=len(by_chance),
        pairs_by_chance=float(np.mean([len(found) for found in by_chance])) if by_chance else None,
        chance=chance(len),
        median_by_chance=tuple(np.quantile(medians, LEVELS).tolist()) if medians else None,
        chance_of_side=chance(lambda found: abs(int(np.sign(found).sum()))),
    )


def tell_lags(path: Path, log: Log, reference_path: Path | None, reference: Log | None, names: Sequence[str]) -> Any:
    """Lags of each series of `HELD` behind its other, by every definition, raw and paired, as JSON.

    Args:
        path, log: the run, and its loss; the same of the reference.

    Raises:
        ValueError: the run does not have those series, or at other steps.
    """
    series = {LOSS: log.values} | {column: _beside(path, log, column) for column in COLUMNS}
    calm: dict[str, Series] | None = None
    if reference_path is not None and reference is not None:
        calm = {LOSS: reference.values} | {name: _beside(reference_path, reference, name) for name in COLUMNS}
    rows: list[dict[str, Any]] = []
    for first, second in HELD:
        for name in names:
            definition = DEFINITIONS[name]
            against = log.column if second == LOSS else second
            row: dict[str, Any] = {"series": first, "against": against, "definition": name}
            row["raw"] = lag(definition, series[first], series[second]).record()
            if calm is not None:
                paired = [
                    pair(definition, log.column if one == LOSS else one, series[one], calm[one])
                    for one in (first, second)
                ]
                row["paired"] = lag(definition, paired[0], paired[1]).record()
            rows.append(row)
    return {"column": log.column, "window": WINDOW, "rows": rows}


def _beside(path: Path, log: Log, column: str) -> Series:
    """A series of the run at the steps of its loss."""
    try:
        found = read_beside(path, log, column)
    except ValueError as reason:
        raise ValueError(
            f"--lag needs the series {' and '.join(COLUMNS)}: {reason}; or name the folder of a run"
        ) from None
    length = min(found.steps.size, log.steps.size)
    if not np.array_equal(found.steps[:length], log.steps[:length]):
        raise ValueError(
            f"{column} of {found.path} is at other steps than the loss of {log.path}; name one run's folder"
        )
    return found.values


def lag_text(told: Mapping[str, Any]) -> str:
    """A line for every two series and definition."""
    lines = [
        "",
        f"lag of one series behind another, in steps; events at most {told['window']} steps apart are a pair, a "
        "negative lag leads",
        f"{'series':<15}{'behind':<15}{'definition':<25}{'':<8}{'events':>7}{'of it':>8}{'pairs':>6}{'by chance':>10}"
        f"{'chance':>8}{'median lag':>11}{'by chance':>15}{'chance':>8}  leading, together, lagging",
    ]
    for row in told["rows"]:
        for kind in ("raw", "paired"):
            if kind in row:
                lines.append(_line(row["series"], row["against"], row["definition"], kind, row[kind]))
    lines += [
        "",
        "by chance: mean number of pairs, and 5 to 95 % of the median lag, over turns of one series around the log",
        "that leave no pair as it was; chance: share of the turns with as many pairs, or with leading and lagging",
        "pairs as far from equal; - where there is nothing to turn. The first loss that a step's update can touch is",
        "the next step's; the gradient from which it is made is its own step's",
    ]
    return "\n".join(lines)


def _line(series: str, against: str, definition: str, kind: str, found: Mapping[str, Any]) -> str:
    def shown(value: float | None, form: str = "{:.3g}") -> str:
        return "-" if value is None else form.format(value)

    between = found["median_by_chance"]
    spread = "-" if between is None else "{:+.1f} to {:+.1f}".format(*between)
    counts = f"{found['leading']}, {found['together']}, {found['lagging']}" if found["pairs"] else ""
    return (
        f"{series:<15}{against:<15}{definition:<25}{kind:<8}{found['events']:>7}{found['other_events']:>8}{found['pairs']:>6}"
        f"{shown(found['pairs_by_chance'], '{:.2f}'):>10}{shown(found['chance']):>8}"
        f"{shown(found['median_lag'], '{:+.1f}'):>11}{spread:>15}{shown(found['chance_of_side']):>8}  {counts}"
    ).rstrip()
