"""Spectral norms of Jacobians: matrix-free for real sizes, explicit for small ones.

`lanczos_opnorm` runs Golub-Kahan bidiagonalisation with full reorthogonalisation on Jacobian-vector and
vector-Jacobian products. Its result is a *lower estimate*: the norm on a subspace. `explicit_opnorm` builds
the Jacobian and takes its largest singular value; only that may certify an upper bound.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import jacrev, jvp, vjp


@dataclass(frozen=True, slots=True, kw_only=True)
class NormEstimate:
    """A lower estimate of a spectral norm.

    Attributes:
        value: largest singular value on the Krylov subspace; never above the norm, up to rounding.
        iterations: products with J and with J' each.
        residual: |J'u - value v| / value at the last Ritz pair, evidence of convergence.
    """

    value: float
    iterations: int
    residual: float


def lanczos_opnorm(
    function: Callable[[Tensor], Tensor], x: Tensor, *, tolerance: float = 1e-4, limit: int = 60, seed: int = 0
) -> NormEstimate:
    """Norm of d function / d x at x, both of any shape.

    Args:
        tolerance: stop when the relative residual of the leading Ritz pair is below it; the value's own
            error is then of second order in it, for a singular value that stands alone.
    """
    generator = torch.Generator().manual_seed(seed)
    right = torch.randn(x.numel(), generator=generator, dtype=torch.float64).to(x)
    right = right / right.norm()
    pullback = vjp(function, x)[1]
    rights: list[Tensor] = []
    lefts: list[Tensor] = []
    alphas: list[float] = []
    betas: list[float] = []
    value, residual = 0.0, float("inf")
    for iteration in range(1, limit + 1):
        rights.append(right)
        product = jvp(function, (x,), (right.view_as(x),))[1]
        left = product.detach().reshape(-1)
        if lefts:
            left = _orthogonal(left, lefts)
        alpha = float(left.norm())
        if alpha <= 64 * torch.finfo(x.dtype).eps * value:
            # The range is exhausted but for rounding; only the last beta, as one more column, is not yet counted.
            if betas:
                value = float(torch.linalg.matrix_norm(_bidiagonal(alphas, betas), ord=2))
            return NormEstimate(value=value, iterations=iteration, residual=0.0)
        left = left / alpha
        lefts.append(left)
        alphas.append(alpha)
        back = pullback(left.view_as(product))[0].detach().reshape(-1)
        back = _orthogonal(back, rights)
        beta = float(back.norm())
        u, s, _ = torch.linalg.svd(_bidiagonal(alphas, betas))
        value = float(s[0])
        # The bidiagonal relation leaves one term: J'(left basis u) - s v = beta u_last (next right vector).
        residual = beta * abs(float(u[-1, 0])) / value
        if residual < tolerance or beta == 0.0:
            return NormEstimate(value=value, iterations=iteration, residual=residual)
        betas.append(beta)
        right = back / beta
    return NormEstimate(value=value, iterations=len(alphas), residual=residual)


def _bidiagonal(alphas: list[float], betas: list[float]) -> Tensor:
    """Alphas on the diagonal, betas right of it; one column more than rows if there are as many of both."""
    matrix = torch.zeros(len(alphas), len(betas) + 1, dtype=torch.float64)
    matrix.diagonal().copy_(torch.tensor(alphas, dtype=torch.float64))
    matrix.diagonal(1).copy_(torch.tensor(betas, dtype=torch.float64))
    return matrix


def _orthogonal(vector: Tensor, basis: list[Tensor]) -> Tensor:
    """`vector` less its part in the span of `basis`; twice, which is enough for rounding."""
    stacked = torch.stack(basis)
    for _ in range(2):
        vector = vector - stacked.T @ (stacked @ vector)
    return vector


def explicit_jacobian(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """The Jacobian as an (outputs, inputs) matrix; memory is their product."""
    jacobian = jacrev(function)(x)
    return jacobian.detach().reshape(-1, x.numel())


def explicit_opnorm(function: Callable[[Tensor], Tensor], x: Tensor) -> float:
    """Largest singular value of the explicit Jacobian; 0 for an empty one."""
    return float(torch.linalg.matrix_norm(explicit_jacobian(function, x), ord=2))
