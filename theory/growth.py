r"""How much the gradient grows from the last layer to the first, from the configuration alone.

Two T x T matrices are carried through the depth: the residual Gram `S_tt' = <x_t, x_t'>/d` forwards and
the gradient Gram `G_tt'` backwards. At large width every half-layer acts on them by a deterministic map,
in which the backward multiplier of a sub-layer is the derivative of its forward kernel. The prediction is

.. math:: |g_0| / |g_N| = \sqrt{\mathrm{tr}\, G_0 / \mathrm{tr}\, G_N},

with g_0 the gradient entering the first block and g_N the one leaving the last, before the final norm.
Nothing is fitted: the inputs are widths, standard deviations, eps and which tokens are equal.

Positions are kept in blocks (`Blocks`). With one token a block the recursion is exact in T; with growing
blocks the tokens of a block share one value, which makes T = 2048 as cheap as T = 128.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from theory.architecture import Architecture
from theory.kernels import activation_kernel

Array = NDArray[np.float64]
AttentionModel = Literal["uniform", "second-order"]

EXACT_POSITIONS = 160  # below this length every position is its own block
MAX_LOGIT_VARIANCE = 0.5  # beyond, softmax is too far from uniform for an expansion in the logits
SMALLEST_SQUARE = 1e-100  # of a normaliser; its inverse square still fits a double
MIN_WIDTH = 32  # narrower, fluctuations between tokens and heads are no longer small


class Gram(NamedTuple):
    """A T x T matrix, constant over blocks except on its diagonal.

    diag: (B,) entry of a token with itself. off: (B, B) entry of two different tokens; within a block of
    one token `off` has no meaning and no weight.
    """

    diag: Array
    off: Array

    @property
    def mT(self) -> Gram:
        return Gram(self.diag, self.off.T)

    def __add__(self, other: Gram) -> Gram:  # type: ignore[override]
        return Gram(self.diag + other.diag, self.off + other.off)

    def __sub__(self, other: Gram) -> Gram:
        return Gram(self.diag - other.diag, self.off - other.off)

    def __mul__(self, other: Gram | float) -> Gram:  # type: ignore[override]
        """Entrywise product, or a scalar multiple."""
        if isinstance(other, Gram):
            return Gram(self.diag * other.diag, self.off * other.off)
        return Gram(self.diag * other, self.off * other)

    def over_outer(self, scale: Array) -> Gram:
        """Divide entrywise by scale_t scale_t'."""
        return Gram(self.diag / scale**2, self.off / np.outer(scale, scale))


@dataclass(frozen=True, slots=True)
class Blocks:
    """A partition of the positions 1..T into runs of consecutive tokens, and causal averaging over it."""

    sizes: Array
    starts: Array  # number of tokens before the block
    inverse: Array  # mean of 1/t over the block

    @staticmethod
    def of(n_tokens: int, *, exact: bool = False) -> Blocks:
        """Single positions up to `EXACT_POSITIONS` (or throughout), then runs growing by 4 % of their start."""
        sizes: list[int] = []
        start = 0
        single = n_tokens if exact or n_tokens <= EXACT_POSITIONS else 24
        while start < n_tokens:
            size = 1 if start < single else max(1, round(0.04 * start))
            size = min(size, n_tokens - start)
            sizes.append(size)
            start += size
        size_array = np.array(sizes, dtype=np.float64)
        starts = np.concatenate([[0.0], np.cumsum(size_array)[:-1]])
        inverse = np.array(
            [np.mean(1 / np.arange(s + 1, s + n + 1)) for s, n in zip(starts, sizes, strict=True)], dtype=np.float64
        )
        return Blocks(size_array, starts, inverse)

    def trace(self, a: Gram) -> float:
        """Sum of the diagonal over tokens."""
        return float(np.sum(self.sizes * a.diag))

    def left(self, a: Gram) -> Gram:
        """P A, P the causal uniform averaging: row t is the mean of rows 1..t."""
        extra = a.diag - np.diagonal(a.off)
        before = np.cumsum(self.sizes[:, None] * a.off, axis=0) - self.sizes[:, None] * a.off
        own = 1 - self.starts * self.inverse
        off = self.inverse[:, None] * before + own[:, None] * a.off
        diag = np.diagonal(off) + self.inverse * extra
        return Gram(diag, off + self.inverse[:, None] * self._visible * extra[None, :])

    def right(self, a: Gram) -> Gram:
        """A P: entry (t, j) is the sum over t' >= j of A_tt'/t'."""
        extra = a.diag - np.diagonal(a.off)
        weight = self.sizes * self.inverse
        weighted = a.off * weight[None, :]
        after = np.cumsum(weighted[:, ::-1], axis=1)[:, ::-1] - weighted
        own = 1 - self.starts * self.inverse
        off = after + own[None, :] * a.off
        diag = np.diagonal(off) + self.inverse * extra
        return Gram(diag, off + (self.inverse * extra)[:, None] * self._visible)

    def average(self, a: Gram) -> Gram:
        """P A P' for any A."""
        return self.left(self.left(a).mT).mT

    def spread(self, a: Gram) -> Gram:
        """P' A P for any A."""
        return self.right(self.right(a).mT).mT

    @property
    def _visible(self) -> Array:
        """Probability that column's token is not after row's, for two different tokens: 1, 1/2 or 0."""
        n = self.sizes.size
        return np.tril(np.ones((n, n)), -1) + 0.5 * np.eye(n)


