"""Elementary functions that act on numbers, arrays and sympy expressions alike.

A statement's formula is one Python function. Called with sympy symbols it *is* the symbolic expression;
called with numbers or arrays it is the evaluation. So the two cannot drift apart, and evaluating a
formula does not import sympy.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np


def is_symbolic(*values: Any) -> bool:
    """Whether any value is a sympy expression (numbers and arrays have no free symbols)."""
    return any(hasattr(value, "free_symbols") for value in values)


def _dispatch(name: str, numeric: Callable[..., Any], *values: Any) -> Any:
    if is_symbolic(*values):
        import sympy as sp

        return getattr(sp, name)(*values)
    return numeric(*values)


def sqrt(value: Any) -> Any:
    """Square root; `sqrt(2)` of a plain integer stays a float outside an expression.

    >>> float(sqrt(4))
    2.0
    """
    return _dispatch("sqrt", np.sqrt, value)


def exp(value: Any) -> Any:
    """Exponential; infinite, without a warning, beyond the range of doubles (an infinite bound is still one).

    >>> float(exp(1000.0))
    inf
    """

    def numeric(value: Any) -> Any:
        with np.errstate(over="ignore"):
            return np.exp(value)

    return _dispatch("exp", numeric, value)


def log(value: Any) -> Any:
    return _dispatch("log", np.log, value)


def maximum(left: Any, right: Any) -> Any:
    return _dispatch("Max", np.maximum, left, right)


def minimum(left: Any, right: Any) -> Any:
    return _dispatch("Min", np.minimum, left, right)


def opaque(name: str, numeric: Callable[..., Any], *values: Any) -> Any:
    """A function with no elementary form: evaluated for numbers, an undefined function `name` for symbols."""
    if is_symbolic(*values):
        from sympy.utilities.lambdify import implemented_function

        return implemented_function(name, numeric)(*values)
    return numeric(*values)
