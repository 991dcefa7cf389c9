"""Elementary functions that act on numbers, arrays, sympy expressions and differentiable tensors alike.

A statement's formula is one Python function. Called with sympy symbols it *is* the symbolic expression;
called with numbers or arrays it is the evaluation; called with tensors that carry gradients it can be
differentiated, which is how an attack climbs towards a violation. So they cannot drift apart, and evaluating
a formula imports neither sympy nor a tensor library: a tensor is what has `requires_grad`, and brings its methods.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

_LARGEST_EXPONENT = 700.0  # exp of it is near the largest double


def is_symbolic(*values: Any) -> bool:
    """Whether any value is a sympy expression (numbers and arrays have no free symbols)."""
    return any(hasattr(value, "free_symbols") for value in values)


def is_tensor(value: Any) -> bool:
    """Whether the value is a tensor of a library for automatic differentiation."""
    return hasattr(value, "requires_grad")


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
    return value.sqrt() if is_tensor(value) else _dispatch("sqrt", np.sqrt, value)


def exp(value: Any, factor: Any = 1) -> Any:
    """factor e^value; infinite, without a warning, beyond the range of doubles (an infinite bound is still one).

    >>> float(exp(1000.0))
    inf
    >>> float(exp(709.0, 20.0))
    inf
    """

    if is_tensor(value):
        # Kept finite: the slope of an infinite term that a minimum discards would be 0 * inf.
        return value.clamp(max=_LARGEST_EXPONENT).exp() * factor
    if is_symbolic(value, factor):
        return _dispatch("exp", np.exp, value) * factor
    with np.errstate(over="ignore"):
        return np.exp(value) * factor


def log(value: Any) -> Any:
    return value.log() if is_tensor(value) else _dispatch("log", np.log, value)


def maximum(left: Any, right: Any) -> Any:
    if is_tensor(left) or is_tensor(right):
        return left.clamp(min=right) if is_tensor(left) else right.clamp(min=left)
    return _dispatch("Max", np.maximum, left, right)


def minimum(left: Any, right: Any) -> Any:
    if is_tensor(left) or is_tensor(right):
        return left.clamp(max=right) if is_tensor(left) else right.clamp(max=left)
    return _dispatch("Min", np.minimum, left, right)


def opaque(name: str, numeric: Callable[..., Any], *values: Any) -> Any:
    """A function with no elementary form: evaluated for numbers, an undefined function `name` for symbols.

    Of a tensor it takes the number: its own slope is left out of a gradient, never out of a value.
    """
    values = tuple(value.item() if is_tensor(value) else value for value in values)
    if is_symbolic(*values):
        from sympy.utilities.lambdify import implemented_function

        return implemented_function(name, numeric)(*values)
    return numeric(*values)