@dataclass(frozen=True, slots=True, kw_only=True)
class Growth:
    """The recursion's answer.

    Attributes:
        value: |g_0| / |g_N|.
        residual_std: (2N+1,) root mean square of the residual stream at the embedding and after each half-layer.
        gradient: (2N+1,) gradient norm at the same places, over that at the last.
        in_domain: whether the large-width model is valid here; `reasons` says what is not.
    """

    value: float
    residual_std: tuple[float, ...]
    gradient: tuple[float, ...]
    in_domain: bool
    reasons: tuple[str, ...]


class _Half(NamedTuple):
    """What the backward pass needs of a half-layer: normalised Gram, its scale, attention or not."""

    kernel: Gram
    scale: Array
    attention: bool


def embedding_variance(architecture: Architecture) -> float:
    """Mean square of the residual stream entering the first block, for one token at one position."""
    raw = (architecture.embedding_multiplier * architecture.stds.embedding) ** 2
    if architecture.positions == "learned":
        raw += architecture.stds.position**2
    return raw / (raw + architecture.eps) if architecture.embedding_norm else raw


@np.errstate(over="ignore", invalid="ignore")  # what is not finite is reported in `reasons`
def gradient_growth(
    architecture: Architecture,
    n_tokens: int,
    *,
    tokens: NDArray[np.int64] | None = None,
    targets: NDArray[np.int64] | None = None,
    attention: AttentionModel = "second-order",
    exact: bool = False,
) -> Growth:
    """Predict gradient growth at initialisation.

    Args:
        n_tokens: sequence length T.
        tokens: (T,) token ids; equal ids share an embedding. Distinct tokens unless given.
        targets: (T,) ids of the next tokens, for the loss gradient's own correlations. Distinct unless given.
        attention: `second-order` counts the correlated fluctuation of two softmax rows around the uniform
            average, forwards and backwards; `uniform` does not. Both keep the gradient through the logits. Left
            out: the mean shift of a single row, of the same order but zero while tokens are uncorrelated.
        exact: one block a position whatever the length (time and memory grow like T^2 N).
    """
    _require_scale(architecture)
    blocks = Blocks.of(n_tokens, exact=exact or tokens is not None or targets is not None)
    stream = _embedding_gram(architecture, blocks, tokens)
    halves: list[_Half] = []
    residual_std: list[float] = []
    for half in range(2 * architecture.n_layers):
        residual_std.append(_root(blocks.trace(stream) / n_tokens))
        kernel, scale = _normalise(stream, architecture.eps)
        is_attention = half % 2 == 0
        halves.append(_Half(kernel, scale, is_attention))
        if is_attention:
            branch = _attention_forward(architecture, blocks, kernel, attention)
        else:
            branch = _feedforward_forward(architecture, kernel)
        stream = stream + branch
    residual_std.append(_root(blocks.trace(stream) / n_tokens))

    _, scale = _normalise(stream, architecture.eps)
    gradient = _head_gradient(architecture, blocks, targets).over_outer(scale)
    norms = [blocks.trace(gradient)]
    for half in reversed(halves):
        if half.attention:
            branch = _attention_backward(architecture, blocks, half.kernel, gradient, attention)
        else:
            branch = _feedforward_backward(architecture, half.kernel, gradient)
        fixed = architecture.embedding_norm and half is halves[0]
        kept = _norm_gain(architecture, fixed_scale=fixed)
        gradient = gradient + branch.over_outer(half.scale) * kept
        norms.append(blocks.trace(gradient))
    profile = tuple(_root(norm / norms[0]) for norm in reversed(norms))
    reasons = _domain(architecture)
    if not all(map(math.isfinite, (*profile, *residual_std))):
        reasons = (*reasons, "the recursion breaks down: a mean square overflows or comes out negative")
    return Growth(
        value=profile[0],
        residual_std=tuple(residual_std),
        gradient=profile,
        in_domain=not reasons,
        reasons=reasons,
    )


