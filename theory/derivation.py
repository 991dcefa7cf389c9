"""A derivation: a chain of steps from definitions to a statement, each of which can be checked with random numbers.

A step asserts `left relation right`, both sides sympy expressions. The same expressions are printed, substituted
into one another, and evaluated on random arrays (`theory.derivations_expressions`), so that text, algebra and check
cannot drift apart.

The chains are in `theory.derivations_*`; a new one is one function under `@register_derivation`, its file one name
in `DERIVATION_MODULES`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from importlib import import_module
from typing import Any, Literal

import numpy as np
import sympy as sp  # pyright: ignore[reportMissingTypeStubs]

from theory.derivations_expressions import Values, evaluate
from theory.names import unknown
from theory.sources import Source
from theory.statements import Statement, find, residual

Relation = Literal["=", "<=", "~=", "~", "<~"]
StepKind = Literal["exact", "upper", "sharp", "estimate"]
Format = Literal["text", "markdown", "latex"]
Sampler = Callable[[np.random.Generator], Values]

KINDS: dict[Relation, StepKind] = {"=": "exact", "<=": "upper", "~=": "sharp", "~": "estimate", "<~": "estimate"}
ROUNDING = 1e-9  # of double-precision products of a few hundred terms, with room

# Modules whose functions make up DERIVATIONS; a new file is added here.
DERIVATION_MODULES = (
    "derivations_paper",
    "derivations_gradient",
    "derivations_bounds",
    "derivations_norms",
    "derivations_sublayers",
    "derivations_feedforward",
    "derivations_attention",
    "derivations_attention_variants",
    "derivations_embedding",
    "derivations_tied",
    "derivations_routing",
    "derivations_routed_edge",
    "derivations_logits",
    "derivations_softmax",
    "derivations_masks",
    "derivations_constants",
    "derivations_gaussian",
    "derivations_feedforward_edge",
    "derivations_edges",
    "derivations_gated_squared",
    "derivations_heads_edge",
    "derivations_attention_edge",
    "derivations_attention_simulated",
    "derivations_activation",
    "derivations_heads",
    "derivations_variance",
    "derivations_growth",
    "derivations_conservation",
    "derivations_layouts",
    "derivations_postnorm",
    "derivations_scatter",
    "derivations_own",
    "derivations_head",
    "derivations_shortcut",
)

OWN = Source(key="spikecheck")

_sp: Any = sp  # sympy is untyped


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """Both sides of a step at random numbers (of an array its Frobenius norm), and whether the relation held.

    error: relative difference for `=`, `~=` and `~`; for `<=` and `<~` relative excess of left over right (negative
        if there is none).
    """

    step: str
    left: float
    right: float
    relation: Relation
    error: float
    tolerance: float
    passed: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One line of a derivation.

    Attributes:
        left, right: sympy expressions.
        relation: `=`, `<=` (a true inequality), `~=` (the value itself at large width), `~` (an estimate) or `<~` (an
            estimate of a bound).
        rule: the field's name for what allows the line, such as "chain rule".
        explanation: one sentence.
        sample: draws numbers for both sides; the left side's are computed without the right side's formula.
        tight: draws numbers at which an inequality (nearly) holds with equality, if there are such.
        tolerance: relative; where it is not rounding, `accuracy` states the conditions and the reason.
        proof: an expression or matrix that must be identically zero, where sympy can prove the line.
        uses: the earlier steps whose composition is `right`.
    """

    left: Any
    right: Any
    relation: Relation
    rule: str
    source: Source
    explanation: str
    sample: Sampler
    tight: Sampler | None = None
    tolerance: float = ROUNDING
    accuracy: str = ""
    proof: Callable[[], Any] | None = None
    uses: tuple[Step, ...] = ()

    def __post_init__(self) -> None:
        if self.relation not in KINDS:
            raise ValueError(f"relation={self.relation!r} is not known; use one of {', '.join(KINDS)}")
        if (self.kind in ("sharp", "estimate") or self.tolerance > ROUNDING) != bool(self.accuracy):
            raise ValueError(f"{self.left}: a step that is not exact to rounding, and no other, states its accuracy")

    @property
    def kind(self) -> StepKind:
        """How strong the line is."""
        return KINDS[self.relation]

    @property
    def assertion(self) -> Any:
        """The line as a sympy relation where there is one, else an undefined function named after its kind."""
        if self.relation == "=":
            return _sp.Eq(self.left, self.right, evaluate=False)
        if self.relation == "<=":
            return _sp.Le(self.left, self.right, evaluate=False)
        return _sp.Function(self.kind)(self.left, self.right)

    def check(self, rng: np.random.Generator) -> Check:
        """Compare both sides at random numbers; fails too if the step's proof or composition does not hold."""
        return self._compare(self.sample(rng), proven=_proven(self))

    def check_tight(self, rng: np.random.Generator) -> Check | None:
        """The same where an inequality is nearly an equality; None where no such case is known."""
        return None if self.tight is None else self._compare(self.tight(rng), proven=True)

    def _compare(self, values: Values, *, proven: bool) -> Check:
        from theory.derivations_rendering import formula

        left, right = evaluate(self.left, values), evaluate(self.right, values)
        size_left, size_right = float(np.linalg.norm(left)), float(np.linalg.norm(right))
        if self.relation in ("<=", "<~"):
            error = (size_left - size_right) / max(size_right, 1e-300)
        else:
            # A side that is exactly zero is compared on the scale of 1, the size of the sampled entries.
            scale = size_right if min(size_left, size_right) > 0 else 1.0
            error = float(np.linalg.norm(np.subtract(left, right))) / scale
        return Check(
            step=formula(self, "text"),
            left=size_left,
            right=size_right,
            relation=self.relation,
            error=error,
            tolerance=self.tolerance,
            passed=bool(proven and error <= self.tolerance),
        )


