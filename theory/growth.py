r"""How much the gradient grows from the last layer to the first, from the configuration alone.

Two T x T matrices are carried through the depth: the residual Gram `S_tt' = <x_t, x_t'>/d` forwards and
the gradient Gram `G_tt'` backwards. At large width every sub-layer acts on them by a deterministic map
(`theory.gram_maps`), in which the backward multiplier is the derivative of the forward kernel. The prediction is

.. math:: |g_0| / |g_N| = \sqrt{\mathrm{tr}\, G_0 / \mathrm{tr}\, G_N},

with g_0 the gradient entering the first block and g_N the one leaving the last, before the final norm.
Nothing is fitted: the inputs are widths, standard deviations, eps and which tokens are equal.

Positions are kept in blocks (`theory.grams`). With one token a block the recursion is exact in T; with growing
blocks the tokens of a block share one value, which makes T = 2048 as cheap as T = 128.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from theory.architecture import Architecture
from theory.arguments import require_tokens
from theory.gram_maps import Applied, AttentionMap, AttentionModel, FeedForwardMap, alibi_slopes, rotation_correlation
from theory.grams import Blocks, Gram, causal
from theory.routing import Routing
from theory.softmax_moments import softmax_moments
from theory.words import counted

Array = NDArray[np.float64]

MAX_LOGIT_VARIANCE = 4.0  # beyond, two softmax rows are not independent to first order in their covariance
SMALLEST_SQUARE = 1e-100  # of a normaliser; its inverse square still fits a double
MIN_DISTINCT = 16  # tokens that repeat; measured 3 to 5 % high at 16
MIN_WIDTH = 32  # narrower, fluctuations between tokens and heads are no longer small
MAX_LAYERS = 96  # docs/accuracy.md measures up to 24, where errors do not grow with depth; beyond this it is a guess


@dataclass(frozen=True, slots=True, kw_only=True)
class Growth:
    """The recursion's answer, at the places of the residual stream: the embedding, then after each update.

    A layer is two updates, one a sub-layer, or a single one if they are parallel.

    Attributes:
        value: |g_0| / |g_N|.
        residual_std: (places,) root mean square of the residual stream.
        gradient: (places,) gradient norm, over that at the last.
        branch_std: (2N,) root mean square of each sub-layer's output, attention first, before any norm or multiplier.
        in_domain: whether the large-width model is valid here; `reasons` says what is not.
    """

    value: float
    residual_std: tuple[float, ...]
    gradient: tuple[float, ...]
    branch_std: tuple[float, ...]
    in_domain: bool
    reasons: tuple[str, ...]


class _Branch(NamedTuple):
    """A sub-layer in its place: what the backward pass needs of it."""

    applied: Applied
    passed: Array  # (B,) the input norm's 1/s, or 1 without one
    kept: float  # share of the gradient that the input norm lets through
    after: Array | None  # (B,) the output norm's 1/s


class _Update(NamedTuple):
    """One update of the residual stream: its branches, and the norm after it in post-ln."""

    branches: tuple[_Branch, ...]
    after: Array | None


@np.errstate(over="ignore", invalid="ignore")  # what is not finite is reported in `reasons`
def gradient_growth(
    architecture: Architecture,
    n_tokens: int,
    *,
    tokens: NDArray[np.int64] | None = None,
    targets: NDArray[np.int64] | None = None,
    attention: AttentionModel = "expanded",
    exact: bool = False,
) -> Growth:
    """Predict gradient growth at initialisation.

    Args:
        n_tokens: sequence length T.
        tokens: (T,) token ids; equal ids share an embedding. Distinct tokens unless given.
        targets: (T,) ids of the next tokens, for the loss gradient's own correlations. Distinct unless given.
        attention: `expanded` counts the fluctuation of softmax rows around their mean, forwards and backwards;
            `uniform` does not. Both keep the gradient through the logits.
        exact: one block a position whatever the length (time grows like T^3 N).

    Raises:
        ValueError: n_tokens is below 1 or beyond the learned positions, or ids are not one for each token.
    """
    a = architecture
    n_tokens = require_tokens(n_tokens, a)
    for name, ids in (("tokens", tokens), ("targets", targets)):
        if ids is not None and np.shape(ids) != (n_tokens,):
            raise ValueError(f"{name} has shape {np.shape(ids)}; give one id for each of n_tokens={n_tokens}")
    _require_scale(a)
    blocks = Blocks.of(n_tokens, exact=exact or tokens is not None or targets is not None)
    stream = _embedding_gram(a, blocks, tokens)
    updates: list[_Update] = []
    residual_std = [_root(blocks.trace(stream) / n_tokens)]
    branch_std: list[float] = []
    logit_variance = 0.0
    for layer in range(a.n_layers):
        for names in a.updates:
            first = not updates
            branches: list[_Branch] = []
            total = stream * a.shortcut_multiplier**2
            for name in names:
                branch = _branch(a, blocks, layer, name, stream, attention, fixed=first and a.embedding_norm)
                branches.append(branch)
                output = branch.applied.output
                branch_std.append(_root(blocks.trace(output) / n_tokens))
                logit_variance = max(logit_variance, branch.applied.logit_variance)
                added = output if branch.after is None else output.over_outer(1 / branch.after)
                total = total + added * a.residual_multiplier**2
            after = None
            if a.block == "post-ln":
                total, scale = _normalise(total, a.eps)
                after = 1 / scale
            updates.append(_Update(tuple(branches), after))
            stream = total
            residual_std.append(_root(blocks.trace(stream) / n_tokens))

    final, scale = _normalise(stream, a.eps) if a.final_norm else (stream, np.ones(blocks.sizes.size))
    gradient = _head_gradient(a, final, targets).over_outer(scale)
    norms = [blocks.trace(gradient)]
    for update in reversed(updates):
        if update.after is not None:
            gradient = gradient.over_outer(1 / update.after)
        total = gradient * a.shortcut_multiplier**2
        for branch in update.branches:
            total = total + _backward(a, branch, gradient)
        gradient = total
        norms.append(blocks.trace(gradient))
    profile = tuple(_root(norm / norms[0]) for norm in reversed(norms))
    reasons = _domain(a, n_tokens, logit_variance, tokens)
    if not all(map(math.isfinite, (*profile, *residual_std))):
        reasons = (*reasons, "the recursion breaks down: a mean square overflows or comes out negative")
    return Growth(
        value=profile[0],
        residual_std=tuple(residual_std),
        gradient=profile,
        branch_std=tuple(branch_std),
        in_domain=not reasons,
        reasons=reasons,
    )


def _branch(
    a: Architecture, blocks: Blocks, layer: int, name: str, stream: Gram, model: AttentionModel, *, fixed: bool
) -> _Branch:
    """A sub-layer applied to the stream."""
    sublayer = attention_map(a, blocks, layer, model) if name == "attention" else feedforward_map(a, layer)
    kernel, passed, kept = stream, np.ones(blocks.sizes.size), 1.0
    if a.block in ("pre-ln", "peri-ln"):
        kernel, scale = _normalise(stream, a.eps)
        passed, kept = 1 / scale, _norm_gain(a, fixed_scale=fixed)
    elif a.block == "post-ln" and (layer > 0 or name != "attention"):
        kept = _norm_gain(a, fixed_scale=True)  # the norm below removes the token's own direction
    if a.norm_depth_scaling:
        kernel, passed = kernel * (1 / (layer + 1)), passed / math.sqrt(layer + 1)
    applied, after = sublayer.at(kernel), None
    if a.block in ("peri-ln", "branch-ln"):
        after = 1 / np.sqrt(applied.output.diag + a.eps)
    return _Branch(applied, passed, kept, after)


def _backward(a: Architecture, branch: _Branch, gradient: Gram) -> Gram:
    """What a branch adds to the gradient at its input."""
    inner = gradient * a.residual_multiplier**2
    if branch.after is not None:
        inner = inner.over_outer(1 / branch.after) * _norm_gain(a, fixed_scale=False)
    return branch.applied.backward(inner).over_outer(1 / branch.passed) * branch.kept


def growth_closed_form(architecture: Architecture, n_tokens: int) -> float:
    r"""Growth with uncorrelated tokens: :math:`\sqrt{1 + N b / \sigma_e^2}`, an estimate for Pre-LN.

    `b = s_2^2 m kappa(1) + c_V c_O H_T / T` is what one layer adds to the residual variance, `sigma_e^2` the
    embedding's. It ignores the correlation that attention builds up, so it is neither a bound nor sharp
    once `N b > sigma_e^2`.

    Raises:
        ValueError: n_tokens is below 1 or beyond the learned positions.
    """
    a = architecture
    n_tokens = require_tokens(n_tokens, a)
    one, zero = np.ones(1), np.zeros((1, 1))
    harmonic = float(np.sum(1 / np.arange(1, n_tokens + 1))) / n_tokens
    total = 0.0
    for layer in range(a.n_layers if a.init.layer_scaled else 1):
        feedforward = float(feedforward_map(a, layer).at(Gram(one, zero)).output.diag[0])
        total += feedforward + _value_gain(a, layer) * harmonic
    total *= 1 if a.init.layer_scaled else a.n_layers
    return math.sqrt(1 + a.residual_multiplier**2 * total / embedding_variance(a))


def attention_map(
    architecture: Architecture, blocks: Blocks, layer: int, model: AttentionModel = "expanded"
) -> AttentionMap:
    """Attention of one layer, as it acts on Gram matrices over `blocks`."""
    a = architecture
    slopes = alibi_slopes(a.n_heads) if a.positions == "alibi" else (0.0,)
    window = a.window_at(layer)
    removed = 0 if a.qk_norm == "none" else 2 if a.norm == "layernorm" else 1
    width = a.d_head if a.qk_norm == "head" else a.n_heads * a.d_head
    stds, base = a.layer_stds(layer), a.rope_base_at(layer)
    return AttentionMap(
        value=_value_gain(a, layer),
        logits=_logit_variance(a, layer),
        averagings=tuple(causal(blocks, window=window, slope=slope) for slope in slopes),
        rotation=None if base is None else _rotation(a, base, a.rope_slowing(layer), tuple(blocks.sizes.tolist())),
        qk_eps=None if a.qk_norm == "none" else a.eps / max(a.d_model * stds.query * stds.key, 1e-300),
        logit_gradient=max(1 - removed / width, 0.0),
        model=model,
    )


def feedforward_map(architecture: Architecture, layer: int) -> FeedForwardMap:
    """The feed-forward sub-layer of one layer, as it acts on Gram matrices."""
    a, stds = architecture, architecture.layer_stds(layer)
    return FeedForwardMap(
        activation=a.activation,
        enter=stds.ffn_in**2 * a.d_model,
        gate=stds.ffn_gate**2 * a.d_model if a.gated else None,
        leave=stds.ffn_out**2 * a.d_ffn,
        routing=routing(a, layer) if a.n_experts else None,
    )


def routing(architecture: Architecture, layer: int) -> Routing:
    """The router of one layer."""
    a = architecture
    return Routing(
        experts=a.n_experts,
        chosen=a.experts_per_token,
        gain=a.layer_stds(layer).router ** 2 * a.d_model,
        renormalised=a.gates_renormalised,
    )


@lru_cache(maxsize=32)
def _rotation(architecture: Architecture, base: float, slowing: tuple[float, ...], sizes: tuple[float, ...]) -> Gram:
    a, size = architecture, np.array(sizes)
    distances = Blocks(size, np.concatenate([[0.0], np.cumsum(size)[:-1]])).distances()
    return rotation_correlation(a.d_head, a.rope_width, base, distances, slowing)


def _value_gain(architecture: Architecture, layer: int) -> float:
    """c_V c_O: variance gain of the value and output matrices together."""
    stds, heads = architecture.layer_stds(layer), architecture.n_heads * architecture.d_head
    return architecture.d_model * stds.value**2 * heads * stds.output**2


def _logit_variance(architecture: Architecture, layer: int = 0) -> float:
    """a, the variance of an attention logit between normalised, uncorrelated tokens.

    (scale^2 d_h) c_Q c_K, where QK-norm makes c_Q = c_K = 1. A soft-cap c tanh(z/c) multiplies the logits' covariance
    by the square of its mean slope (the first term of its Hermite series).
    """
    a, stds = architecture, architecture.layer_stds(layer)
    products = 1.0 if a.qk_norm != "none" else (a.d_model * stds.query * stds.key) ** 2
    variance = a.logit_scale**2 * a.d_head * products
    if a.attention_softcap > 0:
        nodes, weights = np.polynomial.hermite_e.hermegauss(64)
        slopes = 1 / np.cosh(np.clip(math.sqrt(variance) * nodes / a.attention_softcap, -300, 300)) ** 2
        variance *= float(slopes @ weights / weights.sum()) ** 2
    return variance


def embedding_variance(architecture: Architecture) -> float:
    """Mean square of the residual stream entering the first block, for one token at one position."""
    raw = _raw_variance(architecture)
    return raw / (raw + architecture.eps) if architecture.embedding_norm else raw


def _raw_variance(architecture: Architecture) -> float:
    """Mean square of an embedding before its norm, if it has one; positions included."""
    raw = (architecture.embedding_multiplier * architecture.stds.embedding) ** 2
    if architecture.positions == "learned":
        raw += architecture.stds.position**2
    return raw + (0.5 if architecture.positions == "sinusoidal" else 0.0)


def _root(square: float) -> float:
    """Square root; not a number where the expansion in the logits, far outside its domain, made a square negative."""
    return math.sqrt(square) if square >= 0 else math.nan


def _require_scale(architecture: Architecture) -> None:
    raw = _raw_variance(architecture)
    if raw + architecture.eps < SMALLEST_SQUARE:
        raise ValueError(
            f"embeddings of std {math.sqrt(raw):g} with eps={architecture.eps:g} leave a normalisation nothing to "
            "divide by; use eps=1e-5, or a larger standard deviation (initializer_range)"
        )


def _domain(
    architecture: Architecture, n_tokens: int, logit_variance: float, tokens: NDArray[np.int64] | None
) -> tuple[str, ...]:
    reasons: list[str] = []
    if logit_variance > MAX_LOGIT_VARIANCE:
        reasons.append(f"attention logits have variance {logit_variance:.3g}, above {MAX_LOGIT_VARIANCE}")
    if architecture.d_model < MIN_WIDTH:
        reasons.append(f"d_model={architecture.d_model} is below {MIN_WIDTH}, too narrow for a large-width prediction")
    if architecture.n_layers > MAX_LAYERS:
        reasons.append(
            f"{architecture.n_layers} layers are more than {MAX_LAYERS}: how the recursion's error adds up over so "
            "many was never measured"
        )
    if tokens is None and architecture.vocab_size < n_tokens:
        reasons.append(
            f"a vocabulary of {architecture.vocab_size} has no {n_tokens} distinct tokens, which the prediction assumes"
        )
    if architecture.norm_depth_scaling and architecture.block != "pre-ln":
        reasons.append(f"LayerNorm scaling is predicted with pre-ln alone, not with {architecture.block}")
    if tokens is not None and (distinct := np.unique(tokens).size) < min(MIN_DISTINCT, tokens.size):
        # A row that averages few different values does not lose its fluctuations: measured 27 % off at 4 tokens.
        repeat = counted(distinct, "distinct token repeats", "distinct tokens repeat")
        reasons.append(f"{repeat} over the sequence, fewer than {MIN_DISTINCT}")
    return tuple(reasons)


def _embedding_gram(architecture: Architecture, blocks: Blocks, tokens: NDArray[np.int64] | None) -> Gram:
    a, n = architecture, blocks.sizes.size
    off = np.zeros((n, n)) if tokens is None else (tokens[:, None] == tokens[None, :]).astype(np.float64)
    raw = (a.embedding_multiplier * a.stds.embedding) ** 2
    gram = Gram(np.full(n, raw), raw * off)
    # Positions are added before an embedding norm, so that the norm sees both.
    if a.positions == "learned":
        gram = gram + Gram(np.full(n, a.stds.position**2), np.zeros((n, n)))
    elif a.positions == "sinusoidal":
        gram = gram + _sinusoidal_gram(a, blocks)
    return _normalise(gram, a.eps)[0] if a.embedding_norm else gram


def _sinusoidal_gram(architecture: Architecture, blocks: Blocks) -> Gram:
    """Gram matrix of the fixed sine and cosine table, less its mean over coordinates if a LayerNorm removes it."""
    half = architecture.d_model // 2
    angles = 10_000.0 ** (-2 * np.arange(half) / architecture.d_model)
    middle = blocks.starts + (blocks.sizes - 1) / 2
    phase = np.outer(middle, angles)
    table = np.concatenate([np.sin(phase), np.cos(phase)], axis=1)
    if architecture.norm == "layernorm":
        table = table - table.mean(axis=1, keepdims=True)
    off = table @ table.T / table.shape[1]
    return Gram(np.diagonal(off).copy(), off)


def _head_gradient(architecture: Architecture, final: Gram, targets: NDArray[np.int64] | None) -> Gram:
    """Gram of the loss gradient at the head's input, up to a factor: (y - p_t).(y' - p_t') over the vocabulary.

    y is a target, p_t the predicted distribution: a softmax of independent logits, whose covariance between tokens is
    `final`, the Gram matrix of the head's input.
    """
    a, n = architecture, final.diag.size
    if targets is None:
        return Gram(np.ones(n), np.zeros((n, n)))
    variance = (a.logit_multiplier * a.stds.head) ** 2 * a.d_model
    vocabulary = np.array(float(a.vocab_size))
    together = final.off / np.sqrt(np.outer(final.diag, final.diag))
    gains = softmax_moments(vocabulary, variance * np.abs(together)).gain * np.sign(together)
    itself = float(softmax_moments(vocabulary, np.array(variance)).gain)
    rest = 1 - 1 / a.vocab_size
    same = (targets[:, None] == targets[None, :]).astype(np.float64)
    return Gram(
        1 + (rest * itself - 1) / a.vocab_size * np.ones(n),
        same + (rest * gains - 1) / a.vocab_size,
    )


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
