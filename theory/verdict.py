"""The pre-flight check: what a configuration's gradient will do, why, and what to change."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from theory.architecture import Architecture
from theory.conditions import (
    GROWTH_LIMIT,
    NORMALISED_LIMIT,
    SHORTCUT_LIMIT,
    SUBLAYER_LIMIT,
    Condition,
    Outcome,
    conditions,
    normalised_share,
    outcome_of,
)
from theory.growth import Growth, gradient_growth
from theory.records import plain
from theory.remedies import remedies
from theory.sources import Source
from theory.stack import DepthBound, paper_bound, rigorous_bound

THRESHOLD_SOURCE = Source(key="convention", label="until outcomes calibrate it")
THRESHOLDS: dict[str, Any] = {
    "growth": GROWTH_LIMIT,
    "sub_layer": SUBLAYER_LIMIT,
    "shortcut": SHORTCUT_LIMIT,
    "normalised": NORMALISED_LIMIT,
    "source": str(THRESHOLD_SOURCE),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """The answer of `check`; `as_json` is its public form."""

    architecture: Architecture
    seq_len: int
    outcome: Outcome
    growth: Growth
    conditions: tuple[Condition, Condition]
    paper: DepthBound
    rigorous: DepthBound
    assumed: tuple[str, ...]
    why: tuple[str, ...]
    next: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """JSON-ready form with the documented keys."""
        return plain(
            {
                "architecture": self.architecture,
                "seq_len": self.seq_len,
                "verdict": self.outcome,
                "gradient_growth": {
                    "value": self.growth.value,
                    "kind": "sharp",
                    "in_domain": self.growth.in_domain,
                    "reasons": self.growth.reasons,
                },
                "conditions": self.conditions,
                "bounds": {
                    "paper": {"log10": self.paper.log10_product, "kind": "estimate"},
                    "rigorous": {
                        "log10": self.rigorous.log10_product,
                        "kind": "upper",
                        "assumptions": self.rigorous.assumptions,
                    },
                },
                "thresholds": THRESHOLDS,
                "assumed": self.assumed,
                "why": self.why,
                "next": self.next,
            }
        )


def unknown(reason: str) -> dict[str, Any]:
    """The JSON answer where there is no prediction to make; the same keys as `Verdict.as_json`."""
    return {
        "architecture": None,
        "seq_len": None,
        "verdict": "unknown",
        "gradient_growth": {"value": None, "kind": "sharp", "in_domain": False, "reasons": [reason]},
        "conditions": [],
        "bounds": {
            "paper": {"log10": None, "kind": "estimate"},
            "rigorous": {"log10": None, "kind": "upper", "assumptions": []},
        },
        "thresholds": dict(THRESHOLDS),
        "assumed": [],
        "why": [reason],
        "next": ["describe the model as one of the known classes, or measure it: python -m empirics measure"],
    }


def check(architecture: Architecture, seq_len: int, *, assumed: Sequence[str] = ()) -> Verdict:
    """Judge an architecture at initialisation, before anything is built."""
    growth = gradient_growth(architecture, seq_len)
    paper = paper_bound(architecture, seq_len, growth)
    found = conditions(architecture, growth, paper)
    reasons = _reasons(architecture, growth, found)
    outcome = outcome_of(growth, found, normalised_share(architecture, growth))
    return Verdict(
        architecture=architecture,
        seq_len=seq_len,
        outcome=outcome,
        growth=growth,
        conditions=found,
        paper=paper,
        rigorous=rigorous_bound(architecture, seq_len),
        assumed=(*assumed, *_assumptions(architecture)),
        why=reasons,
        next=remedies(architecture, seq_len, outcome, growth, found),
    )


def _reasons(architecture: Architecture, growth: Growth, found: Sequence[Condition]) -> tuple[str, ...]:
    small, large = found
    reasons: list[str] = []
    word = "about" if growth.in_domain else "perhaps (outside the prediction's domain)"
    if math.isfinite(growth.value):
        reasons.append(
            f"the gradient grows {word} {growth.value:.4g} times from the last layer to the first "
            f"(limit {GROWTH_LIMIT:g})"
        )
    if small.value > small.limit:
        reasons.append(
            f"sub-layers are not small: the paper's norm of the largest is {small.value:.3g} (limit {small.limit:g})"
        )
    if large.value > large.limit:
        std = growth.residual_std[0]
        reasons.append(
            f"the shortcut is not large: embeddings of std {std:.3g} let a half-layer's Jacobian exceed 1 by "
            f"{large.value:.3g} in the paper's estimate (limit {large.limit:g})"
        )
    reasons.extend(
        f"unknown: whether the condition holds: {condition.name}" for condition in found if math.isnan(condition.value)
    )
    if small.holds and large.holds:
        reasons.append("both of the paper's conditions hold: small sub-layers and a large shortcut")
    if (share := normalised_share(architecture, growth)) < NORMALISED_LIMIT:
        reasons.append(
            f"norms hardly normalise: of what one of them divides by, a share {share:.3g} is the mean square of its "
            f"input and the rest eps={architecture.eps:g} (limit {NORMALISED_LIMIT:g}); what training makes of that "
            "is not predicted"
        )
    reasons.extend(growth.reasons)
    if growth.residual_std[0] > 0 and max(growth.branch_std) == 0:
        reasons.append(
            "every sub-layer is zero at initialisation: the check says nothing of what the first step makes of them"
        )
    if architecture.tied and growth.residual_std[0] > 0.3:
        reasons.append("the head is tied to embeddings this large: expect a high loss in the first steps")
    return tuple(reasons)


def _assumptions(architecture: Architecture) -> tuple[str, ...]:
    assumed = ["initialisation, no dropout", "uniformly random tokens", "float32 or wider residual stream"]
    assumed.append(
        f"the limits ({GROWTH_LIMIT:g} on the growth, {SUBLAYER_LIMIT:g} and {SHORTCUT_LIMIT:g} on the conditions, "
        f"{NORMALISED_LIMIT:g} on the share that norms normalise): a convention until outcomes calibrate them"
    )
    if architecture.gated or architecture.activation == "relu-squared":
        assumed.append("eq. (15) extended to gates and squares by the root mean square slope")
    if architecture.block != "pre-ln" or architecture.parallel:
        assumed.append("the paper's bound, which is of Pre-LN layers in a row, carried over to this layout")
    if architecture.n_experts:
        assumed.append("the routing in expectation over the router's weights; no token is dropped, no expert is full")
    if architecture.padding_row:
        assumed.append("the padding token does not occur: its zero row has gradients of order 1/sqrt(eps)")
    return tuple(assumed)
