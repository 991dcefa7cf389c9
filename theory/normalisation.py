"""LayerNorm and RMSNorm: the exact Jacobian norm, and the paper's approximation of it."""

from __future__ import annotations

from theory.quantities import quantity
from theory.sources import Source
from theory.statements import Statement, register


@register
def norm_jacobian_estimate() -> Statement:
    r"""The paper's LayerNorm Jacobian.

    .. math:: \partial LN/\partial x' = (1/\sigma)(I - z z^\top/d) \sim I/\sigma

    Holds: width large, eps negligible. The mean's direction is left out; the norm is right for d >= 3.
    Source: takase2025spike, before eq. (15).
    """
    return Statement(
        name="norm-jacobian-estimate",
        kind="estimate",
        quantity=quantity("norm_jacobian"),
        formula=lambda sigma_x: 1 / sigma_x,
        source=Source(key="takase2025spike", label="before eq. (15)"),
        assumptions=("eps far below the variance", "unit gain"),
        why="two directions of d are projected out, which leaves the largest singular value",
    )


@register
def norm_jacobian_upper() -> Statement:
    r"""Bound the Jacobian of LayerNorm or RMSNorm.

    .. math:: \|J\| \le \|\gamma\|_\infty / s, \qquad s = \sqrt{\mathrm{var} + \epsilon}
        \text{ (LayerNorm)}, \ \sqrt{\mathrm{mean}\,x^2 + \epsilon} \text{ (RMSNorm)}

    Holds: any input and gain with s > 0; equality for unit gain (LayerNorm d >= 3, RMSNorm d >= 2).
    Why: J = diag(gamma) A / s, with A symmetric and eigenvalues 1, eps/s^2 and, for LayerNorm, 0.
    Source: xiong2020layernorm gives the Jacobian.
    """
    return Statement(
        name="norm-jacobian-upper",
        kind="upper",
        quantity=quantity("norm_jacobian"),
        formula=lambda gain, s: gain / s,
        source=Source(key="xiong2020layernorm", label="lemma 3"),
        assumptions=("s > 0",),
        why="J = diag(gamma) A / s with A symmetric, eigenvalues 1, eps/s^2 <= 1 and (LayerNorm) 0",
        tight=True,
    )
