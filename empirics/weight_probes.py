"""Probes of every weight matrix: its spectrum, the law of its entries, and what a step changes."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from empirics.probes import SAMPLE, distribution
from empirics.registry import Reading, Unavailable, described, probe, reading
from empirics.subject import Seen

THINNED = f"at most {SAMPLE:,} entries"
Spectra = dict[str, NDArray[np.float64]]


def _spectra(subject: Seen) -> Spectra:
    """Singular values of every matrix, descending, in float64."""
    found: Spectra = {}
    for name, w in subject.matrices.items():
        if not w.isfinite().all():
            raise Unavailable(f"{name} is not finite")
        found[name] = torch.linalg.svdvals(w.double()).cpu().numpy()
    return found


def _of_spectra(subject: Seen, name: str, statistic: Any) -> Reading:
    spectra = subject.shared(_spectra)
    with np.errstate(invalid="ignore", divide="ignore"):  # a matrix of zeros has no rank
        return reading(name, list(spectra), [float(statistic(values)) for values in spectra.values()])


@probe("weight_opnorm", of="every entry", cost="dear")
def weight_opnorm(subject: Seen) -> Reading:
    """By a full singular value decomposition."""
    return _of_spectra(subject, "weight_opnorm", np.max)


@probe("weight_smallest", of="every entry", cost="dear")
def weight_smallest(subject: Seen) -> Reading:
    """Of as many as the shorter side has."""
    return _of_spectra(subject, "weight_smallest", np.min)


@probe("weight_norm", of="every entry", cost="dear")
def weight_norm(subject: Seen) -> Reading:
    """Root of the sum of the squared singular values."""
    return _of_spectra(subject, "weight_norm", np.linalg.norm)


@probe("weight_quantile_10", of="every entry", cost="dear")
def weight_quantile_10(subject: Seen) -> Reading:
    """Near the small end."""
    return _of_spectra(subject, "weight_quantile_10", lambda values: np.quantile(values, 0.1))


@probe("weight_quantile_50", of="every entry", cost="dear")
def weight_quantile_50(subject: Seen) -> Reading:
    """The median."""
    return _of_spectra(subject, "weight_quantile_50", np.median)


@probe("weight_quantile_90", of="every entry", cost="dear")
def weight_quantile_90(subject: Seen) -> Reading:
    """Near the large end."""
    return _of_spectra(subject, "weight_quantile_90", lambda values: np.quantile(values, 0.9))


@probe("weight_stable_rank", of="every entry", cost="dear")
def weight_stable_rank(subject: Seen) -> Reading:
    """At most the rank; 1 if one singular value is all there is."""
    return _of_spectra(subject, "weight_stable_rank", lambda values: np.square(values / values.max()).sum())


def _effective_rank(values: NDArray[np.float64]) -> float:
    share = values / values.sum()
    share = share[share > 0]
    return float(np.exp(-(share * np.log(share)).sum())) if share.size else np.nan


@probe("weight_effective_rank", of="every entry", cost="dear")
def weight_effective_rank(subject: Seen) -> Reading:
    """At most the rank, which it is if all singular values are equal."""
    return _of_spectra(subject, "weight_effective_rank", _effective_rank)


def _distributions(subject: Seen) -> dict[str, dict[str, Any]]:
    return {name: distribution(matrix) for name, matrix in subject.matrices.items()}


def _of_distributions(subject: Seen, name: str, statistic: str) -> Reading:
    found = {label: item for label, item in subject.shared(_distributions).items() if statistic in item}
    if not found:
        raise Unavailable("no matrix has any spread")
    return described(name, statistic, list(found), list(found.values()))


@probe("weight_skewness", of="every entry", cost="dear")
def weight_skewness(subject: Seen) -> Reading:
    """0 for a normal law; matrices without any spread are left out, as in the next two."""
    return _of_distributions(subject, "weight_skewness", "skewness")


@probe("weight_kurtosis", of="every entry", cost="dear")
def weight_kurtosis(subject: Seen) -> Reading:
    """0 for a normal law, above it for heavier tails."""
    return _of_distributions(subject, "weight_kurtosis", "excess_kurtosis")


@probe("weight_normal_distance", of=THINNED, kind="estimate", cost="dear")
def weight_normal_distance(subject: Seen) -> Reading:
    """Kolmogorov's distance with estimated mean and variance; normal samples of n entries show up to 0.886/sqrt(n).

    Exact of a matrix that has no more entries; of a larger one they are evenly spaced.
    """
    return _of_distributions(subject, "weight_normal_distance", "normal_distance")


@probe("matrix_gradient", of="every entry", cost="cheap", in_training=True)
def matrix_gradient(subject: Seen) -> Reading:
    """As the optimizer gets it: after clipping. A matrix that no gradient reached is left out."""
    if not subject.gradients:
        raise Unavailable("no gradient has reached a matrix")
    return reading("matrix_gradient", list(subject.gradients), list(subject.gradients.values()))


@probe("update_norm", of="every entry", cost="cheap", in_training=True)
def update_norm(subject: Seen) -> Reading:
    """What the optimizer added, weight decay included."""
    return reading("update_norm", list(subject.changes), [change for change, _ in subject.changes.values()])


@probe("update_ratio", of="every entry", cost="cheap", in_training=True)
def update_ratio(subject: Seen) -> Reading:
    """Relative speed of a matrix; not a number for one of zeros."""
    ratios = [change / size if size else float("nan") for change, size in subject.changes.values()]
    return reading("update_ratio", list(subject.changes), ratios)
