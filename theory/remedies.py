"""What to change: treatments and initialisations that are judged, and what is left where none of them is enough."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain

from theory.architecture import Architecture, EmbeddingTreatment
from theory.conditions import (
    GROWTH_LIMIT,
    Condition,
    Outcome,
    conditions_of,
    in_words,
    normalised_share,
    outcome_of,
)
from theory.differences import differences
from theory.forward_pass import forward_pass
from theory.growth import Growth, backward_pass
from theory.growth_domain import MAX_LAYERS, MAX_LOGIT_VARIANCE, SHARP_LOGITS, lasting

TREATMENTS: tuple[EmbeddingTreatment, ...] = ("scaled-embed", "embed-ln")
TRAIN = "train; at the next change of width, depth or initialisation, check again"
UNJUDGED = (
    "no change can be judged outside the prediction's domain; change what `why` names, or measure: "
    "python -m empirics measure"
)
SOFTER = "use a smaller"  # so begins the advice against sharp logits
SMALLER_EPS = "use a smaller eps in the norms, or larger standard deviations: eps is most of what they divide by"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Try:
    """A change that was judged; growth is None where the conditions, or the sizes, decide without it.

    options: those that set it, empty for the configuration as it is. numbers: what it changes, of `differences`.
    """

    options: str
    numbers: str
    architecture: Architecture
    conditions: tuple[Condition, Condition]
    share: float
    logit_variance: float
    growth: Growth | None

    @property
    def stable(self) -> bool:
        return self.growth is not None and outcome_of(self.growth, self.conditions, self.share) == "stable"

    @property
    def holds(self) -> bool:
        return all(condition.holds for condition in self.conditions)

    @property
    def excess(self) -> float:
        """The worst number over its limit; infinite if one is unknown."""
        found = [condition.value / condition.limit for condition in self.conditions]
        if self.growth is not None:
            found.append(self.growth.value / GROWTH_LIMIT)
        return max(value if math.isfinite(value) else math.inf for value in found)


def remedies(
    architecture: Architecture, seq_len: int, outcome: Outcome, growth: Growth, found: tuple[Condition, Condition]
) -> tuple[str, ...]:
    """Lines of advice; one that begins with an option says what that does, the next one says it in numbers."""
    if outcome == "stable":
        return (TRAIN,)
    sizes = lasting(architecture, seq_len)
    tried: list[_Try] = []
    if outcome == "at risk" or not sizes:
        for tries in _tries(architecture, seq_len, found):
            tried.extend(tries)
            if any(one.stable for one in tried):
                return _lines((_promise(one, growth), one) for one in tried if one.stable)
            if any(one.holds for one in tried) and sizes:
                break  # no more than that can be said of any change
    outside = _into_the_domain(architecture, seq_len, growth)
    if outcome == "unknown":
        return outside or (SMALLER_EPS if growth.in_domain else UNJUDGED,)
    mended = [one for one in tried if one.holds and (one.growth is None or not one.growth.in_domain)]
    advised = mended or [min(tried, key=lambda one: one.excess)]
    if all(one.logit_variance <= MAX_LOGIT_VARIANCE for one in advised):
        outside = tuple(line for line in outside if not line.startswith(SOFTER))
    say = _half_a_promise if mended else partial(_what_is_left, seq_len=seq_len)
    return (*_lines((say(one), one) for one in advised), *outside)


def _lines(advice: Iterable[tuple[str, _Try]]) -> tuple[str, ...]:
    """Each line of advice, and what it is in numbers."""
    said = ((line, f"that is: {one.numbers}" if one.numbers else "") for line, one in advice)
    return tuple(filter(None, chain.from_iterable(said)))


def _tries(architecture: Architecture, seq_len: int, found: tuple[Condition, Condition]) -> Iterator[list[_Try]]:
    """Treatments with this initialisation, then with the paper's."""
    # A sub-layer's size in its normalised input has nothing to do with the embedding; where branches are normalised it
    # is their output's that it is held against.
    fixed = architecture.block in ("pre-ln", "post-ln")
    large = fixed and found[0].value > found[0].limit
    for words, base in (("", architecture), (" --init paper", architecture.with_init("paper"))):
        words = words if differences(architecture, base) else ""
        changes = {f"--embedding {name}": base.with_embedding(name) for name in TREATMENTS}
        tries: list[_Try] = []
        # What is set already goes first, and is not advised again.
        for option, changed in sorted(changes.items(), key=lambda change: differences(base, change[1]) != ""):
            # Outside the domain two treatments of which the same can be said are no more than one.
            if not large and not any(one.holds and one.growth is None for one in tries):
                options = f"{option if differences(base, changed) else ''}{words}".strip()
                tries.append(_judged(changed, seq_len, options, differences(architecture, changed)))
                large = fixed and tries[-1].conditions[0].value > tries[-1].conditions[0].limit
        large = False
        yield tries


