r"""Norms of the identity plus a random matrix: the half-layers |I + J| at large width, corrected for finite width.

A random rotation of the identity changes no singular value of the sum, so what is summed are free R-diagonal
elements, over the numbers for one token and over matrices of tokens for a whole sequence. With q the mean of
1/(z - singular value) over both signs, z(q) falls to the edge and rises after it; near its minimum singular values
have the density of a square root, and the largest of them lies a Tracy-Widom offset below the edge.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from theory.architecture import Activation
from theory.arguments import require_sizes, require_tokens
from theory.random_matrix import MANY_UNITS, TRACY_WIDOM_MEAN, elementwise, gated_squares, plain_squares

Array = NDArray[np.float64]


class ResidualEdge(NamedTuple):
    """Right edge of the singular values, and the second derivative of z(q) there."""

    limit: float
    curvature: float

    def opnorm(self, d: float) -> float:
        """Predicted mean norm at width d: d singular values and their negatives are 2 d points with one edge.

        Raises:
            ValueError: the edge is not one of |I + J|, finite and at least 1.
        """
        if not (1 <= self.limit < math.inf and 0 <= self.curvature < math.inf):
            raise ValueError(
                f"no edge of |I + J| was found, but {self.limit:g}; use finite weights, and a branch that is neither "
                "infinite nor undefined"
            )
        return self.limit + TRACY_WIDOM_MEAN * (2 * d) ** (-2 / 3) * (self.curvature / 2) ** (1 / 3)


NO_BRANCH = ResidualEdge(1.0, 0.0)
WEAKEST = 1e-100  # the edge is 1 to every digit from far above it; far below it powers of 1 / strength overflow


def residual_edge(squares: Array, weights: Array, ratio: float, strength: float) -> ResidualEdge:
    """Edge of |I + strength W_2 diag(D) W_1 / d| for standard normal W_1, W_2 with hidden width ratio * d.

    The symmetrised singular values add by free convolution. That of I has the R-transform
    p(q) = (sqrt(1 + 4 q^2) - 1) / (2 q), and the product takes the value q at (1 + t(w)) / q with w = (strength q)^2
    and t(w) = ratio E[w D^2 / (1 - w D^2)]. The edge is the minimum of their sum.

    Source: haagerup2000brown for the sum of R-diagonal elements.
    """
    from scipy.optimize import minimize_scalar

    squares, weights = squares[squares > 0], weights[squares > 0]
    if strength < WEAKEST or not squares.size:
        return NO_BRANCH
    largest = float(np.max(squares))

    def height(log_share: float) -> float:
        w = np.exp(log_share) / largest
        t = ratio * float(np.sum(weights * w * squares / (1 - w * squares)))
        q = np.sqrt(w) / strength
        # (z - 1) / strength with p(q) - 1 multiplied out, so that a weak branch loses no digits.
        return float(((1 / (np.sqrt(1 + 4 * q * q) + 2 * q) - 1) / 2 + 1 + t) / np.sqrt(w))

    found: Any = minimize_scalar(height, bounds=(-40.0, -1e-9), method="bounded", options={"xatol": 1e-10})
    w = math.exp(float(found.x)) / largest
    q, left = math.sqrt(w) / strength, 1 - w * squares
    powers = w * squares / left, squares / left**2, 2 * squares**2 / left**3
    t, t_w, t_ww = (ratio * float(np.sum(weights * power)) for power in powers)
    w_q, w_qq = 2 * strength**2 * q, 2 * strength**2
    product = (t_ww * w_q**2 + t_w * w_qq) / q - 2 * t_w * w_q / q**2 + 2 * (1 + t) / q**3
    root = math.sqrt(1 + 4 * q * q)
    p = 2 * q / (root + 1)
    rest = (1 - 1 / (root + 2 * q)) / (2 * q) * (1 + p)  # 1 - p^2
    p_q = rest / root
    identity = (-2 * p * p_q * root - rest * 4 * q / root) / root**2
    return ResidualEdge(1 + strength * float(found.fun), product + identity)


def residual_edge_opnorm(activation: Activation, d: Any, d_ffn: Any, sigma_1: Any, sigma_2: Any, s: Any) -> Any:
    """Predicted |I + J| of a plain feed-forward half-layer at finite width, elementwise."""

    def one(width: Any, hidden: Any, enter: Any, leave: Any, scale: Any) -> float:
        width, hidden = require_sizes(d=width, d_ffn=hidden)
        if enter == 0 or leave == 0:
            return NO_BRANCH.limit
        squares = plain_squares(activation, float(enter**2 * width), min(int(hidden), MANY_UNITS))
        return residual_edge(*squares, hidden / width, float(enter * leave * width / scale)).opnorm(width)

    return elementwise(f"residual_edge_{activation}", one, d, d_ffn, sigma_1, sigma_2, s)


def gated_residual_edge_opnorm(
    activation: Activation, d: Any, d_ffn: Any, sigma_1: Any, sigma_2: Any, sigma_3: Any, s: Any
) -> Any:
    """Predicted |I + J| of a gated feed-forward half-layer at finite width, elementwise."""

    def one(width: Any, hidden: Any, enter: Any, leave: Any, gate: Any, scale: Any) -> float:
        width, hidden = require_sizes(d=width, d_ffn=hidden)
        variances = float(enter**2 * width), float(gate**2 * width)
        if leave == 0 or 0 in variances:
            return NO_BRANCH.limit
        squares = gated_squares(activation, *variances, min(int(hidden), MANY_UNITS))
        return residual_edge(*squares, hidden / width, float(leave * math.sqrt(width) / scale)).opnorm(width)

    return elementwise(f"gated_residual_edge_{activation}", one, d, d_ffn, sigma_1, sigma_2, sigma_3, s)


def mixing_edge(mixing: Array, ratio: float = 1.0) -> ResidualEdge:
    r"""Edge of |I + A (x) W_O W_V| for a T x T matrix A and standard normal matrices over sqrt(d), T fixed.

    W_O is d x k and W_V k x d with k = ratio * d.

    With matrices of tokens for numbers, free independence gives four T x T matrices: with rho = k/d, Y = A' G A and

    .. math:: P = \rho A (H^{-1} - Y)^{-1} A', \quad R = \rho (Y^{-1} - H)^{-1},

    the resolvents on either side of the identity are

    .. math:: G = (z - P - (z - R)^{-1})^{-1}, \quad H = (z - R - (z - P)^{-1})^{-1}.

    A positive solution exists exactly for z above the norm's limit. It is followed along v' G v = theta with v the
    left singular vector of A, on which z depends smoothly through the edge and beyond; the edge is its minimum.
    All is in units of the strength |A|, z - 1 above all, so that a weak branch is as exact as a strong one.

    Args:
        mixing: (T, T) A, invertible or 0; |J| is of its size.

    Raises:
        ValueError: A is not finite.

    Source: haagerup2005application for convergence of the norm, helton2007operator for the equations.
    """
    from scipy.optimize import minimize_scalar

    if not np.all(np.isfinite(mixing)):
        raise ValueError("a mixing matrix with entries that are not finite has no edge; use finite ones")
    if not np.any(mixing):
        return NO_BRANCH
    branch = _Branch(mixing, ratio)
    theta, heights = 1e-2, [math.inf]
    while (height := branch.height(theta)) < heights[-1]:
        heights.append(height)
        theta *= 1.5
    low = theta / 1.5 ** min(2, len(heights) - 1)
    while math.isinf(branch.height(theta)):
        theta = math.sqrt(low * theta)
    bounds = math.log(low), math.log(theta)
    found: Any = minimize_scalar(lambda x: branch.height(math.exp(x)), bounds=bounds, method="bounded")
    theta, step = math.exp(float(found.x)), STEP
    while math.isinf(branch.height(theta * (1 + step))):
        step /= 2
    heights, traces = list[float](), list[float]()
    for place in (1 - step, 1.0, 1 + step):
        heights.append(branch.height(theta * place))
        traces.append(branch.trace)
    # Over all tokens' singular values q is the mean of the traces; each token adds d of them.
    curvature = (heights[0] - 2 * heights[1] + heights[2]) / ((traces[2] - traces[0]) / 2) ** 2
    strength = branch.strength
    return ResidualEdge(1 + strength * heights[1], strength**3 * curvature / len(mixing) ** 2)


STEP = 0.01  # of theta, for a second difference
MOST_STEPS = 600
CONVERGED = 1e-9


class _Branch:
    """The solution of `mixing_edge` at a theta, each found from the last, in units of the strength e = |A|.

    A, P and R are over e, resolvents times e, and z stands for (z - 1) / e: with x = z - R and y = z - P the equations
    become G = (y + x (1 + e x)^(-1))^(-1) and H = (x + y (1 + e y)^(-1))^(-1), where nothing cancels at small e.
    """

    def __init__(self, mixing: Array, ratio: float) -> None:
        self.ratio = ratio
        self.strength = float(np.linalg.norm(mixing, 2))
        self.mixing, self.one = mixing / self.strength, np.eye(len(mixing))
        self.resolvents = self.one, self.one
        self.z = math.inf
        self.probe: Array = np.linalg.svd(mixing)[0][:, 0]

    @property
    def trace(self) -> float:
        """q at the last solution, times e."""
        return float(np.trace(self.resolvents[0])) / len(self.one)

    def height(self, theta: float) -> float:
        """z at which v' G v = theta; infinite where there is no solution."""
        A, v, z = self.mixing, self.probe, self.z
        G, H = self.resolvents
        for _ in range(MOST_STEPS):
            G = G * (theta / (v @ G @ v))
            H = H * (np.trace(G) / np.trace(H))  # the two sides have the same singular values
            Y = A.T @ G @ A
            gap = _inverse(H) - Y
            if np.linalg.eigvalsh(gap)[0] <= 0:
                return math.inf
            P, R = (self.ratio * _symmetric(one) for one in (A @ _inverse(gap) @ A.T, _inverse(_inverse(Y) - H)))
            z, new_G = self._level(P, R, theta, z)
            over_P = z * self.one - P
            new_H = _inverse(z * self.one - R + over_P @ _inverse(self.one + self.strength * over_P))
            change = max(float(np.abs(new_G - G).max()), float(np.abs(new_H - H).max()))
            G, H = new_G, new_H
            if change < CONVERGED * theta:
                self.resolvents, self.z = (G, H), z
                return z
        return math.inf

    def _level(self, P: Array, R: Array, theta: float, z: float) -> tuple[float, Array]:
        """z, by Newton's method from the last one, and G."""
        largest = max(float(np.linalg.eigvalsh(P)[-1]), float(np.linalg.eigvalsh(R)[-1]))
        lowest = largest - 1 / self.strength
        if not lowest < z < math.inf:
            z = largest + 1 / theta
        while True:
            over_R = z * self.one - R
            inner = _inverse(self.one + self.strength * over_R)
            left = _symmetric(z * self.one - P + over_R @ inner)
            below = float(np.linalg.eigvalsh(left)[0])
            if below <= 0:
                z += 1 / theta - below
                continue
            G = _inverse(left)
            column = G @ self.probe
            found = float(self.probe @ column)
            change = (found - theta) / float(column @ column + np.sum((inner @ column) ** 2)) * found / theta
            if abs(change) <= 1e-12 * abs(z):
                return z, G
            z = z + change if z + change > lowest else (z + lowest) / 2


def _inverse(matrix: Array) -> Array:
    return np.linalg.inv(matrix).astype(np.float64, copy=False)


def _symmetric(matrix: Array) -> Array:
    return (matrix + matrix.T) / 2


@lru_cache(maxsize=256)
def _uniform_edge(n_tokens: int, strength: float, ratio: float) -> ResidualEdge:
    running_mean = np.tril(np.ones((n_tokens, n_tokens))) / np.arange(1, n_tokens + 1)[:, None]
    return mixing_edge(strength * running_mean, ratio)


def attention_residual_opnorm(c_VO: Any, s: Any, d: Any, ratio: Any, n_tokens: Any) -> Any:
    """Predicted |I + J| of an attention half-layer whose softmax rows are even, tokens of std s, elementwise.

    Args:
        ratio: inner width of W_O W_V over d, that of the value heads.
    """

    def one(gain: Any, scale: Any, width: Any, inner: Any, length: Any) -> float:
        inner = float(inner)
        edge = _uniform_edge(require_tokens(int(length)), math.sqrt(gain / inner) / float(scale), inner)
        return edge.opnorm(float(width))

    return elementwise("residual_edge_attention", one, c_VO, s, d, ratio, n_tokens)