def line(
    left: Any,
    relation: Relation,
    right: Any,
    rule: str,
    explanation: str,
    *,
    sample: Sampler,
    source: Source = OWN,
    **more: Any,
) -> Step:
    """A step in the order in which it reads; `more` is tight, tolerance, accuracy and proof."""
    return Step(
        left=left, right=right, relation=relation, rule=rule, source=source, explanation=explanation, sample=sample,
        **more,
    )  # fmt: skip


@cache
def _proven(step: Step) -> bool:
    """Whether the step's composition and its proof hold, as far as it has them."""
    composed = not step.uses or _sp.simplify(compose(*step.uses) - step.right) == 0
    return composed and (step.proof is None or _is_zero(step.proof()))


def compose(first: Step, *others: Step) -> Any:
    """Substitute each step's right side for its left side, in order, into the first step's right side.

    Raises:
        ValueError: an inequality is put where the expression does not increase in it, or nowhere at all.
    """
    expression = first.right
    for step in others:
        dummy = _sp.Dummy(positive=True) if step.left.is_commutative else _sp.Dummy(commutative=False)
        opened = expression.subs(step.left, dummy)
        if dummy not in opened.free_symbols:
            raise ValueError(f"{step.left} does not occur in {expression}; the step cannot be substituted there")
        if step.relation in ("<=", "<~") and not _sp.diff(opened, dummy).is_nonnegative:
            raise ValueError(f"{expression} is not increasing in {step.left}; the inequality cannot be substituted")
        expression = opened.subs(dummy, step.right)
    return expression