def growth_closed_form(architecture: Architecture, n_tokens: int) -> float:
    r"""Growth with uncorrelated tokens: :math:`\sqrt{1 + N b / \sigma_e^2}`, an estimate.

    `b = s_2^2 m kappa(1) + c_V c_O H_T / T` is what one layer adds to the residual variance, `sigma_e^2` the
    embedding's. It ignores the correlation that attention builds up, so it is neither a bound nor sharp
    once `N b > sigma_e^2`.
    """
    one = np.ones(1)
    unit = Gram(one, np.zeros((1, 1)))
    feedforward = float(_feedforward_forward(architecture, unit).diag[0])
    harmonic = float(np.sum(1 / np.arange(1, n_tokens + 1))) / n_tokens
    added = feedforward + _value_gain(architecture) * harmonic
    start = embedding_variance(architecture)
    return math.sqrt(1 + architecture.n_layers * added / start)


def _root(square: float) -> float:
    """Square root; not a number where the expansion in the logits, far outside its domain, made a square negative."""
    return math.sqrt(square) if square >= 0 else math.nan


def _require_scale(architecture: Architecture) -> None:
    raw = (architecture.embedding_multiplier * architecture.stds.embedding) ** 2
    if architecture.positions == "learned":
        raw += architecture.stds.position**2
    if raw + architecture.eps < SMALLEST_SQUARE:
        raise ValueError(
            f"embeddings of std {math.sqrt(raw):g} with eps={architecture.eps:g} leave a normalisation nothing to "
            "divide by; use eps=1e-5, or a larger standard deviation (initializer_range)"
        )


def _domain(architecture: Architecture) -> tuple[str, ...]:
    reasons: list[str] = []
    logits = _logit_variance(architecture)
    if logits > MAX_LOGIT_VARIANCE:
        reasons.append(f"attention logits have variance {logits:.3g}, above {MAX_LOGIT_VARIANCE}")
    if architecture.d_model < MIN_WIDTH:
        reasons.append(f"d_model={architecture.d_model} is below {MIN_WIDTH}, too narrow for a large-width prediction")
    return tuple(reasons)


def _embedding_gram(architecture: Architecture, blocks: Blocks, tokens: NDArray[np.int64] | None) -> Gram:
    n = blocks.sizes.size
    off = np.zeros((n, n)) if tokens is None else (tokens[:, None] == tokens[None, :]).astype(np.float64)
    raw = (architecture.embedding_multiplier * architecture.stds.embedding) ** 2
    variance = np.full(n, raw)
    if architecture.positions == "learned":
        # Learned positions are added before an embedding norm, so that the norm sees both.
        position = architecture.stds.position**2
        gram = Gram(variance + position, raw * off)
    else:
        gram = Gram(variance, raw * off)
    if architecture.embedding_norm:
        gram, _ = _normalise(gram, architecture.eps)
    return gram


def _head_gradient(architecture: Architecture, blocks: Blocks, targets: NDArray[np.int64] | None) -> Gram:
    """Gram of the loss gradient at the head's input, up to a factor: rows of the head, one a target."""
    n = blocks.sizes.size
    if targets is None:
        return Gram(np.ones(n), np.zeros((n, n)))
    same = (targets[:, None] == targets[None, :]).astype(np.float64) - 1 / architecture.vocab_size
    return Gram(np.diagonal(same).copy(), same)