def _judged(changed: Architecture, seq_len: int, options: str, numbers: str) -> _Try:
    forward = forward_pass(changed, seq_len)
    found = conditions_of(forward)
    decided = any(condition.value > condition.limit for condition in found) or bool(lasting(changed, seq_len))
    growth = None if decided else backward_pass(forward)
    return _Try(
        options=options,
        numbers=numbers,
        architecture=changed,
        conditions=found,
        share=normalised_share(changed, forward),
        logit_variance=forward.logit_variance,
        growth=growth,
    )


def _promise(one: _Try, growth: Growth) -> str:
    assert one.growth is not None
    if growth.value <= one.growth.value:  # what is mended is something else
        return f"{one.options}: stable, with growth {one.growth.value:.4g}"
    return f"{one.options}: growth {one.growth.value:.4g} instead of {in_words(growth.value)}"


def _half_a_promise(one: _Try) -> str:
    return f"{one.options}: both of the paper's conditions hold then, outside the domain of the predicted growth"


def _what_is_left(nearest: _Try, seq_len: int) -> str:
    """The nearest change with branches so much smaller that what it leaves should hold, judged in turn."""
    a = nearest.architecture
    by = "a residual multiplier: their norms undo what their output matrices do"
    if a.block in ("pre-ln", "post-ln"):
        by = "their output matrices, or a residual multiplier"
    factor, words = _factor(nearest), f"neither --embedding {' or '.join(TREATMENTS)} nor --init paper suffices; "
    if factor > 0:
        smaller = replace(a, residual_multiplier=a.residual_multiplier * factor)
        found = _judged(smaller, seq_len, nearest.options, nearest.numbers)
        besides = f" besides {nearest.options}" if nearest.options else ""
        besides = f"make the sub-layers smaller{besides}: branches times {factor:g} ({by})"
        if found.stable and found.growth is not None:
            return f"{words}{besides} have growth {found.growth.value:.4g}"
        if found.holds:
            return f"{words}{besides} fulfil both of the paper's conditions"
    numbers = (f"{one.name} at {in_words(one.value)} (limit {one.limit:g})" for one in nearest.conditions)
    grown = "" if nearest.growth is None else f", growth {in_words(nearest.growth.value)}"
    nearest_is = nearest.options or "the configuration as it is"
    return f"{words}nearest is {nearest_is}, with {' and '.join(numbers)}{grown}"


def _factor(nearest: _Try) -> float:
    """What branches are to be multiplied by, two digits rounded down; 0 where a number is unknown.

    The conditions are linear in it, and growth^2 - 1 quadratic as far as the closed form goes.
    """
    factors = [condition.limit / condition.value for condition in nearest.conditions if not condition.holds]
    if nearest.growth is not None and nearest.growth.value > GROWTH_LIMIT:
        factors.append(math.sqrt((GROWTH_LIMIT**2 - 1) / (nearest.growth.value**2 - 1)))
    factor = min(factors, default=math.nan)
    if not 0 < factor < math.inf:
        return 0.0
    unit = 10.0 ** (math.floor(math.log10(factor)) - 1)
    return float(f"{math.floor(factor / unit) * unit:.2g}")


def _into_the_domain(architecture: Architecture, seq_len: int, growth: Growth) -> tuple[str, ...]:
    """What takes away that which puts a verdict outside the domain."""
    lines: list[str] = []
    fewer = architecture.vocab_size
    if seq_len > fewer:
        forward = forward_pass(architecture, fewer)
        outcome = outcome_of(backward_pass(forward), conditions_of(forward), normalised_share(architecture, forward))
        lines.append(f"--seq-len {fewer}: no more tokens than the vocabulary has; the verdict is then {outcome}")
    if architecture.n_layers > MAX_LAYERS:
        lines.append(f"--layers {MAX_LAYERS}: the largest depth whose growth is predicted")
    if any(reason.startswith(SHARP_LOGITS) for reason in growth.reasons):
        with_norm = architecture.qk_norm != "none"
        what = "attention scale" if with_norm else "standard deviation of the query and key matrices"
        lines.append(f"{SOFTER} {what}: the prediction needs logits of variance {MAX_LOGIT_VARIANCE:g} at most")
    return tuple(lines)
