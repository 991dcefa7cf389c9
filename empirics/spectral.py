"""Spectral norms of Jacobians: matrix-free for real sizes, explicit for small ones.

`lanczos_opnorm` runs Golub-Kahan bidiagonalisation with full reorthogonalisation and a thick restart (Baglama and
Reichel, SIAM J. Sci. Comput. 27, 2005, the variant with Ritz vectors). Its result is a *lower estimate*: what one
direction, which it returns, is stretched by. `explicit_opnorm` builds the Jacobian and takes its largest singular
value; only that may certify an upper bound. `lanczos_opnorms` takes many Jacobians of one shape at once, such as those
of a small network's layers, where a loop would spend its time between the operations and not in them.

Two pieces of evidence come with an estimate. The residual tells that some singular value is near. It does not tell
that none is larger: where the identity outweighs a branch any direction has a small residual. So an estimate also says
how large the norm can be unless the random start was unlucky. With c the start's component along the leading right
singular vector, the products fix every basis vector's component as c times a polynomial in the norm s, which grows
beyond the largest Ritz value. A component exceeds 1 in no orthonormal basis, so that an s that would make it is refuted
unless c is as small as a random direction's is with a small chance only (van Dorsselaer, Hochstenbach and van der
Vorst, SIAM J. Matrix Anal. Appl. 22, 2000; here carried on through restarts).

Shapes: N Jacobians, K vectors of a basis, I inputs, O outputs of a Jacobian.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.func import jacrev
from torch.nn.attention import SDPBackend, sdpa_kernel

from empirics.registry import Unavailable

Function = Callable[[Tensor], Tensor]
# A bidiagonal matrix (N, K, K + 1), or one bordered by kept Ritz values, and which right vector it was grown from.
Cycle = tuple[np.ndarray, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class NormEstimate:
    """A lower estimate of a spectral norm.

    Attributes:
        value: |J v| for the unit vector v below, so never above the norm, up to rounding.
        likely_upper: what the norm is at most, but for random starts of the `chance` asked for.
        iterations: products with J and with J' each.
        residual: |J'u - value v| / value with u = J v / value; some singular value is that near, relative to `value`.
        direction: v, in the shape of the function's input.
    """

    value: float
    likely_upper: float
    iterations: int
    residual: float
    direction: Tensor = field(repr=False, compare=False)
    kind: Literal["lower estimate"] = field(init=False, default="lower estimate")


def no_estimate() -> NormEstimate:
    """Of a Jacobian whose norm cannot be had, among others that have one: not a number."""
    return NormEstimate(
        value=math.nan, likely_upper=math.nan, iterations=0, residual=math.nan, direction=torch.empty(0)
    )


def lanczos_opnorm(
    function: Function,
    x: Tensor,
    *,
    tolerance: float = 1e-4,
    limit: int = 300,
    seed: int = 0,
    chance: float = 0.01,
    basis: int = 32,
) -> NormEstimate:
    """Norm of d function / d x at x, both of any shape; the rest as in `lanczos_opnorms`."""
    return lanczos_opnorms(
        lambda rows: function(rows[0])[None], x[None],
        tolerance=tolerance, limit=limit, seed=seed, chance=chance, basis=basis,
    )[0]  # fmt: skip


def lanczos_opnorms(
    function: Function,
    x: Tensor,
    *,
    tolerance: float = 1e-4,
    limit: int = 300,
    seed: int = 0,
    chance: float = 0.01,
    basis: int = 32,
) -> list[NormEstimate]:
    """Norms of N Jacobians of one shape: of each row of the function's output in the same row of x.

    Rows must not depend on each other. All are iterated until the last has converged; a row's estimate is taken when
    it has, and is the same, but for rounding, whatever the others are.

    Args:
        function: (N, ...) -> (N, ...), differentiable twice.
        x: (N, ...), float32 or float64.
        tolerance: relative to the value. Iteration stops when the residual is no larger, and the norm no more than
            that above the value but for unlucky starts. Below 64 roundings of the dtype it is taken to be that.
        limit: most products with J, after which an estimate stands as it is.
        chance: of an unlucky start, for any one Jacobian.
        basis: vectors kept on either side; memory is that many times an input and an output.

    Raises:
        ValueError: the dtype or an option will not do.
        Unavailable: a product is not finite.
    """
    if x.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"a spectral norm needs float32 or float64, not {x.dtype}; convert function and input")
    if basis < 3 or limit < 1 or tolerance < 0 or not 0 < chance < 1:
        raise ValueError(
            f"basis={basis}, limit={limit}, tolerance={tolerance}, chance={chance}: "
            "use at least 3, at least 1, at least 0, and one between 0 and 1"
        )
    product, adjoint = jacobian_products(function, x)
    count, size = len(x), x[0].numel()
    rounding = 64 * torch.finfo(x.dtype).eps
    tolerance = max(tolerance, rounding)
    # The density of a random unit vector's component is at most sqrt(size / 2 pi).
    unlucky = chance * math.sqrt(math.pi / (2 * max(size, 1)))
    start = torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    rights, lefts = x.new_zeros(count, basis + 1, size), x.new_zeros(count, basis, 0)
    rights[:, 0] = (start / start.norm()).to(x)
    # J rights = lefts matrix, without the last right vector; J' lefts = rights matrix'.
    matrix = np.zeros((count, basis, basis + 1))
    value, past, first, j = np.zeros(count), list[Cycle](), 0, 0
    found: dict[int, NormEstimate] = {}
    for iteration in range(1, limit + 1):
        output = product(rights[:, j].view_as(x))
        if iteration == 1:
            lefts = x.new_zeros(count, basis, output[0].numel())
        lefts[:, j], alpha = _orthonormal(output, lefts[:, :j], rounding * value)
        back = adjoint(lefts[:, j].view_as(output))
        rights[:, j + 1], beta = _orthonormal(back, rights[:, : j + 1], rounding * np.maximum(value, alpha))
        matrix[:, j, j], matrix[:, j, j + 1] = alpha, beta
        u, s, vt = np.linalg.svd(matrix[:, : j + 1, : j + 1])
        value = s[:, 0]
        # All that J'(lefts u) has beside s (rights v) is beta u_last times the next right vector.
        residual = beta * np.abs(u[:, -1, 0]) / np.where(value > 0, value, 1.0)
        cycles = [*past, (matrix[:, : j + 1, : j + 2], first)]
        done = residual <= tolerance
        if done.any():
            done &= _refuted(value * (1 + tolerance), cycles, unlucky)
        for n in set(range(count)) - found.keys():
            if done[n] or iteration == limit:
                found[n] = NormEstimate(
                    value=float(value[n]),
                    likely_upper=_likely_upper(
                        value[n], [(m[n : n + 1], k) for m, k in cycles], unlucky, tolerance, rounding
                    ),
                    iterations=iteration,
                    residual=float(residual[n]),
                    direction=(torch.from_numpy(vt[n, 0]).to(x) @ rights[n, : j + 1]).view_as(x[n]),
                )
        if len(found) == count:
            break
        j += 1
        if j == basis:
            past.append((matrix.copy(), first))
            first = j = basis // 3
            _restart(rights, lefts, matrix, u, s, vt, keep=j)
    return [found[n] for n in range(count)]


def jacobian_products(function: Function, x: Tensor) -> tuple[Function, Function]:
    """v -> J v and w -> J'w for the Jacobian J of a function at x, in the shapes of x and of its output.

    J v is the derivative of J'w in w, so that the function runs once for all products, and the two are adjoint.
    `torch.func.jvp` runs it again each time, at three to four times the price; `torch.func.linearize` takes seconds
    to trace it.
    """
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):  # fused attention has no second derivative
        at = x.detach().clone().requires_grad_(True)
        y = function(at)
        w = torch.zeros_like(y).requires_grad_(True)
        pullback = torch.autograd.grad(y, at, w, create_graph=True, allow_unused=True)[0] if y.requires_grad else None
    if pullback is None or not pullback.requires_grad:  # a constant
        return lambda v: torch.zeros_like(y.detach()), lambda w: torch.zeros_like(x)

    def product(v: Tensor) -> Tensor:
        return torch.autograd.grad(pullback, w, v, retain_graph=True)[0]

    def adjoint(v: Tensor) -> Tensor:
        return torch.autograd.grad(y, at, v, retain_graph=True)[0]

    return product, adjoint


def _orthonormal(vectors: Tensor, bases: Tensor, floor: np.ndarray) -> tuple[Tensor, np.ndarray]:
    """Unit vectors (N, I) along what `vectors` (N, ...) have beside their bases (N, K, I), and its length (N,).

    Where the length is not above `floor`, rounding alone is left: the vector is zero and the length 0, with which an
    exhausted basis can be continued.
    """
    vectors = vectors.detach().reshape(len(vectors), 1, -1)  # rows: of columns torch makes fifteen times the work
    # Always twice: where each step takes off several times what it leaves, one pass multiplies what the basis lacks in
    # orthogonality by as much, step after step, and a found direction is found again, longer.
    for _ in range(2):
        vectors = torch.baddbmm(vectors, vectors @ bases.mT, bases, alpha=-1)
    length = torch.linalg.vector_norm(vectors, dim=-1, dtype=torch.float64)
    vectors, length = vectors[:, 0], length[:, 0].cpu().numpy()
    if not np.isfinite(length).all():
        raise Unavailable("a product with the Jacobian is not finite; take a point where function and derivative are")
    length[length <= floor] = 0.0
    scale = torch.from_numpy(np.where(length > 0, length, math.inf)).to(vectors)
    return vectors / scale[:, None], length


def _restart(
    rights: Tensor, lefts: Tensor, matrix: np.ndarray, u: np.ndarray, s: np.ndarray, vt: np.ndarray, *, keep: int
) -> None:
    """Replace full bases by their first Ritz vectors, followed on the right by the vector that was next."""
    basis = lefts.shape[1]
    rights[:, :keep] = torch.from_numpy(vt[:, :keep]).to(rights) @ rights[:, :basis]
    rights[:, keep] = rights[:, basis].clone()
    lefts[:, :keep] = torch.from_numpy(u[:, :, :keep]).to(lefts).mT @ lefts
    coupling = matrix[:, -1, -1:] * u[:, -1, :keep]
    matrix[:] = 0.0
    matrix[:, range(keep), range(keep)] = s[:, :keep]
    matrix[:, :keep, keep] = coupling


def _refuted(norm: np.ndarray, cycles: list[Cycle], unlucky: float) -> np.ndarray:
    """Whether norms (N,) above every Ritz value need a start with a smaller component than an unlucky one.

    Components c of right and d of left vectors satisfy s d = B c and s c = B'd, the latter but for the last right
    vector's; hence (s^2 - A'A) c = A'b times the last component, where A is B without its last column b. The last
    right vector of a cycle is what the next one is grown from.
    """
    norm = np.where(norm > 0, norm, 1.0)
    component, refuted = np.full(len(norm), unlucky), np.zeros(len(norm), dtype=bool)
    for matrix, first in cycles:
        scaled = matrix / norm[:, None, None]
        square, last = scaled[:, :, :-1], scaled[:, :, -1:]
        transposed = square.swapaxes(1, 2)
        inner = np.linalg.solve(np.eye(square.shape[1]) - transposed @ square, transposed @ last)
        rights = np.concatenate([inner, np.ones((len(norm), 1, 1))], axis=1)
        lefts = scaled @ rights
        largest = np.maximum(np.linalg.norm(rights, axis=(1, 2)), np.linalg.norm(lefts, axis=(1, 2)))
        with np.errstate(divide="ignore", over="ignore"):  # an exhausted basis, which knows all there is
            component = component / np.abs(rights[:, first, 0])
            refuted |= component * largest > 1
    return refuted


def _likely_upper(value: float, cycles: list[Cycle], unlucky: float, tolerance: float, rounding: float) -> float:
    """The smallest refuted norm, a few per cent of its distance from the value too large; infinite if there is none.

    Not above (1 + tolerance) value if that is refuted.
    """

    def refuted(log_distance: float) -> bool:
        return bool(_refuted(np.array([value * (1 + math.exp(log_distance))]), cycles, unlucky)[0])

    low, high = math.log(rounding), math.log(tolerance)
    if not refuted(high):
        low, high = high, math.log(1 / rounding)
        if not refuted(high):
            return math.inf
    while high - low > 0.02:
        middle = (low + high) / 2
        low, high = (low, middle) if refuted(middle) else (middle, high)
    return float(value * (1 + math.exp(high)))


def explicit_jacobian(function: Function, x: Tensor) -> Tensor:
    """The Jacobian as an (outputs, inputs) matrix; memory is their product."""
    jacobian = jacrev(function)(x)
    return jacobian.detach().reshape(-1, x.numel())


def explicit_opnorm(function: Function, x: Tensor) -> float:
    """Largest singular value of the explicit Jacobian; 0 for an empty one."""
    return float(torch.linalg.matrix_norm(explicit_jacobian(function, x), ord=2))