def _norm_gain(architecture: Architecture, *, fixed_scale: bool) -> float:
    """Backward variance gain of a normalisation, times the token's mean square.

    The Jacobian projects out 2 directions of d (LayerNorm: mean and radius) or 1 (RMSNorm). The token's own
    scale fluctuates at finite width, and E[1/s^2] exceeds 1/E[s^2]: together (d-2)/(d-3) and (d-1)/(d-2), exact
    for a normal token; (d-2)/d and (d-1)/d where a norm before has fixed the scale.
    """
    d = architecture.d_model
    left = max(d - (2 if architecture.norm == "layernorm" else 1), 0)
    return left / (d if fixed_scale else max(left - 1, 1))


def _normalise(stream: Gram, eps: float) -> tuple[Gram, Array]:
    scale = np.sqrt(stream.diag + eps)
    return stream.over_outer(scale), scale


def _value_gain(architecture: Architecture) -> float:
    """c_V c_O: variance gain of the value and output matrices together."""
    stds, heads = architecture.stds, architecture.n_heads * architecture.d_head
    return architecture.d_model * stds.value**2 * heads * stds.output**2


def _logit_variance(architecture: Architecture) -> float:
    """a = c_Q c_K, the variance of an attention logit between normalised, uncorrelated tokens."""
    stds = architecture.stds
    return (architecture.d_model * stds.query * stds.key) ** 2


def _logit_gain(architecture: Architecture) -> float:
    """exp(a) - 1: what logits of variance a add to the mean square of an attention weight.

    The expansion's first term is a; with uncorrelated tokens the sum of all terms is exp(a) - 1, and it is
    used throughout, since correlated tokens have a small correction anyway.
    """
    return math.expm1(min(_logit_variance(architecture), 50.0))


def _logit_correction(blocks: Blocks, kernel: Gram, weight: Gram) -> Gram:
    """weight o M, M = Cov over the two attended positions of K_jj': the logits' second-order effect on values."""
    averaged = blocks.left(kernel)  # P K
    both = blocks.average(kernel)
    squares = blocks.average(kernel * kernel)
    left = blocks.left((averaged * averaged).mT).mT  # (PK)^o2 P'
    return weight * (squares - left - left.mT + both * both)


def _attention_forward(architecture: Architecture, blocks: Blocks, kernel: Gram, model: AttentionModel) -> Gram:
    mixed = blocks.average(kernel)
    if model == "second-order":
        mixed = mixed + _logit_correction(blocks, kernel, kernel) * _logit_gain(architecture)
    return mixed * _value_gain(architecture)


def _attention_backward(
    architecture: Architecture, blocks: Blocks, kernel: Gram, gradient: Gram, model: AttentionModel
) -> Gram:
    h = gradient * kernel
    x = blocks.right((blocks.left(kernel) * blocks.right(h)).mT).mT  # P'((PK) o (HP))
    through_keys = kernel * blocks.spread(h) - x - x.mT + blocks.spread(blocks.average(kernel) * h)
    through_queries = _logit_correction(blocks, kernel, gradient)
    # To second order in the logits E[P'GP] exceeds its uniform value by the very term that runs through the keys.
    through_logits = through_keys * (2.0 if model == "second-order" else 1.0) + through_queries
    total = blocks.spread(gradient) + through_logits * _logit_gain(architecture)
    return total * _value_gain(architecture)


def _feedforward_forward(architecture: Architecture, kernel: Gram) -> Gram:
    return _feedforward(architecture, kernel)[0]


def _feedforward_backward(architecture: Architecture, kernel: Gram, gradient: Gram) -> Gram:
    return gradient * _feedforward(architecture, kernel)[1]


def _feedforward(architecture: Architecture, kernel: Gram) -> tuple[Gram, Gram]:
    """Forward Gram of the branch, and its derivative in the off-diagonal entries of `kernel`."""
    stds = architecture.stds
    gain = stds.ffn_in**2 * architecture.d_model
    gate = stds.ffn_gate**2 * architecture.d_model
    out = stds.ffn_out**2 * architecture.d_ffn

    def entries(values: Array, q: Array, q_other: Array) -> tuple[Array, Array]:
        pair = activation_kernel(architecture.activation, gain * q, gain * q_other, gain * values)
        if not architecture.gated:
            return out * pair.kappa, out * gain * pair.slope
        return out * pair.kappa * gate * values, out * gate * (gain * pair.slope * values + pair.kappa)

    on, on_slope = entries(kernel.diag, kernel.diag, kernel.diag)
    off, off_slope = entries(kernel.off, kernel.diag[:, None], kernel.diag[None, :])
    return Gram(on, off), Gram(on_slope, off_slope)
