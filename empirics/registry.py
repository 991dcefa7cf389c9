"""The probes by name: each measures one `Quantity` on a model and a batch.

A new probe is one function from a `Subject` to a `Reading`, decorated with `probe`, in one of `MODULES`; if its
quantity is new too, that is an entry in `theory.quantities`, or a `Quantity` made on the spot.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from theory.names import unknown
from theory.quantities import Quantity, quantity
from theory.records import Measurement

if TYPE_CHECKING:
    from empirics.spectral import NormEstimate
    from empirics.subject import Subject

MODULES = ("stream_probes", "attention_probes", "jacobian_probes", "bounds", "weight_probes")

Kind = Literal["exact", "estimate", "lower estimate"]
Cost = Literal["cheap", "dear"]
Measure = TypeVar("Measure", bound="Callable[[Subject], Reading]")


class Unavailable(ValueError):
    """The model or the batch has nothing that the probe could measure; the message says why."""


def reason(error: Exception) -> str:
    """An error in a line; by its kind unless it is one of our own."""
    text = str(error).splitlines()[0] if str(error) else ""
    return text if isinstance(error, Unavailable) else f"{type(error).__name__}: {text}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading(Measurement):
    """What one probe found on one model.

    Attributes:
        labels: of the values, in their order.
        residuals: of lower estimates: some singular value is that near, relative to the value.
        likely_upper: of lower estimates: what the norm is at most, but for one random start in a hundred.
        standard_errors: of statistics of entries, if these were independent.
        entries: of statistics of entries, of how many each is.
    """

    labels: tuple[str, ...]
    residuals: tuple[float, ...] | None = None
    likely_upper: tuple[float, ...] | None = None
    standard_errors: tuple[float, ...] | None = None
    entries: tuple[int, ...] | None = None

    @property
    def sureness(self) -> dict[str, tuple[float, ...]]:
        """What says how sure the values are, by name: of the fields above those that it has."""
        names = ("residuals", "likely_upper", "standard_errors", "entries")
        return {name: found for name in names if (found := getattr(self, name)) is not None}


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """How one quantity is measured.

    Attributes:
        kind: `exact` up to rounding; an `estimate`, by fewer entries than there are; or a `lower estimate`, which can
            only be too small.
        of: what of the batch, or of the weights, it is taken of.
        cost: `cheap` ones are measured at every probed step of a training unless told otherwise; `dear` ones on
            request, before the first step and after the last.
        in_training: it looks at a step, so that a model by itself has no such thing.
        measure: the function.
        about: what its docstring adds to the quantity's meaning.
    """

    quantity: Quantity
    kind: Kind
    of: str
    cost: Cost
    in_training: bool
    measure: Callable[[Subject], Reading]
    about: str

    @property
    def name(self) -> str:
        return self.quantity.name


_PROBES: dict[str, Probe] = {}


def probe(
    what: str | Quantity, *, of: str, cost: Cost, kind: Kind = "exact", in_training: bool = False
) -> Callable[[Measure], Measure]:
    """Register a function as the probe of a quantity.

    Raises:
        ValueError: the quantity has a probe already, or is not known.
    """
    found = quantity(what) if isinstance(what, str) else what
    if found.name in _PROBES:
        raise ValueError(f"{found.name} has a probe already; give the quantity another name")

    def register(function: Measure) -> Measure:
        about = " ".join((function.__doc__ or "").split())
        _PROBES[found.name] = Probe(
            quantity=found, kind=kind, of=of, cost=cost, in_training=in_training, measure=function, about=about
        )
        return function

    return register


def probes() -> Mapping[str, Probe]:
    """Every probe, by the name of its quantity: in the order of the modules, whichever was imported first."""
    places = {import_module(f"empirics.{module}").__name__: place for place, module in enumerate(MODULES)}
    return dict(sorted(_PROBES.items(), key=lambda item: places.get(item[1].measure.__module__, len(places))))


def find(name: str) -> Probe:
    """The probe of that name.

    Raises:
        ValueError: there is none.
    """
    known = probes()
    if name not in known:
        raise ValueError(unknown("probe", name, known))
    return known[name]


def schedule(text: Any, every: int) -> dict[str, int | None]:
    """Which probes a training takes, and every how many steps; None for before the first and after the last.

    Args:
        text: `none`, or names separated by commas; `default` stands for the cheap ones. `NAME@N` measures every N
            steps, also a dear one.
        every: steps between probes that name no number of their own.

    Raises:
        ValueError: a name or a number is not one.
    """
    if not isinstance(text, str):
        raise ValueError(f"probes={text!r} is no text; write for example 'default,stack_jacobian@100'")
    if text.strip() == "none":
        return {}
    known = probes()
    wanted: dict[str, int | None] = {}
    for part in text.split(","):
        name, at, number = part.strip().partition("@")
        if at and not (number.isdecimal() and int(number) > 0):
            raise ValueError(f"probe {part.strip()!r} names no number of steps; write for example {name}@100")
        if name == "default":
            names = [probe.name for probe in known.values() if probe.cost == "cheap"]
        elif name == "none":
            raise ValueError("none goes with no other probe; use it alone, or drop it")
        else:
            names = [find(name).name]
        for one in names:
            wanted[one] = int(number) if at else None if known[one].cost == "dear" else every
    return wanted


def reading(
    name: str,
    labels: Sequence[str],
    values: Sequence[float],
    *,
    standard_errors: Sequence[float] | None = None,
    entries: Sequence[int] | None = None,
) -> Reading:
    """Values of a quantity that are no lower estimates."""
    if len(labels) != len(values):
        raise AssertionError(f"{name}: {len(labels)} labels of {len(values)} values")
    return Reading(
        quantity=name,
        labels=tuple(labels),
        values=tuple(float(value) for value in values),
        seeds=(),
        log_sd=None,
        lower_estimate=False,
        standard_errors=None if standard_errors is None else tuple(standard_errors),
        entries=None if entries is None else tuple(entries),
    )


def described(name: str, statistic: str, labels: Sequence[str], found: Sequence[Mapping[str, Any]]) -> Reading:
    """One statistic of the distributions that `probes.distribution` describes, with its standard errors."""
    errors = [item["standard_errors"][statistic] for item in found]
    entries = [item["entries" if statistic == "normal_distance" else "size"] for item in found]
    return reading(name, labels, [item[statistic] for item in found], standard_errors=errors, entries=entries)


def estimated(name: str, labels: Sequence[str], estimates: Sequence[NormEstimate]) -> Reading:
    """Lower estimates of spectral norms, with what they say of themselves."""
    return Reading(
        quantity=name,
        labels=tuple(labels),
        values=tuple(estimate.value for estimate in estimates),
        seeds=(),
        log_sd=None,
        lower_estimate=True,
        residuals=tuple(estimate.residual for estimate in estimates),
        likely_upper=tuple(estimate.likely_upper for estimate in estimates),
    )
