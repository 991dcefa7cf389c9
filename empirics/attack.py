"""Try to break every upper bound: by chance, by structure, and by climbing the ratio of truth to bound.

One evaluation is one explicit float64 Jacobian with its largest singular value, from automatic differentiation,
and one evaluation of the bound. They share no code. Comparisons allow the rounding of float64 and nothing else.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from random import Random
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from empirics.adversaries import STYLES, Style, normal
from empirics.benches import Bench, Case, Choices, find_bench
from theory.activations import lipschitz
from theory.statements import Statement, catalogue

# Relative rounding of a float64 Jacobian of a few dozen terms (64 of them at 2.2e-16), with much room; the
# cancellations that go beyond it are the bench's own `rounding`.
RELATIVE = 1e-9

DEFAULT_BUDGET = 200
SHARES: dict[Style, float] = {"plain": 0.1, "wild": 0.3, "structured": 0.2}  # of the budget; the rest climbs
STEPS = 40  # evaluations of one climb
RATE = 0.1  # its first step, relative to the root mean square of each tensor
# At a ratio of 1 a true bound's ratio is flat: no climb starts there, and one that stays there is over.
ATTAINED, PATIENCE = 0.999, 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """One evaluation: the values of a bound's symbols, the true norm, and that norm's absolute rounding error."""

    values: Mapping[str, Any]
    norm: Tensor
    rounding: float = 0.0

    @property
    def truth(self) -> float:
        return self.norm.item()

    @property
    def numbers(self) -> dict[str, Any]:
        """The values without their gradients."""
        return {name: value.item() if isinstance(value, Tensor) else value for name, value in self.values.items()}

    def ratio(self, bound: float) -> float:
        """Truth over bound, the truth less its rounding.

        The largest double where the bound is zero and the truth is not, or where either is not a number.
        """
        certain = max(0.0, self.truth - self.rounding)
        if math.isnan(bound) or math.isnan(self.truth) or (certain > 0 and bound <= 0):
            return sys.float_info.max
        return 0.0 if certain == 0 else min(certain / bound, sys.float_info.max)

    def violates(self, bound: float) -> bool:
        """Whether the truth is above the bound by more than rounding."""
        return self.ratio(bound) > 1 + RELATIVE


def observe(statement: Statement, module: nn.Module, x: Tensor, **choices: Any) -> Observation:
    """Evaluate a module on an input; `choices` as its bench would have made them."""
    bench = find_bench(statement.quantity.name)
    values = symbols(statement, bench, module, x, choices)
    norm = bench.truth(module, x)
    with torch.no_grad():
        return Observation(values=values, norm=norm, rounding=bench.rounding(module, x))


def symbols(statement: Statement, bench: Bench, module: nn.Module, x: Tensor, choices: Choices) -> dict[str, Any]:
    """Every symbol that the statement needs, as a number or as a tensor that carries gradients.

    Raises:
        ValueError: the bench cannot supply one; the message says which function to write, and where.
    """
    values = dict(choices)
    if "activation" in choices:
        values["lipschitz"] = lipschitz(choices["activation"])
    if "d_model" in choices:
        values["d"] = choices["d_model"]
    for names, observer in bench.symbols.items():
        if not set(names).isdisjoint(statement.parameters):
            values |= observer(module, x)
    missing = [name for name in statement.parameters if name not in values]
    if not missing:
        return {name: values[name] for name in statement.parameters}
    names = ", ".join(missing)
    if set(missing) <= {name for observed in bench.symbols for name in observed}:
        raise ValueError(
            f"{statement.name}: there is no {names} on the bench of {bench.quantity} at {dict(choices)}; "
            "name the variants that the statement speaks of in its covers"
        )
    raise ValueError(
        f"{statement.name}: nothing observes {names} for {bench.quantity}; write a function (module, input) -> "
        f"{{{missing[0]!r}: value}} in empirics/observables.py and add it to the symbols of that quantity's Bench"
    )


def bound_of(statement: Statement, observation: Observation) -> float:
    """The bound as a number, by the same path as everywhere else."""
    return float(statement.evaluate(observation.numbers))


def evaluate(statement: Statement, case: Case) -> tuple[Observation, float]:
    """One evaluation of a case, and the bound."""
    observation = observe(statement, *case.fitted(), **case.choices)
    return observation, bound_of(statement, observation)


def climb(statement: Statement, start: Case, random: Random) -> Iterator[tuple[Case, Observation, float]]:
    """Ascend log(truth / bound) over the weights and the input, from near a case; every step is one evaluation.

    Tensors move relative to their own size. A step that leaves no gradient ends the climb.
    """
    noise = 10 ** random.uniform(-3, -1)
    scales = {name: tensor.square().mean().sqrt().item() or 1.0 for name, tensor in start.tensors.items()}
    moving = {
        name: (tensor / scales[name] + noise * normal(random.getrandbits(31), *tensor.shape)).requires_grad_()
        for name, tensor in start.tensors.items()
    }
    optimiser = torch.optim.Adam(moving.values(), lr=RATE, maximize=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, STEPS, eta_min=RATE / 10)
    for _ in range(STEPS):
        case = replace(start, tensors={name: tensor * scales[name] for name, tensor in moving.items()})
        module, x = case.fitted()
        if not case.bench.defined(module, x):
            return
        observation = observe(statement, module, x, **case.choices)
        still = replace(case, tensors={name: tensor.detach() for name, tensor in case.tensors.items()})
        yield still, observation, bound_of(statement, observation)
        bound = torch.as_tensor(statement.evaluate(observation.values), dtype=torch.float64)
        height = observation.norm.log() - bound.log()
        if not (height.requires_grad and bool(height.isfinite())):
            return
        optimiser.zero_grad()
        height.backward()
        for tensor in moving.values():
            if tensor.grad is not None:
                tensor.grad.nan_to_num_(0.0, 0.0, 0.0)  # at a kink; the other directions go on
        optimiser.step()
        schedule.step()


class _Search:
    """What an attack has found so far."""

    def __init__(self, statement: Statement, shrink: float) -> None:
        self.statement, self.shrink = statement, shrink
        self.several = find_bench(statement.quantity.name).several
        self.worst_several = 0.0
        self.evaluations = self.violations = 0
        self.worst: tuple[float, Case] | None = None
        self.drawn: list[tuple[float, Case]] = []
        self.ratios: dict[Style, list[float]] = {style: [] for style in STYLES}

    def add(self, case: Case, observation: Observation, bound: float) -> float:
        """Count an evaluation; its ratio."""
        ratio = observation.ratio(self.shrink * bound)
        self.evaluations += 1
        self.violations += observation.violates(self.shrink * bound)
        if self.worst is None or ratio > self.worst[0]:
            self.worst = ratio, case
        if self.several is not None and ratio > self.worst_several and self.several(*case.fitted()):
            self.worst_several = ratio
        return ratio

    def draw(self, bench: Bench, random: Random, style: Style) -> None:
        """Evaluate a case by chance."""
        case = bench.draw(random, style, self.statement.covers)
        ratio = self.add(case, *evaluate(self.statement, case))
        self.drawn.append((ratio, case))
        if ratio > 0:
            self.ratios[style].append(ratio)

    def start(self, random: Random) -> Case:
        """A case to climb from, more often one with a large ratio."""
        below = [found for found in self.drawn if found[0] < ATTAINED] or self.drawn
        below.sort(key=lambda found: -found[0])
        return below[int(len(below) * random.random() ** 2)][1]


def attack(
    statement: Statement,
    *,
    budget: int = DEFAULT_BUDGET,
    seed: int = 0,
    shrink: float = 1.0,
    on_evaluation: Callable[[], object] = lambda: None,
) -> dict[str, Any]:
    """Attack one bound with `budget` evaluations, and say what was found.

    Args:
        shrink: factor on the bound; below 1 it must be violated if the bound is tight.

    Returns:
        JSON-ready: `worst_ratio` is the largest ratio of truth to bound with its `witness`; `tightness` has the
        median, best (largest) and worst (smallest) ratio over the random cases whose truth is not zero, `plain`
        the median over those drawn like an initialisation, and `several` the largest of all evaluations with
        several tokens that matter to each other, None where the quantity is of one token at a time.

    Raises:
        ValueError: the statement is not an upper bound, or no bench serves it; the message says what to do.
    """
    require_upper(statement)
    bench, random = find_bench(statement.quantity.name), Random(f"{seed} {statement.name}")
    search = _Search(statement, shrink)
    shares: dict[Style, float] = {"plain": 1.0} if bench.lawful else SHARES
    for style, share in shares.items():
        for _ in range(math.ceil(share * budget)):
            if search.evaluations < budget:
                search.draw(bench, random, style)
                on_evaluation()
    while search.evaluations < budget:
        before, flat = search.evaluations, 0
        for case, observation, bound in climb(statement, search.start(random), random):
            ratio = search.add(case, observation, bound)
            on_evaluation()
            flat = flat + 1 if ATTAINED <= ratio <= 1 + RELATIVE else 0
            if search.evaluations == budget or flat == PATIENCE:
                break
        if search.evaluations == before:  # no value next to that start
            search.draw(bench, random, "wild")
            on_evaluation()
    assert search.worst is not None
    worst, witness = search.worst
    drawn = search.ratios["plain"] + search.ratios["wild"]
    tightness = {
        "cases": len(drawn),
        "median": median(drawn or [0.0]),
        "best": max(drawn, default=0.0),
        "worst": min(drawn, default=0.0),
        "plain": median(search.ratios["plain"] or [0.0]),
        "several": None if bench.several is None else search.worst_several,
    }
    return {
        "name": statement.name,
        "kind": statement.kind,
        "quantity": statement.quantity.name,
        "tight": statement.tight,
        "budget": budget,
        "seed": seed,
        "shrink": shrink,
        "evaluations": search.evaluations,
        "violations": search.violations,
        "worst_ratio": worst,
        "tightness": tightness,
        "witness": witness.witness(),
    }


def require_upper(statement: Statement) -> None:
    """Refuse what is not an inequality.

    Raises:
        ValueError: it is an estimate or a sharp value.
    """
    if statement.kind != "upper":
        raise ValueError(
            f"{statement.name} is of kind {statement.kind}, and only an upper bound can be violated; "
            "run `python -m empirics attack --list` to list them"
        )


def upper_statements() -> dict[str, Statement]:
    """Every upper bound of the catalogue by name."""
    return {name: statement for name, statement in catalogue().items() if statement.kind == "upper"}
