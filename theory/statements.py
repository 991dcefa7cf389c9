"""What this project asserts, and how strongly.

A `Statement` is one of three kinds, never mixed:

- `estimate`: what the paper writes with "~". It may be violated.
- `upper`: a true inequality, given what `assumptions` lists. It is tested with `<=` under attack.
- `sharp`: a large-width prediction of the value itself, tested by its relative error against `target`.

Statements compose along the architecture: `residual(attention).then(residual(feedforward)).repeat(24)`.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from importlib import import_module
from pkgutil import iter_modules
from typing import Any, Literal, get_args

import numpy as np

import theory
from theory.names import unknown
from theory.quantities import Quantity
from theory.sources import Source

Kind = Literal["estimate", "upper", "sharp"]

# Modules whose statements make up the catalogue. A file theory/bounds_NAME.py is found without being listed.
STATEMENT_MODULES = (
    "normalisation", "embedding", "random_matrix", "feedforward", "experts", "attention", "attention_variants",
    "attention_simulation", "attention_ensembles", "attention_outliers", "attention_unmasked", "tied",
)  # fmt: skip

# What a mistake in somebody's formula or file raises; a ValueError has its remedy already.
FAULTS = (ArithmeticError, AttributeError, ImportError, LookupError, NameError, RecursionError, SyntaxError, TypeError)


class OutOfRange(ValueError):
    """A formula has no value among floating-point numbers where it was evaluated."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What a sharp statement says at given numbers: None is `unknown`, for the reasons given."""

    value: float | None
    reasons: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Statement:
    """One assertion about one quantity.

    Attributes:
        name: unique, lower case with dashes.
        kind: estimate, upper or sharp.
        quantity: what the formula speaks of.
        formula: a function of named symbols (see `theory.symbols`), for numbers and expressions alike.
        source: where it is from.
        assumptions: what must hold for it to be true, in words.
        why: the proof or the argument in a few lines.
        tight: an upper bound that some input attains; then a bound shrunk by a tenth must be violated.
        target: for `sharp`, the relative error it claims in its domain.
        covers: the variants it speaks of: what a bench of its quantity may choose (a field of
            `Architecture`, a size) and the values for which it holds. For `upper`, what is not named may be
            anything that the bench can build, so that a new variant attacks every bound until it is excluded.
        domain: for `sharp`, the least and the largest value of a symbol for which it claims its target.
        relations: for `sharp`, what must hold between symbols besides: in words, and as a function of symbols.
    """

    name: str
    kind: Kind
    quantity: Quantity
    formula: Callable[..., Any]
    source: Source
    assumptions: tuple[str, ...]
    why: str
    tight: bool = False
    target: float | None = None
    covers: Mapping[str, tuple[Any, ...]] = field(default_factory=dict, hash=False)
    domain: Mapping[str, tuple[float, float]] = field(default_factory=dict, hash=False)
    relations: Mapping[str, Callable[..., bool]] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(f"{self.name}: unknown kind {self.kind!r}; use one of {', '.join(get_args(Kind))}")
        if (self.kind == "sharp") != (self.target is not None):
            raise ValueError(f"{self.name}: a sharp statement, and no other, states its target error; set target=")
        if self.tight and self.kind != "upper":
            raise ValueError(f"{self.name}: only an upper bound can be tight; drop tight=True")

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of the symbols that the formula takes."""
        return tuple(inspect.signature(self.formula).parameters)

    @property
    def expression(self) -> Any:
        """The formula as a sympy expression in the symbols of `theory.symbols`."""
        import sympy as sp

        from theory.symbols import symbol

        return sp.sympify(self._formula({name: symbol(name) for name in self.parameters}))

    def evaluate(self, values: Mapping[str, Any]) -> Any:
        """The formula at numbers or arrays that broadcast.

        Raises:
            ValueError: a symbol has no value, or the formula raises an error.
            OutOfRange: it overflows there.
        """
        missing = [name for name in self.parameters if name not in values]
        if missing:
            raise ValueError(f"{self.name} needs a value for {', '.join(missing)}")
        return self._formula({name: values[name] for name in self.parameters})

    def _formula(self, values: Mapping[str, Any]) -> Any:
        try:
            return self.formula(**values)
        except OverflowError:
            at = ", ".join(f"{name}={value}" for name, value in values.items() if np.ndim(value) == 0)
            where = f"{self.name} leaves the range of floating-point numbers at {at or 'these values'}"
            raise OutOfRange(f"{where}; use less extreme ones") from None
        except FAULTS as error:  # a ValueError is about the values, and says so itself
            place = f"the formula of {self.name} in {_file(self.formula)}"
            raise ValueError(f"{place} raises {_fault(error)}; fix the file") from error

    def outside(self, values: Mapping[str, Any]) -> tuple[str, ...]:
        """Why it does not claim its target at these numbers; empty where it does.

        A symbol of the domain without a value counts as outside: what is not known is not claimed. So does one whose
        value is none that it can have, half a head for example.
        """
        from theory.symbols import SYMBOLS

        needed = dict.fromkeys((*self.domain, *(name for test in self.relations.values() for name in _names(test))))
        reasons = [f"{name} is not given" for name in needed if name not in values]
        wrong = {name for name in needed if name not in values}
        for name, (least, most) in self.domain.items():
            if name in values and not least <= values[name] <= most:
                reasons.append(f"{name}={values[name]:g} is not within {least:g} to {most:g}")
        for name in dict.fromkeys((*self.parameters, *needed)):
            entry = SYMBOLS.get(name)
            if name in values and entry is not None and not entry.admits(values[name]):
                reasons.append(f"{name}={values[name]:g} is not {entry.values}")
                wrong.add(name)
        for words, test in self.relations.items():  # of numbers that mean something
            names = _names(test)
            if wrong.isdisjoint(names) and not test(**{name: values[name] for name in names}):
                reasons.append(f"it does not hold that {words}")
        return tuple(reasons)

    def predict(self, values: Mapping[str, Any]) -> Answer:
        """The value of a sharp statement where it claims its target, else unknown and why.

        Raises:
            ValueError: the statement is not sharp, or a symbol of its formula has no value.

        >>> find("gaussian-opnorm-sharp").predict({"sigma": 1.0, "rows": 8, "columns": 64})
        Answer(value=None, reasons=('rows=8 is not within 64 to inf',))
        """
        if self.kind != "sharp":
            raise ValueError(f"{self.name} is no prediction but of kind {self.kind}; use evaluate")
        reasons = self.outside(values)
        if reasons:
            return Answer(value=None, reasons=reasons)
        try:
            value = as_float(self.evaluate(values))
        except OutOfRange:
            value = math.nan
        finite = math.isfinite(value)
        return Answer(value=value if finite else None, reasons=() if finite else ("it has no finite value here",))

    def then(self, after: Statement) -> Statement:
        """Bound the composition of two maps by the product (sub-multiplicativity)."""
        return _composed(self, after, lambda a, b: a * b, "then")

    def repeat(self, count: int) -> Statement:
        """Bound `count` such maps in a row. For depth profiles and overflow use `theory.stack.log_product`."""
        formula, parameters = self.formula, self.parameters

        def power(**values: Any) -> Any:
            return formula(**values) ** count

        return _derived(self, f"{self.name}^{count}", power, parameters, f"{count} equal maps in a row")


def residual(branch: Statement) -> Statement:
    """Bound |I + J| by 1 + |J| (triangle inequality)."""
    formula = branch.formula

    def shortcut(**values: Any) -> Any:
        return 1 + formula(**values)

    return _derived(branch, f"residual({branch.name})", shortcut, branch.parameters, "triangle inequality")


def _composed(first: Statement, after: Statement, combine: Callable[[Any, Any], Any], word: str) -> Statement:
    parameters = tuple(dict.fromkeys(first.parameters + after.parameters))

    def formula(**values: Any) -> Any:
        own = first.formula(**{name: values[name] for name in first.parameters})
        return combine(own, after.formula(**{name: values[name] for name in after.parameters}))

    merged = _derived(first, f"{first.name} {word} {after.name}", formula, parameters, "sub-multiplicativity")
    kind: Kind = "upper" if first.kind == after.kind == "upper" else "estimate"
    covers = {**after.covers, **first.covers}
    for name in first.covers.keys() & after.covers.keys():
        covers[name] = tuple(value for value in first.covers[name] if value in after.covers[name])
    assumptions = tuple(dict.fromkeys(first.assumptions + after.assumptions))
    return _replace(merged, kind=kind, assumptions=assumptions, covers=covers)


def _derived(
    base: Statement, name: str, formula: Callable[..., Any], parameters: tuple[str, ...], why: str
) -> Statement:
    # A product of sharp norms bounds nothing and predicts nothing: it is an estimate.
    kind: Kind = "upper" if base.kind == "upper" else "estimate"
    signature = inspect.Signature([inspect.Parameter(p, inspect.Parameter.KEYWORD_ONLY) for p in parameters])
    formula.__signature__ = signature  # type: ignore[attr-defined]
    return _replace(base, name=name, kind=kind, formula=formula, why=f"{why}; {base.why}", tight=False, target=None)


def _names(test: Callable[..., bool]) -> tuple[str, ...]:
    return tuple(inspect.signature(test).parameters)


def _replace(statement: Statement, **changes: Any) -> Statement:
    from dataclasses import replace

    return replace(statement, **changes)


_REGISTRY: dict[str, Callable[[], Statement]] = {}


def register(build: Callable[[], Statement]) -> Callable[[], Statement]:
    """Add a statement to the catalogue; the name is the function's, with dashes."""
    name = build.__name__.replace("_", "-")
    if name in _REGISTRY and _REGISTRY[name].__module__ != build.__module__:
        places = f"in {_file(_REGISTRY[name])} and in {_file(build)}"
        raise ValueError(f"two statements are called {name!r}, {places}; rename one of them")
    cached = lru_cache(maxsize=1)(build)
    _REGISTRY[name] = cached
    return cached


