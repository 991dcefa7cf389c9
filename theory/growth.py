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
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from theory import growth_domain
from theory.architecture import Architecture
from theory.arguments import require_tokens
from theory.embedding_gram import SMALLEST_SQUARE, embedding_variance
from theory.forward_pass import Branch, ForwardPass, Update, forward_pass, root, share
from theory.gram_maps import AttentionModel
from theory.grams import Gram, normalised
from theory.head import behind_norm, head_gradient, head_tilt, head_variance, own_gradient, own_word
from theory.logits import norm_gain
from theory.scatter import inner_loss, output_norm_error, output_norm_gain, own_gain, scatter
from theory.sublayer_maps import feedforward_map, value_gain

Array = NDArray[np.float64]
SUBLAYERS: tuple[str, ...] = ("attention", "feedforward")


@dataclass(frozen=True, slots=True, kw_only=True)
class Growth:
    """The recursion's answer, at the places of the residual stream: the embedding, then after each update.

    A layer is two updates, one a sub-layer, or a single one if they are parallel.

    Attributes:
        value: |g_0| / |g_N|.
        residual_std: (places,) over the entries of a token, mean removed; its square averaged over tokens.
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


def gradient_growth(
    architecture: Architecture,
    n_tokens: int,
    *,
    tokens: NDArray[np.int64] | None = None,
    targets: NDArray[np.int64] | None = None,
    attention: AttentionModel = "expanded",
    exact: bool = False,
    distinct: bool = False,
) -> Growth:
    """Predict gradient growth at initialisation.

    Args:
        n_tokens: sequence length T.
        tokens: (T,) token ids; equal ids share an embedding. Random unless given: two are equal once in V.
        targets: (T,) ids of the next tokens, for the loss gradient's own correlations. Random unless given.
        attention: `expanded` counts the fluctuation of softmax rows around their mean, forwards and backwards;
            `uniform` does not. Both keep the gradient through the logits.
        distinct: the tokens, and the targets, are known to be distinct.
        exact: one block a position whatever the length (time grows like T^3 N).

    Raises:
        ValueError: n_tokens is below 1 or beyond the learned positions, or ids are not one for each token.
    """
    n_tokens = require_tokens(n_tokens, architecture)
    if targets is not None and np.shape(targets) != (n_tokens,):
        raise ValueError(f"targets has shape {np.shape(targets)}; give one id for each of n_tokens={n_tokens}")
    forward = forward_pass(
        architecture,
        n_tokens,
        tokens=tokens,
        attention=attention,
        exact=exact or targets is not None,
        distinct=distinct,
    )
    return backward_pass(forward, targets)


class _Arriving(NamedTuple):
    """The gradient as it arrives from the head at the end of the stream, below the last norms.

    gradient: the final norm behind it, in post-ln the last layer's too. norm: its trace before the latter. along: (B,)
    its part along the stream x, over x. radial: (B,) over the places of a token's gradient, the sum of |g|^2/|x|^2 that
    norms take out. own, own_share: (B,) the part along a token's own embedding, and that embedding's share in x.
    entering: mean square of what the head reads.
    """

    gradient: Gram
    norm: float
    along: Array
    radial: Array
    own: Array
    own_share: Array
    entering: float


def _arriving(forward: ForwardPass, targets: NDArray[np.int64] | None) -> _Arriving:
    a, stream, n_blocks = forward.architecture, forward.stream, forward.blocks.sizes.size
    final, scale = normalised(stream, a.eps) if a.final_norm else (stream, np.ones(n_blocks))
    own_share = np.clip((forward.own / np.sqrt(np.maximum(stream.diag, SMALLEST_SQUARE))) ** 2, 0.0, 1.0)
    own = own_word(a, final, own_share) if a.tied else np.zeros(n_blocks)
    isotropic = head_gradient(a, final, targets, distinct=forward.distinct)
    along = head_tilt(a, final) * np.maximum(1 - own, 0.0)
    if a.final_norm:
        along = behind_norm(along, final.diag, own, own_share) / scale**2
    isotropic, row = isotropic.over_outer(scale), own / scale
    gradient = isotropic + own_gradient(stream, along, row, own_share)
    norm = forward.blocks.trace(gradient)
    if a.block == "post-ln":  # the last norm of its layers takes that out too, with the mean
        along = behind_norm(along, stream.diag, row, own_share)
        kept = 1.0 if a.final_norm else norm_gain(a.norm, a.d_model, fixed_scale=True)
        gradient = isotropic * kept + own_gradient(stream, along, row, own_share)
    radial = gradient.diag / scale**2 if a.final_norm else np.zeros(n_blocks)
    return _Arriving(gradient, norm, along, radial, own, own_share, forward.blocks.trace(final) / forward.n_tokens)


@np.errstate(over="ignore", invalid="ignore")  # what is not finite is reported in `reasons`
def backward_pass(forward: ForwardPass, targets: NDArray[np.int64] | None = None) -> Growth:
    """The way back from the loss, and whether all of it is in the model's domain; targets as in `gradient_growth`."""
    a, blocks = forward.architecture, forward.blocks
    end = _arriving(forward, targets)
    gradient, along, radial = end.gradient, end.along, end.radial
    whole = blocks.total(gradient)
    running = blocks.total(forward.stream.outer(along)) / whole if whole > 0 else 0.0
    norms, scattered, below_norms, aligned = [end.norm], 0.0, 0.0, 0.0
    through = dict.fromkeys(SUBLAYERS, 0.0)  # share of the gradient that came through them, summed over layers
    for update in reversed(forward.updates):
        if update.after is not None:
            gradient = gradient.over_outer(1 / update.after)
            radial = gradient.diag * update.after**2
            along = along * update.after**2
        added = {branch.name: _added(a, branch, gradient, along, radial) for branch in update.branches}
        below = radial * a.shortcut_multiplier**4
        if a.block in ("pre-ln", "peri-ln"):
            for branch in update.branches:
                below = below + added[branch.name].diag * branch.passed**2
        gradient = sum(added.values(), gradient * a.shortcut_multiplier**2 * update.kept)
        radial, along = below, along * a.shortcut_multiplier**2
        norms.append(blocks.trace(gradient))
        passed = {name: blocks.trace(part) / norms[-1] if norms[-1] else 0.0 for name, part in added.items()}
        shares = [passed.get(name, 0.0) for name in SUBLAYERS]
        scattered += float(scatter(a, *map(np.array, shares)))
        below_norms += output_norm_error(a, *shares)
        for name, part in passed.items():
            through[name] += part
        for branch in update.branches:
            aligned += (running + aligned) * passed[branch.name] * _aligned(a, branch, update)
        if a.block == "post-ln":
            lacking = update.branches[-1].lacking
            along, running = along * lacking, running * lacking**2
    written = {name: float(np.sum(np.square(forward.branch_std[n::2]))) for n, name in enumerate(SUBLAYERS)}
    along_own = growth_domain.along_own(
        a, forward.n_tokens, float(np.mean(end.own**2)), float(np.mean(end.own_share)), written, through
    )
    reasons = growth_domain.reasons(
        a,
        forward.n_tokens,
        logit_variance=forward.logit_variance,
        qk_kept=forward.qk_kept,
        attention_squared=forward.attention_squared,
        scattered=scattered,
        stream=forward.stream_scatter,
        norms=below_norms,
        head_variance=head_variance(a, end.entering),
        along_own=along_own,
        aligned=aligned,
        block=int(np.max(blocks.sizes)),
        uneven=forward.uneven,
        tokens=forward.tokens,
    )
    profile = tuple(root(norm / norms[0]) if norms[0] else math.nan for norm in reversed(norms))
    if not all(map(math.isfinite, (*profile, *forward.residual_std))):
        reasons = (*reasons, "the recursion breaks down: a mean square overflows or comes out negative")
    return Growth(
        value=profile[0],
        residual_std=forward.residual_std,
        gradient=profile,
        branch_std=forward.branch_std,
        in_domain=not reasons,
        reasons=reasons,
    )