def substitution(
    *uses: Step,
    source: Source,
    explanation: str,
    sample: Sampler,
    tight: Sampler | None = None,
    tolerance: float = ROUNDING,
    accuracy: str = "",
    simplify: Callable[[Any], Any] = lambda expression: expression,
) -> Step:
    """The step that follows from composing others; its relation is the weakest of theirs."""
    relations = {step.relation for step in uses}
    bounded = bool(relations & {"<=", "<~"})
    estimated = bool(relations & {"~", "<~"}) or (bounded and "~=" in relations)
    value: Relation = "~=" if "~=" in relations else "="
    relation: Relation = ("<~" if bounded else "~") if estimated else ("<=" if bounded else value)
    return Step(
        left=uses[0].left,
        right=simplify(compose(*uses)),
        relation=relation,
        rule="substitution",
        source=source,
        explanation=explanation,
        sample=sample,
        tight=tight,
        tolerance=tolerance,
        accuracy=accuracy,
        uses=uses,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Derivation:
    """A chain of steps.

    Attributes:
        statement: name of the statement it arrives at; empty if the catalogue has none.
        shortcut: it arrives at `residual(statement)`, the half-layer with its shortcut.
        assumptions: what the chain needs beyond its lines.
        family: the same chain for other statements, by the same name: the same lines, each sampled and concluded for
            its statement.
    """

    name: str
    title: str
    steps: tuple[Step, ...]
    statement: str = ""
    shortcut: bool = False
    assumptions: tuple[str, ...] = ()
    family: tuple[Derivation, ...] = ()

    @property
    def kind(self) -> StepKind:
        """The weakest kind among the steps; a bound put together with a sharp value is an estimate."""
        kinds = {step.kind for step in self.steps}
        if {"upper", "sharp"} <= kinds:
            return "estimate"
        return next(kind for kind in ("estimate", "sharp", "upper", "exact") if kind in kinds)

    @property
    def conclusion(self) -> Step:
        """The last step."""
        return self.steps[-1]

    @property
    def target(self) -> Statement | None:
        """The statement it arrives at, with its shortcut if the chain has one."""
        if not self.statement:
            return None
        return residual(find(self.statement)) if self.shortcut else find(self.statement)

    def arrives(self) -> bool:
        """Whether the last line's right side is the statement's expression, by sympy."""
        target = self.target
        return target is None or equal(self.conclusion.right, target.expression)

    def verify(self, rng: np.random.Generator) -> list[Check]:
        """Check every step at random numbers, and at a tight case where one is known.

        Steps that name the same sampler are checked at the same draw.
        """
        draws: dict[Sampler, Values] = {}

        def drawn(rng: np.random.Generator, sample: Sampler) -> Values:
            if sample not in draws:
                draws[sample] = sample(rng)
            return draws[sample]

        results: list[Check] = []
        for step in self.steps:
            shared = replace(
                step,
                sample=partial(drawn, sample=step.sample),
                tight=step.tight and partial(drawn, sample=step.tight),
                proof=None,
                uses=(),
            )
            found = shared.check(rng)
            results.append(found if _proven(step) else replace(found, passed=False))
            tight = shared.check_tight(rng)
            if tight is not None:
                results.append(tight)
        return results


def equal(left: Any, right: Any) -> bool:
    """Whether two expressions are the same; functions without a formula are compared by name."""
    return bool(_sp.simplify(known_functions(left) - known_functions(right)) == 0)


def known_functions(expression: Any) -> Any:
    """The expression with functions of the same name made one: a statement's carry their numeric code with them."""
    found: Any
    for found in expression.atoms(_sp.core.function.AppliedUndef):
        name = str(found.func)
        named = _sp.harmonic if name == "harmonic_number" else _sp.Function(name)
        expression = expression.xreplace({found: named(*found.args)})
    return expression


def _is_zero(expression: Any) -> bool:
    parts = list(expression) if hasattr(expression, "shape") else [expression]
    return all(_sp.simplify(part) == 0 for part in parts)


Builder = Callable[[], Derivation]
_REGISTRY: dict[str, Builder] = {}


class _Derivations(Mapping[str, Builder]):
    """Every derivation's builder by name; the chains are imported on first use."""

    def __getitem__(self, name: str) -> Builder:
        _load()
        return _REGISTRY[name]

    def __iter__(self) -> Iterator[str]:
        _load()
        # In the order of the files, whichever happened to be imported first; files of others come last.
        order = {f"theory.{module}": place for place, module in enumerate(DERIVATION_MODULES)}
        return iter(sorted(_REGISTRY, key=lambda name: order.get(_REGISTRY[name].__module__, len(order))))

    def __len__(self) -> int:
        _load()
        return len(_REGISTRY)


DERIVATIONS: Mapping[str, Builder] = _Derivations()


def _load() -> None:
    for module in DERIVATION_MODULES:
        import_module(f"theory.{module}")


def register_derivation(build: Builder) -> Builder:
    """Add a derivation to `DERIVATIONS`; the name is the function's, with dashes."""
    name = build.__name__.replace("_", "-")
    if name in _REGISTRY and _REGISTRY[name].__module__ != build.__module__:
        raise ValueError(f"two derivations are called {name!r}; rename one of them")
    cached = cache(build)
    _REGISTRY[name] = cached
    return cached


def derivation(name: str) -> Derivation:
    """A derivation by name.

    Raises:
        ValueError: there is none; the message names close ones.
    """
    if name not in DERIVATIONS:
        raise ValueError(unknown("derivation", name, DERIVATIONS, command="spikecheck derive"))
    return DERIVATIONS[name]()


def render(chain: Derivation, format: Format = "text") -> str:
    """The derivation as `text`, `markdown` (formulas between dollars) or `latex` (a fragment for amsmath, amssymb
    and graphicx).

    Raises:
        ValueError: the format is not known.
    """
    from theory.derivations_rendering import RENDERERS

    if format not in RENDERERS:
        raise ValueError(f"unknown format {format!r}; use one of {', '.join(RENDERERS)}")
    return RENDERERS[format](chain)
