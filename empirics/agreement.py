"""Whether a measured growth agrees with a prediction: within the accuracy that is stated, and what chance explains."""

from __future__ import annotations

import math
from bisect import bisect_left
from typing import Literal, NamedTuple

from scipy.special import stdtrit

Outcome = Literal["agrees", "differs", "undecided", "unknown"]

ACCURACY = 0.08  # relative, of the predicted growth inside its domain; a measurement adds its standard error
CHANCE = 0.01  # of calling a right prediction wrong, beyond the accuracy that it states
DRAWS = 8  # that the scatter of one network is taken from
MOST_NETWORKS = 1_000_000  # that are said to be enough; whoever needs more can be told no better


class Scatter(NamedTuple):
    """How a measured log growth scatters: its standard deviation, of how many draws that is, how many were averaged.

    Of a pooled one `draws` is as many as a single sample has of the same degrees of freedom, which are one fewer.
    """

    log_sd: float
    draws: int
    averaged: int


def pooled(redraws: Scatter, log_sd: float, seeds: int) -> Scatter:
    r"""The scatter of a mean over seeds, of both kinds of draws that there are of it.

    .. math:: s^2 = \frac{(m - 1) s_r^2 + (n - 1) s_n^2}{m + n - 2}

    with m draws of the signs of one network's weights and n >= 2 seeds. Both estimate the variance of the log growth
    over networks: a seed is a further draw of the ensemble, and so is a network with other signs, of which every weight
    is as likely as its negative. Each counts by its degrees of freedom, so that there is one rule for any number of
    seeds, and each seed adds to what is known. What a network's signs leave as it is (the magnitudes of its weights,
    the tokens) only the seeds draw anew; their share grows, to nearly all of it with many.

    Holds: as Student's quantile does, of log growths that are near normal. More seeds decide more, but not at every
    step: each moves the estimate too.
    """
    freedom = redraws.draws - 1, seeds - 1
    variance = (freedom[0] * redraws.log_sd**2 + freedom[1] * log_sd**2) / sum(freedom)
    return Scatter(math.sqrt(variance), sum(freedom) + 1, seeds)


def by_chance(scatter: Scatter) -> float:
    """How far the log of a measured growth may be off by its scatter alone.

    Student's quantile of the measurement's scatter, exceeded by chance once in `1 / CHANCE`.
    """
    quantile = float(stdtrit(scatter.draws - 1, 1 - CHANCE / 2))
    return quantile * scatter.log_sd / math.sqrt(scatter.averaged)


def allowed(scatter: Scatter) -> float:
    """How far the log of a measured growth may be from the prediction's before they are said to differ.

    The stated accuracy of the prediction inside its domain, and beyond it what chance explains.
    """
    return math.log1p(ACCURACY) + by_chance(scatter)


def decides(scatter: Scatter) -> bool:
    """Whether an agreement says anything: chance explains no more than the accuracy that is stated.

    Else what is found to agree is found so since the measurement is coarser than the claim that it is to test.
    """
    return by_chance(scatter) <= math.log1p(ACCURACY)


def enough(log_sd: float) -> int:
    """How many networks that scatter so decide, by the mean of their logs; at most MOST_NETWORKS.

    Their scatter is then of them and of the draws of one of them, `pooled`.
    """
    numbers = range(1, MOST_NETWORKS)
    return numbers[0] + bisect_left(numbers, True, key=lambda n: decides(Scatter(log_sd, DRAWS - 1 + n, n)))


def outcome(
    predicted: float | None, measured: float, scatter: Scatter | None
) -> tuple[Outcome, float, tuple[str, ...]]:
    """Whether a prediction agrees with a measurement, the limit on the difference of their logs, and why not known.

    One that agrees is `undecided` where the scatter does not decide: a prediction that is wrong would agree as well.
    """
    if not math.isfinite(measured) or measured <= 0:
        return "unknown", math.nan, ("the measured growth is zero or not finite",)
    limit = math.nan if scatter is None else allowed(scatter)
    if predicted is None:
        return "unknown", limit, ()
    if not math.isfinite(predicted) or predicted <= 0:
        return "unknown", limit, ("the predicted growth is zero or not finite",)
    if scatter is None or not math.isfinite(limit):
        return "unknown", limit, ("how much such networks scatter could not be measured",)
    if abs(math.log(predicted / measured)) > limit:
        return "differs", limit, ()
    if decides(scatter):
        return "agrees", limit, ()
    moved = f"chance alone moves such a measurement by up to {math.expm1(by_chance(scatter)):.1%}"
    return "undecided", limit, (f"{moved}, more than the {ACCURACY:.0%} that is to be tested",)