def _added(a: Architecture, branch: Branch, gradient: Gram, along: Array, radial: Array) -> Gram:
    """What a branch adds to the gradient at its input: of `gradient` behind it, with its part along the stream."""
    # Of what runs along its output its norm leaves the eps, and its own weights send back more.
    own_part = branch.applied.output.outer(along * branch.factor * a.residual_multiplier)
    sent = own_part.outer(branch.loose) * own_gain(a, branch.name, branch.lacking)
    return _backward(a, branch, gradient - own_part + sent, share(branch.size * radial, gradient.diag))


def _aligned(a: Architecture, branch: Branch, update: Update) -> float:
    """The error's factor where a gradient runs along what a branch writes, for a share of 1 that comes through it."""
    written = float(np.mean(share(branch.size, update.stream))) * branch.lacking * (1 - branch.fixed)
    return written * growth_domain.alignment(a, branch.name)


def _backward(a: Architecture, branch: Branch, gradient: Gram, radial: Array) -> Gram:
    """What a branch adds to the gradient at its input.

    radial: (B,) squared cosine of its output with what the norms above took out, at a branch without a norm of its own.
    """
    inner = gradient * a.residual_multiplier**2
    if branch.after is not None:
        inner = inner.over_outer(1 / branch.after) * (1 + branch.fixed * (output_norm_gain(a, branch.name) - 1))
    elif a.block == "post-ln":
        inner = inner * (1 / (1 + inner_loss(a, branch.name) * float(np.mean(radial))))
    found, routed = branch.applied.backward(inner), branch.applied.routed
    if routed is not None:
        slopes, own = routed
        lost = radial * own.radial
        seen = Gram(lost, np.sqrt(np.outer(lost, lost))) if branch.after is None else branch.fixed * (1 - own.normed)
        found = found - inner * (slopes * seen)
    return found.over_outer(1 / branch.passed) * branch.kept


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
        total += feedforward + value_gain(a, layer) * harmonic
    total *= 1 if a.init.layer_scaled else a.n_layers
    return math.sqrt(1 + a.residual_multiplier**2 * total / embedding_variance(a))
