"""Gated squared ReLU at initialisation: the largest of a layer's units, its row along the input, and the mean norm."""

from __future__ import annotations

from typing import Any

import numpy as np
import sympy as sp  # pyright: ignore[reportMissingTypeStubs]

from theory.derivation import Derivation, line, register_derivation
from theory.derivations_expressions import Values, array, entry
from theory.derivations_numeric import Array, Rng, column_jacobian, layer_norm, opnorm, relu
from theory.sources import Source
from theory.statements import find
from theory.symbols import symbol

_sp: Any = sp

OWN = Source(key="spikecheck", label="calculus")
FREE = Source(key="pennington2017resurrecting", label="free multiplicative convolution")
WIDTH, UNITS, DRAWS, LAW = 64, 256, 400, 20_000

d, d_ffn = symbol("d"), symbol("d_ffn")
sigma_1, sigma_2, sigma_3 = symbol("sigma_1"), symbol("sigma_2"), symbol("sigma_3")
u, W_1, W_2, W_3 = array("u"), array("W_1"), array("W_2"), array("W_3")
_J_u = array("J_u", "J_u")
_slopes = array("diag(2 relu(z_1) z_3)", r"\mathrm{diag}(2 \, \mathrm{relu}(z_1) z_3)")
_values = array("diag(relu(z_1)^2)", r"\mathrm{diag}(\mathrm{relu}(z_1)^2)")
_column = array("relu(z_1)^2 z_3", r"\mathrm{relu}(z_1)^2 z_3")
_z_1, _z_3 = entry("z_1i", "z_{1i}"), entry("z_3i", "z_{3i}")
_row = entry("mean r_i^2", r"\overline{r_i^2}")
_mean_norm = entry("E|J_u|", r"\mathbb{E} \| J_u \|")


def _exact(rng: Rng) -> Values:
    """A small layer and its input."""
    first, third = rng.normal(0, 1, (2, 12, 5))
    second, point = rng.normal(0, 1, (5, 12)), rng.normal(0, 1, (5, 1))
    z_1, z_3 = first @ point, third @ point
    return {
        **{W_1: first, W_2: second, W_3: third, u: point, _column: relu(z_1) ** 2 * z_3},
        **{_slopes: np.diag((2 * relu(z_1) * z_3)[:, 0]), _values: np.diag((relu(z_1) ** 2)[:, 0])},
        _J_u: column_jacobian(lambda x: second @ (relu(first @ x) ** 2 * (third @ x)), point),
    }


def _one_row(rng: Rng) -> Values:
    """A long row at given z_1 > 0 and z_3."""
    std_1, std_3, z_1, z_3 = 0.3, 0.5, abs(float(rng.normal())) + 0.1, abs(float(rng.normal()))
    row = 2 * z_1 * z_3 * rng.normal(0, std_1, 2**16) + z_1**2 * rng.normal(0, std_3, 2**16)
    return {sigma_1: std_1, sigma_3: std_3, _z_1: z_1, _z_3: z_3, _row: float(np.mean(row**2))}


def _size(z_1: Array, z_3: Array) -> Array:
    """Root of the largest unit's square and of the row along u, at pre-activations of variance 1, (..., units)."""
    p = relu(z_1)
    steepest = np.max(4 * p**2 * z_3**2 + p**4, axis=-1)
    return np.sqrt(steepest + 9 * np.sum(p**4 * z_3**2, axis=-1) / WIDTH)


def _mean(rng: Rng) -> Values:
    """Mean norm of real layers, known better by what the largest units' sizes are in each and on average.

    A draw varies by a quarter, most of it with `_size`, whose mean many draws of pre-activations give.
    """
    std_1, std_2, std_3 = 0.9 * WIDTH**-0.5, 0.2, 1.1 * WIDTH**-0.5
    norms, sizes = list[float](), list[float]()
    for _ in range(DRAWS):
        point = layer_norm(rng.normal(0, 1, (WIDTH, 1)))
        first, third = rng.normal(0, std_1, (UNITS, WIDTH)), rng.normal(0, std_3, (UNITS, WIDTH))
        z_1, z_3, second = first @ point, third @ point, rng.normal(0, std_2, (WIDTH, UNITS))
        norms.append(opnorm(second @ (2 * relu(z_1) * z_3 * first + relu(z_1) ** 2 * third)))
        sizes.append(float(_size(z_1[:, 0] / 0.9, z_3[:, 0] / 1.1)))
    expected = float(np.mean(_size(*rng.normal(0, 1, (2, LAW, UNITS)))))
    return {
        **{d: WIDTH, d_ffn: UNITS, sigma_1: std_1, sigma_2: std_2, sigma_3: std_3},
        _mean_norm: float(np.mean(norms)) * expected / float(np.mean(sizes)),
    }


@register_derivation
def ffn_sharp_gated_relu_squared() -> Derivation:
    """The norm of a gated squared-ReLU sub-layer's Jacobian."""
    statement = find("ffn-sharp-gated-relu-squared")
    exact = line(
        _J_u,
        "=",
        W_2 * (_slopes * W_1 + _values * W_3),
        "product rule",
        "z_1 = W_1 u and z_3 = W_3 u.",
        source=OWN,
        sample=_exact,
    )
    row = line(
        _row,
        "~=",
        4 * _z_1**2 * _z_3**2 * sigma_1**2 + _z_1**4 * sigma_3**2,
        "variance of a sum",
        "Off u a row r_i of the bracket is normal at given z_1i > 0 and z_3i: a plain layer with slopes D_i, D_i^2 = d "
        "times this.",
        source=OWN,
        sample=_one_row,
        tolerance=0.03,
        accuracy="within 3 % for one row of 65536 entries, five standard errors of its mean square",
    )
    along = line(
        _J_u * u,
        "=",
        3 * W_2 * _column,
        "homogeneity of degree 3",
        "Along u the row is three times the unit's value, largest where the slope is.",
        source=OWN,
        sample=_exact,
    )
    conclusion = line(
        _mean_norm,
        "~=",
        statement.expression,
        "mean of the larger",
        "Of the steepest unit's outlier and the others' edge, as lines 2 to 5 of ffn-sharp-relu-squared with the "
        "column along u above; averaged over draws of all units.",
        source=FREE,
        sample=_mean,
        tolerance=0.025,
        accuracy=f"within 2.5 % for the mean of {DRAWS} draws at width {WIDTH}, five standard errors",
    )
    return Derivation(
        name="ffn-sharp-gated-relu-squared",
        title="Gated squared ReLU at initialisation, the norm itself",
        steps=(exact, row, along, conclusion),
        statement="ffn-sharp-gated-relu-squared",
        assumptions=statement.assumptions,
    )
