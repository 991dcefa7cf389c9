"""What counts as a spike: named definitions, each with its source and test vectors.

A definition takes a series (one number a step) and gives the steps at which an event is noticed. It looks only at
that step and earlier ones, so that it could have been applied while training.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from theory.sources import Source

Series = NDArray[np.float64]
High = NDArray[np.bool_]

REFRACTORY = 10  # steps after an event's last high value during which it is still the same event
MAD_TO_STD = 1.4826  # median absolute deviations of a normal variable in its standard deviation
DECIMALS = 16  # as many as distinguish any two floats about 1
NOISE = 2.0**-40  # of the largest value: what sums of decimal numbers are off by in binary, and no log resolves
ROWS = 8192  # windows evaluated at once: 8 MiB at 128 steps


@dataclass(frozen=True, slots=True, kw_only=True)
class Vector:
    """A short series and the events that must be found in it.

    Attributes:
        parts: (value pattern, repetitions), one after the other.
        events: steps.
    """

    parts: tuple[tuple[tuple[float, ...], int], ...]
    events: tuple[int, ...]

    @property
    def series(self) -> Series:
        """The series, shape (steps,)."""
        return np.concatenate([np.tile(np.array(pattern), times) for pattern, times in self.parts])


@dataclass(frozen=True, slots=True, kw_only=True)
class Definition:
    """One definition of a spike.

    Attributes:
        statement: in words.
        source: where it is from; `deviation` says in what it departs from it, or "".
        high: (series, **parameters) -> which steps are high, shape (steps,); step t may depend on steps <= t only.
        lag: steps between an event's first unusual value and the step at which it is noticed.
        relative: it compares with a multiple of a level, so on a series that lies about 0 it says nothing.
        vectors: test vectors.
    """

    name: str
    statement: str
    source: Source
    deviation: str
    parameters: Mapping[str, float]
    high: Callable[..., High]
    lag: int = 0
    relative: bool
    vectors: tuple[Vector, ...]

    @property
    def published(self) -> bool:
        """Whether a source of it is known."""
        return self.source.key != "convention"

    @property
    def begins(self) -> int:
        """The first step at which an event can be noticed: before it too little is known."""
        return int(self.parameters.get("first", self.parameters.get("window", 0))) + self.lag

    def find(self, series: Series) -> tuple[int, ...]:
        """Steps at which events are noticed, up to the first number that is not finite.

        High values at most `REFRACTORY` steps apart are one event.
        """
        series = finite(series)
        with np.errstate(over="ignore", invalid="ignore"):  # squares of huge losses
            steps = np.flatnonzero(self.high(series, **self.parameters))
        return tuple(steps[np.diff(steps, prepend=-REFRACTORY - 1) > REFRACTORY].tolist())


def finite(series: Series) -> Series:
    """The series up to its first number that is not finite: there it has diverged."""
    bad = ~np.isfinite(series)
    return series[: int(np.argmax(bad))] if bad.any() else series


def _of_past(series: Series, window: int, first: int, statistic: Callable[[Series], Series], n: int = 1) -> Series:
    """n statistics of the `window` values before each step (fewer near the start), nan before step `first`.

    Args:
        statistic: (rows, values) -> (n, rows).

    Returns:
        (n, steps).
    """
    result = np.full((n, series.size), np.nan)
    for step in range(first, min(window, series.size)):
        result[:, step] = statistic(series[None, :step])[:, 0]
    if series.size > window:
        windows = sliding_window_view(series[:-1], window)
        for row in range(max(0, first - window), len(windows), ROWS):
            # Copied, so that a row is summed in one order however many there are: later steps may not change bits.
            rows = np.ascontiguousarray(windows[row : row + ROWS])
            result[:, window + row : window + row + len(rows)] = statistic(rows)
    return result


def _median(rows: Series) -> Series:
    """Medians of rows; a full sort of short rows is several times as fast as np.median."""
    size = rows.shape[1]
    ordered = np.sort(rows, axis=1)
    return (ordered[:, (size - 1) // 2] + ordered[:, size // 2]) / 2


def median_and_deviation(rows: Series) -> Series:
    """Median of each row and 1.4826 times its median absolute deviation, shape (2, rows)."""
    median = _median(rows)
    return np.stack([median, MAD_TO_STD * _median(np.abs(rows - median[:, None]))])


def resolution(series: Series) -> Series:
    """The step of the grid on which a log's values lie, as far as each step can know; shape (steps,).

    Logs are rounded: to decimals where they are printed, to binary digits where a loss was of half precision. The grid
    is the coarsest that holds every value up to and including that step: of a power of ten that is at most 1 (but for
    `NOISE`: a difference of two logs is on theirs), or of a power of two that is. Of numbers that are not rounded it is
    that of their floats, far below any spread. A zero behind the last decimal cannot be seen in a number, so that a
    log too short or too even to need its decimals looks coarser than it is.
    """
    noise = NOISE * np.maximum.accumulate(np.abs(series))
    decimal = np.full(series.size, 10.0**-DECIMALS)
    for digits in reversed(range(DECIMALS)):
        with np.errstate(over="ignore"):  # of numbers so large that all of them are whole
            on = np.abs(np.round(series, digits) - series) <= noise
        decimal[on] = 10.0**-digits
    mantissa, exponent = np.frexp(series)
    bits = (mantissa * 2.0**53).astype(np.int64)
    binary = np.where(bits == 0, 1.0, np.ldexp((bits & -bits).astype(np.float64), exponent - 53))  # the lowest bit
    running = (np.minimum.accumulate(np.minimum(step, 1.0)) for step in (decimal, binary))
    return np.maximum(*running)


def hidden_deviation(series: Series) -> Series:
    """The robust deviation that rounding can hide, at each step: 1.4826 x half a step of the log's `resolution`.

    If the rounded median absolute deviation is 0, at least half of the values are rounded to the median, and so lie
    within half a step of it: before rounding the deviation was at most this about that number, and may have been it.
    Of values that are all different the median absolute deviation is never below half a step, so that this changes
    nothing for a log that is not rounded.
    """
    return MAD_TO_STD * resolution(series) / 2


def _twice_median(series: Series, *, window: int, first: int, factor: float) -> High:
    (median,) = _of_past(series, window, first, lambda rows: _median(rows)[None])
    return (series > factor * median) & (median > 0)


def _robust_deviation(series: Series, *, window: int, first: int, factor: float) -> High:
    median, spread = _of_past(series, window, first, median_and_deviation, 2)
    return series - median > factor * np.maximum(spread, hidden_deviation(series))


def _mean_and_sigma(series: Series, *, window: int, first: int, factor: float) -> High:
    mean, sigma = _of_past(series, window, first, lambda rows: np.stack([rows.mean(1), rows.std(1, ddof=1)]), 2)
    return series - mean > factor * sigma


def _running_above_mean(series: Series, *, window: int, factor: float, times: int) -> High:
    (mean,) = _of_past(series, window, window, lambda rows: rows.mean(1)[None])
    outlier = (series >= factor * mean) & (mean > 0)
    high = np.zeros(series.size, dtype=bool)
    if series.size >= times:
        high[times - 1 :] = sliding_window_view(outlier, times).all(axis=1)
    return high


def _above_first_maximum(series: Series, *, first: int, factor: float) -> High:
    high = np.zeros(series.size, dtype=bool)
    if series.size > first:
        most = np.abs(series[:first]).max()
        high[first:] = (np.abs(series[first:]) >= factor * most) & (most > 0)
    return high


_UNCONFIRMED = Source(key="convention", label="no published source confirmed")

DEFINITIONS: dict[str, Definition] = {
    definition.name: definition
    for definition in (
        Definition(
            name="twice-median",
            statement="above 2 x the median of the last 50 steps (at least 10 of them)",
            source=_UNCONFIRMED,
            deviation="",
            parameters={"window": 50, "first": 10, "factor": 2.0},
            high=_twice_median,
            relative=True,
            vectors=(
                Vector(parts=(((1.0,), 10), ((2.0, 2.5, 1.0), 1)), events=(11,)),
                Vector(parts=(((1.0,), 9), ((9.0,), 1), ((1.0,), 9)), events=()),
            ),
        ),
        Definition(
            name="robust-deviation",
            statement="above the median of the last 50 steps (at least 20 of them) by 7 x 1.4826 x their median "
            "absolute deviation, which is taken to be at least half a step of the log's rounding",
            source=Source(key="davies1993outliers", label="the Hampel identifier"),
            deviation="of the steps before and upwards alone; by 7 deviations, a convention, where 3 is common; at "
            "least half a step of rounding, without which any rise in a rounded log of no spread is an event",
            parameters={"window": 50, "first": 20, "factor": 7.0},
            high=_robust_deviation,
            relative=False,
            vectors=(
                # 20 values of -1 and 1: median 0, deviation 1, threshold 7 x 1.4826 = 10.3782.
                Vector(parts=(((-1.0, 1.0), 10), ((10.3,), 1)), events=()),
                Vector(parts=(((-1.0, 1.0), 10), ((10.4,), 1)), events=(20,)),
                Vector(parts=(((0.0, 2.0), 9), ((99.0,), 1), ((1.0,), 9)), events=()),
                # Two decimals, no spread: half a step is 0.005, the threshold 2.3 + 7 x 1.4826 x 0.005 = 2.351891.
                Vector(parts=(((2.3, 2.3, 2.3, 2.31), 5), ((2.35,), 1)), events=()),
                Vector(parts=(((2.3, 2.3, 2.3, 2.31), 5), ((2.36,), 1)), events=(20,)),
                # Eighths, as of a loss of few binary digits: half a step is 0.0625, the threshold 2.25 + 0.6486375.
                Vector(parts=(((2.25, 2.25, 2.25, 2.375), 5), ((2.875,), 1)), events=()),
                Vector(parts=(((2.25, 2.25, 2.25, 2.375), 5), ((3.0,), 1)), events=(20,)),
            ),
        ),
        Definition(
            name="six-sigma",
            statement="above the mean of the last 128 steps (at least 63 of them) by 6 of their sample standard "
            "deviations",
            source=Source(key="olmocore", label="SkipStepOptimizer.get_step_factor, its defaults"),
            deviation="a series at a time, where the source skips a step on its loss or its gradient norm",
            parameters={"window": 128, "first": 63, "factor": 6.0},
            high=_mean_and_sigma,
            relative=False,
            vectors=(
                # 64 values of -1 and 1: sigma = sqrt(64/63) = 1.0079, threshold 6.0474.
                Vector(parts=(((-1.0, 1.0), 32), ((6.0,), 1)), events=()),
                Vector(parts=(((-1.0, 1.0), 32), ((6.1,), 1)), events=(64,)),
                Vector(parts=(((-1.0, 1.0), 31), ((99.0,), 1), ((1.0,), 9)), events=()),
            ),
        ),
        Definition(
            name="five-times-twice-mean",
            statement="at least 2 x the mean of the last 100 steps, five steps running; noticed at the fifth",
            source=Source(key="llmfoundry", label="callback KillLossSpike, its defaults"),
            deviation="the window stays at 100 steps, which the source widens to 1/20 of runs longer than 2000",
            parameters={"window": 100, "factor": 2.0, "times": 5},
            high=_running_above_mean,
            lag=4,
            relative=True,
            vectors=(
                Vector(parts=(((1.0,), 100), ((3.0,), 5), ((1.0,), 5)), events=(104,)),
                Vector(parts=(((1.0,), 100), ((3.0,), 4), ((1.0,), 1), ((3.0,), 4)), events=()),
                Vector(parts=(((1.0,), 99), ((3.0,), 5), ((1.0,), 5)), events=()),  # of these, four have a full window
                # High values enter the mean: the thresholds are 2, 2.02, 2.0406, 2.0616 and 2.083.
                Vector(parts=(((1.0,), 100), ((2.0, 2.03, 2.05, 2.07, 2.08), 1)), events=()),
                Vector(parts=(((1.0,), 100), ((2.0, 2.03, 2.05, 2.07, 2.09), 1)), events=(104,)),
            ),
        ),
        Definition(
            name="ten-times-first-maximum",
            statement="at least 10 x the largest of the first 100 steps, in absolute value",
            source=Source(key="megatronlm", label="RerunStateMachine.is_unexpectedly_large with SPIKY_LOSS_FACTOR"),
            deviation="the loss of a whole step, where the source looks at each micro-batch",
            parameters={"first": 100, "factor": 10.0},
            high=_above_first_maximum,
            relative=True,
            vectors=(
                Vector(parts=(((0.5,), 99), ((2.0, 19.9, 20.0), 1)), events=(101,)),
                Vector(parts=(((1.0,), 50), ((99.0,), 1), ((1.0,), 49), ((500.0,), 1)), events=()),
            ),
        ),
    )
}
