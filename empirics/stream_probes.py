"""Probes of the residual stream and of its gradient, place by place; of every token of the batch."""

from __future__ import annotations

import math
from typing import Any

from empirics.probes import SAMPLE, distribution
from empirics.registry import Reading, Unavailable, described, probe, reading
from empirics.subject import Seen

THINNED = f"at most {SAMPLE:,} entries"


def _of_places(subject: Seen, name: str) -> Reading:
    return reading(name, subject.place_labels, subject.place_statistics[name])


@probe("residual_std", of="every token", cost="cheap")
def residual_std(subject: Seen) -> Reading:
    """Over the entries of a token, mean removed; its square averaged over tokens."""
    return _of_places(subject, "residual_std")


@probe("place_gradient", of="every token", cost="cheap")
def place_gradient(subject: Seen) -> Reading:
    """Squares add over tokens, sequences and micro-batches."""
    return _of_places(subject, "place_gradient")


@probe("token_gradient", of="every token", cost="cheap")
def token_gradient(subject: Seen) -> Reading:
    """The loss is a mean over tokens, so that this falls with their number."""
    return _of_places(subject, "token_gradient")


@probe("token_gradient_max", of="every token", cost="cheap")
def token_gradient_max(subject: Seen) -> Reading:
    """Far above the mean where a few tokens carry the gradient."""
    return _of_places(subject, "token_gradient_max")


@probe("gradient_growth", of="every token", cost="cheap")
def gradient_growth(subject: Seen) -> Reading:
    """From the first place to the last."""
    gradient = subject.place_statistics["place_gradient"]
    return reading("gradient_growth", ["network"], [gradient[0] / gradient[-1] if gradient[-1] else math.nan])


def _distributions(subject: Seen) -> list[dict[str, Any]]:
    return [distribution(x) for x in subject.streams]


def _of_distributions(subject: Seen, name: str, statistic: str) -> Reading:
    found = subject.shared(_distributions)
    if any(statistic not in item for item in found):
        raise Unavailable("the residual stream has no spread at some place")
    return described(name, statistic, subject.place_labels, found)


@probe("residual_skewness", of="every token", cost="dear")
def residual_skewness(subject: Seen) -> Reading:
    """0 for a normal law; of the first micro-batch in a training, and of the first sequence in a monitor."""
    return _of_distributions(subject, "residual_skewness", "skewness")


@probe("residual_kurtosis", of="every token", cost="dear")
def residual_kurtosis(subject: Seen) -> Reading:
    """0 for a normal law, above it for heavier tails; of the same tokens as the skewness."""
    return _of_distributions(subject, "residual_kurtosis", "excess_kurtosis")


@probe("residual_normal_distance", of=THINNED, kind="estimate", cost="dear")
def residual_normal_distance(subject: Seen) -> Reading:
    """Kolmogorov's distance with estimated mean and variance; normal samples of n entries show up to 0.886/sqrt(n).

    Exact of a place that has no more entries; of a larger one they are evenly spaced.
    """
    return _of_distributions(subject, "residual_normal_distance", "normal_distance")