def catalogue() -> dict[str, Statement]:
    """Every registered statement by name.

    Raises:
        ValueError: a file theory/bounds_NAME.py cannot be loaded, or a statement's name is not its function's.
    """
    found = sorted(module.name for module in iter_modules(theory.__path__) if module.name.startswith("bounds_"))
    for module in STATEMENT_MODULES:
        import_module(f"theory.{module}")
    for module in found:
        try:
            import_module(f"theory.{module}")
        except FAULTS as error:
            raise ValueError(f"cannot load theory/{module}.py: {_fault(error)}; fix the file") from error
    return {name: _built(name) for name in _REGISTRY}


def _built(name: str) -> Statement:
    """The statement that a function of the registry makes, which has the function's name."""
    build = _REGISTRY[name]
    try:
        statement = build()
    except FAULTS as error:
        raise ValueError(f"{build.__name__} in {_file(build)} raises {_fault(error)}; fix the file") from error
    if statement.name != name:
        taken = _REGISTRY.get(statement.name)
        also = f", a name that {_file(taken)} has already" if taken else ""
        raise ValueError(
            f"{build.__name__} in {_file(build)} states {statement.name!r}{also}; "
            f"give the statement its function's name, {name!r}"
        )
    return statement


def _file(function: Callable[..., Any]) -> str:
    return f"{function.__module__.replace('.', '/')}.py"


def _fault(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def find(name: str) -> Statement:
    """A statement by name.

    Raises:
        ValueError: there is none; the message names close ones.
    """
    statements = catalogue()
    if name not in statements:
        raise ValueError(unknown("statement", name, statements, command="spikecheck statements"))
    return statements[name]


def as_float(value: Any) -> float:
    """A formula's value as a plain float."""
    return float(np.asarray(value, dtype=np.float64))
