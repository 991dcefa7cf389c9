"""What counts as a spike: named definitions, always applied side by side.

A definition takes a series (one number a step) and gives the steps at which an event begins. It looks only
at earlier steps, so that it could have been applied while training.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Series = NDArray[np.float64]
REFRACTORY = 10  # steps after an event's last high value during which it is still the same event


def _events(high: NDArray[np.bool_]) -> tuple[int, ...]:
    """First steps of runs of high values, runs closer than `REFRACTORY` merged."""
    events: list[int] = []
    last = -REFRACTORY - 1
    for step in np.flatnonzero(high):
        if step - last > REFRACTORY:
            events.append(int(step))
        last = int(step)
    return tuple(events)


def twice_median(series: Series, window: int = 50) -> tuple[int, ...]:
    """Above twice the median of the last 50 steps (at least 10 of them)."""
    high = np.zeros(series.size, dtype=bool)
    for step in range(10, series.size):
        high[step] = series[step] > 2 * np.median(series[max(0, step - window) : step])
    return _events(high)


def robust_deviation(series: Series, window: int = 50, factor: float = 7.0) -> tuple[int, ...]:
    """Above the median of the last 50 steps by 7 times 1.4826 MAD (7 standard deviations if normal)."""
    high = np.zeros(series.size, dtype=bool)
    for step in range(20, series.size):
        past = series[max(0, step - window) : step]
        median = np.median(past)
        spread = 1.4826 * np.median(np.abs(past - median))
        high[step] = series[step] - median > factor * spread
    return _events(high)


def six_sigma(series: Series, window: int = 128) -> tuple[int, ...]:
    """Above the mean of the last 128 steps by 6 of their standard deviations (at least 20 steps)."""
    high = np.zeros(series.size, dtype=bool)
    for step in range(20, series.size):
        past = series[max(0, step - window) : step]
        high[step] = series[step] > past.mean() + 6 * past.std()
    return _events(high)


DEFINITIONS: dict[str, Callable[[Series], tuple[int, ...]]] = {
    "twice-median": twice_median,
    "robust-deviation": robust_deviation,
    "six-sigma": six_sigma,
}


def paired_difference(series: Series, reference: Series) -> Series:
    """A loss less a reference run's loss on the same batches: hard batches cancel."""
    length = min(series.size, reference.size)
    return series[:length] - reference[:length]


def paired_ratio(series: Series, reference: Series) -> Series:
    """A gradient norm over a reference run's on the same batches, times the reference's median."""
    length = min(series.size, reference.size)
    if length == 0:  # one of them diverged at once: there is no median
        return series[:0]
    return series[:length] / reference[:length] * float(np.median(reference[:length]))


def count_events(records: Sequence[Mapping[str, Any]], references: tuple[str, ...]) -> list[dict[str, Any]]:
    """Spikes of every training record, by every definition, raw and paired on the same batches.

    Args:
        references: methods whose runs stand for an undisturbed one, by preference; a run is paired with the first
            that is not its own and shares its experiment, seed, learning rate and shape.

    Returns:
        One row a run, quantity and definition, with the steps of the events; `paired` is None without a reference.
    """
    runs = {(*_pairing(record), record["spec"]["label"]): record for record in records}
    rows: list[dict[str, Any]] = []
    for record in records:
        spec = record["spec"]
        names = [name for name in references if name != spec["label"] and (*_pairing(record), name) in runs]
        reference = runs[(*_pairing(record), names[0])] if names else None
        for quantity, pair in (("loss", paired_difference), ("gradient_norm", paired_ratio)):
            series = _finite(record, quantity)
            paired = None if reference is None else pair(series, _finite(reference, quantity))
            for definition, find in DEFINITIONS.items():
                rows.append(
                    {
                        "id": record["id"],
                        "experiment": spec["experiment"],
                        "label": spec["label"],
                        "seed": spec["seed"],
                        "learning_rate": spec["learning_rate"],
                        "seq_len": spec["seq_len"],
                        "quantity": quantity,
                        "definition": definition,
                        "raw": list(find(series)),
                        "paired": None if paired is None else list(find(paired)),
                        "reference": names[0] if names else None,
                    }
                )
    return rows


def _pairing(record: Mapping[str, Any]) -> tuple[Any, ...]:
    spec = record["spec"]
    return tuple(spec[name] for name in ("experiment", "seed", "learning_rate", "seq_len", "batch_size", "steps"))


def _finite(record: Mapping[str, Any], quantity: str) -> Series:
    """The series up to its first number that is not finite."""
    values = record["series"][quantity]
    end = next((n for n, value in enumerate(values) if value is None), len(values))
    return np.array(values[:end], dtype=np.float64)
