"""What a probed step of somebody's training has given: a value, as text, as JSON and as a series."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from empirics.registry import Reading
from empirics.training_probes import Probed, add
from theory.records import Measurement, plain
from theory.words import counted


@dataclass(frozen=True, slots=True, kw_only=True)
class StabilityRecord:
    """One probed step. Every tuple runs over the places of the residual stream.

    `residual_std` and `place_gradient` are what a training record of `python -m empirics train` has by these names.

    Attributes:
        step: the step's number.
        places: `embedding`, then `layer N attention` (serial blocks) and `layer N`.
        residual_std: over the entries of a token, its square averaged over tokens.
        place_gradient: norm of the loss gradient over all tokens of the step; not a number where none arrives, or not
            of all tokens. Of the loss as backward() has it: a loss scaler's factor is in it, and not in the growth.
        token_gradient: mean, over the tokens at which a gradient arrives, of its norm at that token; likewise.
        n_tokens: tokens of the step's forward passes, padding included, with a gradient or without.
        probes: what the probes found, by name, as `series.probes` of a training record has them. Those of the
            optimizer's step are there once it has stepped.
        left_out: why others, or the fields above, have found nothing, or nothing in some layers, whose values are then
            not a number.
    """

    step: int
    places: tuple[str, ...]
    residual_std: tuple[float, ...]
    place_gradient: tuple[float, ...]
    token_gradient: tuple[float, ...]
    n_tokens: int
    probes: dict[str, Reading] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        rows = zip(self.places, self.residual_std, self.place_gradient, self.token_gradient)
        return "\n".join(
            [
                f"step {self.step}, {counted(self.n_tokens, 'token')}: gradient growth {self.growth:.4g}",
                f"{'place':<20}{'residual std':>14}{'gradient':>12}{'a token':>12}",
                *(f"{name:<20}{std:>14.4g}{norm:>12.4g}{token:>12.4g}" for name, std, norm, token in rows),
                *(_range(name, found) for name, found in self.probes.items()),
                *(f"{name}: left out; {reason}" for name, reason in self.left_out.items()),
            ]
        )

    @property
    def growth(self) -> float:
        """Gradient norm at the first place over that at the last."""
        return self.place_gradient[0] / self.place_gradient[-1] if self.place_gradient[-1] else math.nan

    def row(self) -> dict[str, Any]:
        """As JSON: the fields, the growth, of every probe its labels and values, and how sure these are."""
        probes = {
            name: {"labels": found.labels, "values": found.values}
            | ({"lower_estimate": True} if found.lower_estimate else {})
            | found.sureness
            for name, found in self.probes.items()
        }
        return plain(self) | {"growth": plain(self.growth), "probes": plain(probes)}

    def measurements(self) -> tuple[Measurement, Measurement, Measurement]:
        """Gradient growth, gradient profile and residual profile, as `empirics.probes.measure_growth` gives them."""
        last = self.place_gradient[-1] or math.nan
        values = {
            "gradient_growth": (self.growth,),
            "gradient_profile": tuple(value / last for value in self.place_gradient),
            "residual_std": self.residual_std,
        }
        growth, gradient, residual = (
            Measurement(quantity=name, values=it, seeds=(), log_sd=None, lower_estimate=False)
            for name, it in values.items()
        )
        return growth, gradient, residual


def _range(name: str, found: Reading) -> str:
    values, kind = found.values, " (lower estimate)" if found.lower_estimate else ""
    if len(values) == 1:
        return f"{name}: {values[0]:.4g}{kind}"
    there = [value for value in values if not math.isnan(value)] or [math.nan]
    return f"{name}: {min(there):.4g} to {max(there):.4g} over {len(there)}{kind}"


def series(records: Sequence[StabilityRecord]) -> dict[str, Any]:
    """Probed steps as a training record's `series` has them: `probe_step`, a list a step of the rest, and `probes`."""
    probes: Probed = {}
    for record in records:
        for name, found in record.probes.items():
            add(probes, name, record.step, found)
    return {
        "probe_step": [record.step for record in records],
        "residual_std": [list(record.residual_std) for record in records],
        "place_gradient": [list(record.place_gradient) for record in records],
        "probes": probes,
    }
