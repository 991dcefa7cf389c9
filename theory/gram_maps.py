r"""What a sub-layer does to Gram matrices at large width: forwards to the residual's, backwards to the gradient's.

Notation: K the Gram matrix of the sub-layer's input u (over d), G that of the gradient at its output, P the mean
softmax matrix, a the variance of a logit between normalised tokens, o the entrywise product. Attention is a function
of its softmax rows p_t, which are random with the weights W_Q, W_K; with S_t = diag(p_t) - p_t p_t' their Jacobians,

    forward      c_V c_O E[p_t K p_t']
    values       c_V c_O sum_tt' G_tt' E[p_t p_t']
    logits       c_V c_O G_tt' E[S_t K S_t'], the second moment of dL/dlogits of rows t and t'
    keys         the logits' summed over t, t' against a K_tt'; queries: over j, j' against a K_jj'

Two rows are taken to first order in their covariance a K_tt' K_jj', a row with itself exactly as far as its tokens
are exchangeable (`theory.softmax_moments`). RoPE multiplies the covariance by the mean cosine of the rotation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import reduce
from operator import add
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from theory.architecture import Activation
from theory.grams import Averaging, Gram, Sides
from theory.kernels import activation_kernel
from theory.routing import Own, Routing
from theory.softmax_moments import Capped, softmax_moments

Array = NDArray[np.float64]
AttentionModel = Literal["uniform", "expanded"]

SMALLEST_SCALE = 1e-100  # of a row's tokens over the largest of all; its square still fits a double


class Applied(NamedTuple):
    """A sub-layer at a given input.

    output: Gram matrix of the branch. backward: from the gradient's Gram matrix at the output to that at the input.
    logit_variance: largest variance of a row's logits around their mean, or of what their gradient is multiplied by if
        a soft-cap makes that the larger; 0 without attention.
    uneven: mean square, over the rows and by their weights, of the relative shift of a weight that `_Rows.shift` takes
        to first order; 0 without attention and in blocks of several tokens.
    qk_kept: with QK-norm, the smallest share of queries' and keys' mean square in what they are divided by; 1 without.
    routed: Gram of the slopes that run through a router, which `backward` has in it, and what a norm above makes of
        them; None without a router.
    """

    output: Gram
    backward: Callable[[Gram], Gram]
    logit_variance: float = 0.0
    uneven: float = 0.0
    qk_kept: float = 1.0
    routed: tuple[Gram, Own] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionMap:
    """Attention of one layer.

    Attributes:
        value: c_V c_O, the variance gain of the value and output matrices together.
        logits: a, the variance of a logit between normalised tokens.
        averagings: mean softmax matrices; heads fall on each equally.
        rotation: correlation that RoPE leaves between logits, by the distance of tokens; None without it.
        qk_eps: with QK-norm, the norm's eps over the variance gain of W_Q and W_K; None without. Logits are then those
            of the kernel's correlations, as far as eps is small.
        query_gain, key_gain: variance gains of the way back through the normalisation of a query and of a key, times
            their mean square.
        capped: what a soft-cap makes of the logits, whose variance is then `logits`; None without one.
        model: `expanded` counts the fluctuation of softmax rows around their mean, `uniform` does not. Both keep
            the gradient through the logits.
    """

    value: float
    logits: float
    averagings: tuple[Averaging, ...]
    rotation: Gram | None = None
    qk_eps: float | None = None
    query_gain: float = 1.0
    key_gain: float = 1.0
    capped: Capped | None = None
    model: AttentionModel = "expanded"

    def at(self, kernel: Gram) -> Applied:
        """Attention of an input with this Gram matrix."""
        covariance = self._covariance(kernel)
        rows = [_Rows.of(p, covariance, self.logits, self.capped) for p in self.averagings]
        largest = max(float(np.max(row.variance)) for row in rows)
        if self.capped is not None:
            largest *= max(self.capped.steepness, 1.0)
        if self.model == "uniform":
            rows = [row.at_their_mean() for row in rows]
        averaged = [self._averaged(p, kernel, covariance) for p in self.averagings]
        mixtures = [inner.twice for inner, _ in averaged]
        contracted = [
            _contracted(p, kernel, covariance, *both) for p, both in zip(self.averagings, averaged, strict=True)
        ]
        del averaged  # computed again on the way back: they are most of what a deep network would have to keep
        norms = np.ones(kernel.diag.size) if self.qk_eps is None else self._qk_norms(kernel)

        def over_heads(parts: Iterable[Gram]) -> Gram:
            return reduce(add, parts) * (self.value / len(self.averagings))

        def forward(p: Averaging, row: _Rows, contracted: Gram, mixture: Gram) -> Gram:
            mixed = mixture + row.fluctuation(covariance) * contracted
            return mixed + row.shifted(p, kernel) if p.blocks.single else mixed

        def backward(p: Averaging, row: _Rows, contracted: Gram, gradient: Gram) -> Gram:
            inner, outer = self._averaged(p, kernel, covariance)
            values = p.spread(gradient) + _spread(p, covariance, outer, row.fluctuation(covariance) * gradient)
            if p.blocks.single:
                values = values + row.spread_shifted(p, gradient)
            # Weighted by the covariance of queries the logits' gradient runs through the keys, and the other way round.
            keys = _spread(p, kernel, inner, gradient * row.second * covariance)
            both = keys * self.key_gain + gradient * row.second * contracted * self.query_gain
            return values + self._rotated(both).over_outer(norms) * self.logits

        heads = list(zip(self.averagings, rows, contracted, strict=True))
        return Applied(
            output=over_heads(forward(*head, mixture) for head, mixture in zip(heads, mixtures, strict=True)),
            backward=lambda gradient: over_heads(backward(*head, gradient) for head in heads),
            logit_variance=largest,
            uneven=sum(row.uneven for row in rows) / len(rows),
            qk_kept=1.0 if self.qk_eps is None else float(np.min(kernel.diag / norms**2)),
        )

    def _averaged(self, p: Averaging, kernel: Gram, covariance: Gram) -> tuple[Sides, Sides]:
        """P on the sides of both; without RoPE and QK-norm they are one."""
        inner = p.averaged(kernel)
        return inner, inner if covariance is kernel else p.averaged(covariance)

    def _covariance(self, kernel: Gram) -> Gram:
        """Covariance of logits along one axis: the kernel, its correlations under QK-norm, less what RoPE turns."""
        return self._rotated(kernel if self.qk_eps is None else kernel.over_outer(self._qk_norms(kernel)))

    def _qk_norms(self, kernel: Gram) -> Array:
        """(B,) norm of a query or key over that of one of a normalised token."""
        return np.sqrt(np.maximum(kernel.diag + (self.qk_eps or 0.0), 1e-300))

    def _rotated(self, kernel: Gram) -> Gram:
        return kernel if self.rotation is None else kernel * self.rotation


@dataclass(frozen=True, slots=True)
class _Rows:
    """Moments of the softmax rows, as factors on their first order in the logits.

    variance: (B,) of a row's logits around their mean. first: (B,) E[S_t] over its value at equal logits, a soft-cap's
        slopes in it.
    itself: (B,) factor on E[p_t p_t'] - mean of a row with itself. second: Gram of factors on E[S_t K S_t'].
    shift: (T, T) change of the mean row by unequal tokens (blocks of one token alone). uneven: as in `Applied`.
    """

    variance: Array
    first: Array
    itself: Array
    second: Gram
    shift: Array
    logits: float
    uneven: float

    @staticmethod
    def of(p: Averaging, covariance: Gram, logits: float, capped: Capped | None) -> _Rows:
        # A row over n exchangeable tokens of correlation r has two invariants; n and r follow from them, so that
        # equal tokens and unequal weights count as fewer tokens.
        # Over its largest entry, so that its squares underflow for no size of it.
        largest = float(np.max(covariance.diag)) or 1.0
        relative = covariance * (1 / largest)
        scale = np.maximum(p.mass @ relative.diag, SMALLEST_SCALE)
        mean = p.own_average(relative) / scale
        square = p.own_average(relative * relative) / scale**2
        apart = np.maximum(1 - mean, 0.0)
        varied = (apart > 1e-9) & (mean > 0)
        correlation = np.where(varied, (mean - square) / np.where(varied, apart, 1.0), 0.0)
        correlation = np.minimum(correlation, np.where(varied, mean, 0.0) * (1 - 1e-9))
        count = np.where(varied, (1 - correlation) / np.where(varied, mean - correlation, 1.0), 1.0)
        unit = largest * scale * (1 - correlation)  # logit variance around the row's mean, over a K_tt
        variance = logits * covariance.diag * unit
        moments = softmax_moments(np.maximum(count, 1.0), variance)
        first = np.where(varied, moments.slope, 1.0)
        itself = np.where(varied, moments.gain / np.where(unit > 0, unit, 1.0), logits * covariance.diag)
        square, shift = np.where(varied, moments.square, 1.0), np.zeros((0, 0))
        uneven = 0.0
        if p.blocks.single:
            dense, weights = covariance.dense(), p.dense()
            inner = weights @ dense
            k = covariance.diag[None, :] - 2 * inner + np.sum(inner * weights, axis=1)[:, None]
            k = k - np.sum(weights * k, axis=1)[:, None]
            relative_shift = k * (0.5 * logits * covariance.diag)[:, None]
            uneven = float(np.mean(np.sum(weights * relative_shift**2, axis=1)))
            shift = weights * relative_shift * first[:, None]
        if capped is not None:
            cap = capped.at(count)
            first, itself, square = first * cap.slope, itself * cap.gain, square * cap.square
        second = Gram(square, np.outer(first, first))
        return _Rows(
            variance=variance,
            first=first,
            itself=itself,
            second=second,
            shift=shift,
            logits=logits,
            uneven=uneven,
        )

    def at_their_mean(self) -> _Rows:
        """The same rows without fluctuation or shift."""
        zero, one = np.zeros_like(self.first), np.ones_like(self.first)
        return replace(self, first=zero, itself=zero, second=Gram(one, np.outer(one, one)), shift=0 * self.shift)

    def fluctuation(self, covariance: Gram) -> Gram:
        """Coefficient of S_t K S_t' in E[p_t p_t'] - E[p_t] E[p_t']: first order between rows, exact within one."""
        return Gram(self.itself, self.logits * covariance.off * np.outer(self.first, self.first))

    def shifted(self, p: Averaging, kernel: Gram) -> Gram:
        """What the shift of the mean rows adds to P K P'; for blocks of one token."""
        half = self.shift @ kernel.dense() @ p.dense().T
        return _gram(half + half.T)

    def spread_shifted(self, p: Averaging, gradient: Gram) -> Gram:
        """What it adds to P' G P."""
        half = self.shift.T @ gradient.dense() @ p.dense()
        return _gram(half + half.T)


def _gram(dense: Array) -> Gram:
    return Gram(np.diagonal(dense).copy(), dense)


def _contracted(p: Averaging, inner: Gram, outer: Gram, inner_sides: Sides, outer_sides: Sides) -> Gram:
    """Sum over j, j' of inner_jj' [S_t outer S_t']_jj' for S = diag(p) - pp', symmetric Gram matrices."""
    cross = p.left((inner_sides.once * outer_sides.once).mT).mT
    return p.average(inner * outer) - cross - cross.mT + inner_sides.twice * outer_sides.twice


def _spread(p: Averaging, inner: Gram, inner_sides: Sides, weight: Gram) -> Gram:
    """Sum over t, t' of weight_tt' [S_t inner S_t']_jj'."""
    weighted = p.spread_out(weight)
    cross = p.right((inner_sides.once * weighted.once).mT).mT  # P' ((P inner) o (weight P))
    return inner * weighted.twice - cross - cross.mT + p.spread(inner_sides.twice * weight)


@dataclass(frozen=True, slots=True, kw_only=True)
class FeedForwardMap:
    """The feed-forward sub-layer of one layer.

    Attributes:
        enter, gate, leave: variance gains of W_1, W_3 (None without a gate) and W_2.
        routing: what chooses between feed-forwards like this one; None for a single one.
    """

    activation: Activation
    enter: float
    leave: float
    gate: float | None = None
    routing: Routing | None = None

    def at(self, kernel: Gram) -> Applied:
        """The sub-layer of an input with this Gram matrix; backwards, the derivative of the forward kernel."""

        def entries(values: Array, q: Array, q_other: Array) -> tuple[Array, Array]:
            pair = activation_kernel(self.activation, self.enter * q, self.enter * q_other, self.enter * values)
            if self.gate is None:
                return self.leave * pair.kappa, self.leave * self.enter * pair.slope
            slope = self.gate * (self.enter * pair.slope * values + pair.kappa)
            return self.leave * pair.kappa * self.gate * values, self.leave * slope

        on, on_slope = entries(kernel.diag, kernel.diag, kernel.diag)
        off, off_slope = entries(kernel.off, kernel.diag[:, None], kernel.diag[None, :])
        output, slopes = Gram(on, off), Gram(on_slope, off_slope)
        if self.routing is None:
            return Applied(output=output, backward=lambda gradient: gradient * slopes)
        shared, turning = self.routing.overlaps(kernel)
        through_router = turning * output * self.routing.gain
        slopes = shared * slopes + through_router
        return Applied(
            output=shared * output,
            backward=lambda gradient: gradient * slopes,
            routed=(through_router, self.routing.own(kernel)),
        )


MANY_PAIRS = 1024


def rotation_correlation(
    width: int, turned: int, base: float, distances: Array, slowing: tuple[float, ...] = ()
) -> Gram:
    """Correlation that RoPE leaves between two logits whose distances differ by `distances`.

    Logits are sums over pairs of coordinates, each turned by its angle: the mean cosine, 1 for those that do not turn.

    Args:
        width, turned: of a head, and how much of it rotates.
        distances: (B, B) between two different tokens of a pair of blocks.
        slowing: a factor on the angle of each pair; empty for none.
    """
    pairs = (turned + 1) // 2
    # Of more pairs than any head has, as many evenly spread ones stand for all.
    places = np.arange(pairs) if pairs <= MANY_PAIRS else (np.arange(MANY_PAIRS) + 0.5) * pairs / MANY_PAIRS - 0.5
    angles = base ** (-2 * places / max(turned, 1))
    if slowing:
        angles = angles * np.interp(places, np.arange(pairs), slowing)
    share = turned / width
    total = np.zeros_like(distances)
    for angle in angles:
        total += np.cos(angle * distances)
    mean = share * total / max(angles.size, 1) + (1 - share)
    return Gram(np.ones(len(distances)), mean)


def steepest_alibi_slope(n_heads: int) -> float:
    """The largest of ALiBi's slopes: 2^(-8/n), or that of the heads beyond a power of two."""
    power = 2 ** math.floor(math.log2(n_heads))
    return 2.0 ** ((-8 if n_heads == power else -4) / power)


def alibi_slopes(n_heads: int, limit: int = 8) -> tuple[float, ...]:
    """Slopes of ALiBi's heads (Press et al. 2022): at most `limit` of them, evenly spread over the heads."""
    power = 2 ** math.floor(math.log2(n_heads))
    slopes = [2 ** (-8 * (i + 1) / power) for i in range(power)]
    slopes += [2 ** (-4 * (2 * i + 1) / power) for i in range(n_heads - power)]
    slopes.sort()
    if n_heads <= limit:
        return tuple(slopes)
    chosen = (np.arange(limit) + 0.5) * n_heads / limit
    return tuple(slopes[int(place)] for place in chosen)
