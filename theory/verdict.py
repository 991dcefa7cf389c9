"""The pre-flight check: what a configuration's gradient will do, why, and what to change."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from theory.architecture import Architecture
from theory.growth import Growth, gradient_growth
from theory.growth_domain import MAX_LOGIT_VARIANCE, MAX_REPEATED, SHARP_LOGITS
from theory.records import plain
from theory.sources import Source
from theory.stack import DepthBound, input_scales, paper_bound, rigorous_bound

Outcome = Literal["stable", "at risk", "unstable", "unknown"]

# Thresholds are conventions until outcomes of real trainings calibrate them.
GROWTH_LIMIT = 2.0  # stable up to this growth of the gradient from the last layer to the first
SUBLAYER_LIMIT = 2.0  # condition 1: the paper's norm of a sub-layer in its normalised input
SHORTCUT_LIMIT = 2.0  # condition 2: the paper's excess over 1 of a half-layer's Jacobian, at the worst layer
THRESHOLD_SOURCE = Source(key="convention", label="until outcomes calibrate it")


@dataclass(frozen=True, slots=True, kw_only=True)
class Condition:
    """One of the paper's two conditions, evaluated.

    Attributes:
        holds: whether it is known to hold.
        value: the largest over sub-layers and depth; `limit` is the convention it is held against. Not a number where
            the recursion has none at some layer and no other layer exceeds the limit.
    """

    name: str
    holds: bool
    value: float
    limit: float


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
                "thresholds": {
                    "growth": GROWTH_LIMIT,
                    "sub_layer": SUBLAYER_LIMIT,
                    "shortcut": SHORTCUT_LIMIT,
                    "source": str(THRESHOLD_SOURCE),
                },
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
        "thresholds": {
            "growth": GROWTH_LIMIT,
            "sub_layer": SUBLAYER_LIMIT,
            "shortcut": SHORTCUT_LIMIT,
            "source": str(THRESHOLD_SOURCE),
        },
        "assumed": [],
        "why": [reason],
        "next": ["describe the model as one of the known classes, or measure it: python -m empirics measure"],
    }


def check(architecture: Architecture, seq_len: int, *, assumed: Sequence[str] = ()) -> Verdict:
    """Judge an architecture at initialisation, before anything is built."""
    growth = gradient_growth(architecture, seq_len)
    paper = paper_bound(architecture, seq_len, growth)
    conditions = _conditions(architecture, growth, paper)
    reasons = _reasons(architecture, growth, conditions)
    outcome = _outcome(growth, conditions)
    return Verdict(
        architecture=architecture,
        seq_len=seq_len,
        outcome=outcome,
        growth=growth,
        conditions=conditions,
        paper=paper,
        rigorous=rigorous_bound(architecture, seq_len),
        assumed=(*assumed, *_assumptions(architecture)),
        why=reasons,
        next=_remedies(architecture, seq_len, outcome, growth),
    )


def _outcome(growth: Growth, conditions: Sequence[Condition]) -> Outcome:
    if any(condition.value > condition.limit for condition in conditions):
        return "at risk"  # the conditions do not depend on the growth's domain
    if not growth.in_domain or not all(condition.holds for condition in conditions):
        return "unknown"
    return "stable" if growth.value <= GROWTH_LIMIT else "at risk"


def _conditions(architecture: Architecture, growth: Growth, paper: DepthBound) -> tuple[Condition, Condition]:
    excess = np.stack([paper.attention, paper.feedforward], axis=1)
    # What a branch's norm divides by is the shortcut's doing, not the sub-layer's.
    sublayer = _largest(excess * input_scales(architecture, growth), SUBLAYER_LIMIT)
    alpha = architecture.shortcut_multiplier
    shortcut = _largest(excess / alpha, SHORTCUT_LIMIT) if alpha > 0 else math.inf
    return (
        Condition(name="small sub-layers", holds=sublayer <= SUBLAYER_LIMIT, value=sublayer, limit=SUBLAYER_LIMIT),
        Condition(name="large shortcut", holds=shortcut <= SHORTCUT_LIMIT, value=shortcut, limit=SHORTCUT_LIMIT),
    )


def _largest(values: NDArray[np.float64], limit: float) -> float:
    """The largest of the numbers, unless one that is none could still exceed the limit where they do not."""
    numbers = values[~np.isnan(values)]
    largest = float(np.max(numbers, initial=-math.inf))
    return largest if numbers.size == values.size or largest > limit else math.nan


def in_words(value: float) -> str:
    """Four digits, or `unknown` for what is no finite number."""
    return f"{value:.4g}" if math.isfinite(value) else "unknown"


def _reasons(architecture: Architecture, growth: Growth, conditions: Sequence[Condition]) -> tuple[str, ...]:
    small, large = conditions
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
        f"unknown: whether the condition holds: {condition.name}"
        for condition in conditions
        if math.isnan(condition.value)
    )
    if small.holds and large.holds:
        reasons.append("both of the paper's conditions hold: small sub-layers and a large shortcut")
    reasons.extend(growth.reasons)
    if growth.residual_std[0] > 0 and max(growth.branch_std) == 0:
        reasons.append(
            "every sub-layer is zero at initialisation: the check says nothing of what the first step makes of them"
        )
    if architecture.tied and growth.residual_std[0] > 0.3:
        reasons.append("the head is tied to embeddings this large: expect a high loss in the first steps")
    return tuple(reasons)


def _assumptions(architecture: Architecture) -> tuple[str, ...]:
    assumed = ["initialisation, no dropout", "uniformly random, distinct tokens", "float32 or wider residual stream"]
    if architecture.gated or architecture.activation == "relu-squared":
        assumed.append("eq. (15) extended to gates and squares by the root mean square slope")
    if architecture.block != "pre-ln" or architecture.parallel:
        assumed.append("the paper's bound, which is of Pre-LN layers in a row, carried over to this layout")
    if architecture.n_experts:
        assumed.append("the routing in expectation over the router's weights; no token is dropped, no expert is full")
    if architecture.padding_row:
        assumed.append("the padding token does not occur: its zero row has gradients of order 1/sqrt(eps)")
    return tuple(assumed)


def _remedies(architecture: Architecture, seq_len: int, outcome: Outcome, growth: Growth) -> tuple[str, ...]:
    if outcome == "stable":
        return ("train; at the next change of width, depth or initialisation, check again",)
    lines: list[str] = []
    treatments = ("scaled-embed", "embed-ln")
    for words, base in (("", architecture), (" with the paper's initialisation", architecture.with_init("paper"))):
        for treatment in treatments:
            changed = base.with_embedding(treatment)
            after = gradient_growth(changed, seq_len)
            conditions = _conditions(changed, after, paper_bound(changed, seq_len, after))
            if _outcome(after, conditions) == "stable":
                lines.append(
                    f"--embedding {treatment}{' --init paper' if words else ''}: growth {after.value:.4g} "
                    f"instead of {in_words(growth.value)}"
                )
        if lines:
            break
    if not lines and outcome == "unknown":
        lines.extend(_into_the_domain(architecture, seq_len, growth))
    if not lines:
        lines.append(
            "no single change of the embedding or the initialisation makes this stable; make the sub-layers smaller "
            "(output matrices times 1/sqrt(2 n_layers)) and the embeddings' std about 1"
        )
    return tuple(lines)


def _into_the_domain(architecture: Architecture, seq_len: int, growth: Growth) -> tuple[str, ...]:
    """What takes away that which puts a verdict outside the domain, where no change can be judged."""
    lines: list[str] = []
    fewer = max(int(2 * MAX_REPEATED * architecture.vocab_size), 1)
    if seq_len > fewer:
        after = gradient_growth(architecture, fewer)
        outcome = _outcome(after, _conditions(architecture, after, paper_bound(architecture, fewer, after)))
        lines.append(f"--seq-len {fewer}: so few tokens of the vocabulary seldom repeat; the verdict is then {outcome}")
    if any(reason.startswith(SHARP_LOGITS) for reason in growth.reasons):
        with_norm = architecture.qk_norm != "none"
        what = "attention scale" if with_norm else "standard deviation of the query and key matrices"
        lines.append(f"use a smaller {what}: the prediction needs logits of variance {MAX_LOGIT_VARIANCE:g} at most")
    if not lines:
        lines.append(
            "no change can be judged outside the prediction's domain; change what `why` names, or measure: "
            "python -m empirics measure"
        )
    return tuple(lines)
