"""LayerNorm and RMSNorm: the exact Jacobian norm, and the paper's approximation of it."""

from __future__ import annotations

from theory.functions import sqrt
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
        covers={"norm": ("layernorm",)},
    )


@register
def rmsnorm_jacobian_estimate() -> Statement:
    r"""The paper's estimate carried over to RMSNorm.

    .. math:: \partial RMS/\partial x = (1/r)(I - z z^\top/d) \sim I/r, \qquad r = \sqrt{\mathrm{mean}\,x^2}

    Holds: as norm-jacobian-estimate; one direction of d is left out, so that the norm is right for d >= 2.
    """
    return Statement(
        name="rmsnorm-jacobian-estimate",
        kind="estimate",
        quantity=quantity("norm_jacobian"),
        formula=lambda rms_x: 1 / rms_x,
        source=Source(key="spikecheck", label="norm-jacobian-estimate with the root mean square for the std"),
        assumptions=("eps far below the mean square", "unit gain"),
        why="one direction of d is projected out, which leaves the largest singular value",
        covers={"norm": ("rmsnorm",)},
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


@register
def norm_jacobian_upper_apriori() -> Statement:
    r"""Bound the Jacobian of LayerNorm or RMSNorm for any input at all.

    .. math:: \|J\| \le \|\gamma\|_\infty / \sqrt{\epsilon}

    Holds: any input and gain with eps > 0. Attained at unit gain by a token of zeros.
    Why: norm-jacobian-upper, and s >= sqrt(eps), which is all that is certain of a token.
    """
    return Statement(
        name="norm-jacobian-upper-apriori",
        kind="upper",
        quantity=quantity("norm_jacobian"),
        formula=lambda gain, eps: gain / sqrt(eps),
        source=Source(key="spikecheck", label="norm-jacobian-upper at the smallest normaliser"),
        assumptions=("eps > 0",),
        why="|J| <= max|gamma| / s, and s^2 is a mean of squares plus eps",
        tight=True,
        covers={"eps": (1e-12, 1e-5, 1e-3, 10.0)},
    )


@register
def norm_jacobian_lower() -> Statement:
    r"""Bound the Jacobian of LayerNorm or RMSNorm from below: its inverse norm from above.

    .. math:: 1/\|J\| \le s / |\gamma|_{(k)}, \qquad k = 3 \text{ (LayerNorm)}, \ 2 \text{ (RMSNorm)}

    Holds: d >= k and a k-th largest gain that is not zero; equality for unit gain. With norm-jacobian-upper it
        holds the norm between two gains.
    Why: J = diag(gamma) A / s, with A one but for k - 1 directions; a subspace of k coordinates meets the rest
        (Courant-Fischer).
    """
    return Statement(
        name="norm-jacobian-lower",
        kind="upper",
        quantity=quantity("norm_jacobian_inverse"),
        formula=lambda s, inner_gain: s / inner_gain,
        source=Source(key="horn2012matrix", label="theorem 4.2.6, Courant-Fischer"),
        assumptions=("one token, s > 0", "the k-th largest gain is not zero"),
        why="A is the identity on a space of dimension d - k + 1, which meets that of the k largest gains",
        tight=True,
    )
