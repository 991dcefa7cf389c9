"""What the public functions of the theory require of numbers, and one line that says so."""

from __future__ import annotations

import operator
from typing import Any

from theory.architecture import Architecture
from theory.words import brief


def require_architecture(architecture: Any) -> None:
    """Refuse what is no `Architecture`, a preset's name for one.

    Raises:
        ValueError: it is none.
    """
    if not isinstance(architecture, Architecture):
        remedy = "use theory.preset(NAME), or parse_config of a configuration"
        raise ValueError(f"architecture={brief(architecture)} is not an Architecture; {remedy}")


def require_tokens(n_tokens: Any, architecture: Architecture | None = None) -> int:
    """A sequence length as an int: at least 1, and within the positions that an architecture has learned.

    Raises:
        ValueError: it is not, or the architecture is none.
    """
    if architecture is not None:
        require_architecture(architecture)
    try:
        count = operator.index(n_tokens)
    except TypeError:
        raise ValueError(f"n_tokens={n_tokens!r} is not a whole number; use for example 1024") from None
    if count < 1:
        raise ValueError(f"n_tokens={count} leaves no token; use at least 1")
    if architecture is not None and architecture.positions == "learned" and count > architecture.context:
        raise ValueError(
            f"n_tokens={count} exceeds the {architecture.context} learned positions of {architecture.name}; "
            "use fewer tokens or a larger context"
        )
    return count


def require_failure(failure: Any) -> float:
    """A probability of failure, strictly between 0 and 1.

    Raises:
        ValueError: it is not.
    """
    if not (isinstance(failure, int | float) and 0 < failure < 1):
        raise ValueError(f"failure={failure!r} is not a probability between 0 and 1; use for example 1e-6")
    return float(failure)


def require_sizes(**sizes: Any) -> tuple[float, ...]:
    """Widths by name, in their order: each at least 1.

    Raises:
        ValueError: one is not.
    """
    for name, size in sizes.items():
        if not size >= 1:
            raise ValueError(f"{name}={size} is no width; use at least 1")
    return tuple(sizes.values())
