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
from theory.embedding_gram import (
    SMALLEST_SQUARE,
    Stream,
    embedding_gram,
    embedding_variance,
    raw_variance,
    require_scale,
)
from theory.gram_maps import Applied, AttentionModel
from theory.grams import Blocks, Gram, normalised
from theory.head import behind_norm, head_gradient, head_tilt, head_variance, own_gradient, own_word
from theory.logits import norm_gain
from theory.scatter import (
    inner_loss,
    output_norm_error,
    output_norm_gain,
    own_gain,
    post_norm,
    scatter,
    stream_scatter,
)
from theory.sublayer_maps import attention_map, feedforward_map, value_gain

Array = NDArray[np.float64]


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


class _Branch(NamedTuple):
    """A sub-layer in its place: what the backward pass needs of it."""

    name: str
    applied: Applied
    passed: Array  # (B,) the input norm's 1/s, or 1 without one
    kept: float  # share of the gradient that the input norm lets through, over LayerNorm scaling's divisor
    after: Array | None  # (B,) the output norm's 1/s
    size: Array  # (B,) mean square of what it adds to the stream
    lacking: float  # share of eps in what the norm before it divides by; 1 without one

    @property
    def factor(self) -> Array:
        """(B,) what multiplies the output on its way to the stream: the output norm's 1/s, or 1 without one."""
        return np.ones(self.size.size) if self.after is None else self.after

    @property
    def loose(self) -> Array:
        """(B,) share of a gradient along the output that the output norm leaves, by its eps; 1 without one."""
        return np.ones(self.size.size) if self.after is None else 1 - self.applied.output.diag * self.after**2

    @property
    def fixed(self) -> float:
        """Part of the output's mean square that the output norm makes 1, eps not in it; 0 without one."""
        return 0.0 if self.after is None else float(np.mean(self.applied.output.diag * self.after**2))


class _Update(NamedTuple):
    """One update of the residual stream: its branches, and the norm after it in post-ln.

    after: (B,) root of the norm's backward gain, E[1/s^2] in it. kept: share of the gradient along the shortcut that
    the norm below lets through; what the norm above took out is nearly the direction that it takes out itself.
    stream: (B,) mean square of the sum.
    """

    branches: tuple[_Branch, ...]
    after: Array | None
    kept: float
    stream: Array


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardPass:
    """The recursion up to the head, with what its way back needs.

    Attributes:
        stream: Gram matrix of the residual stream at its end, as the final norm sees it.
        residual_std, branch_std: as in `Growth`.
        logit_variance, uneven, qk_kept: largest two and smallest of `gram_maps.Applied`, of all layers.
        stream_scatter: largest relative variance of a token's mean square, as tokens have it on average.
        own: root mean square of what a token's embedding has become in its stream.
    """

    architecture: Architecture
    n_tokens: int
    blocks: Blocks
    tokens: NDArray[np.int64] | None
    distinct: bool
    updates: tuple[_Update, ...]
    stream: Gram
    residual_std: tuple[float, ...]
    branch_std: tuple[float, ...]
    logit_variance: float
    uneven: float
    qk_kept: float
    stream_scatter: float
    own: float

    @np.errstate(over="ignore", invalid="ignore")  # what is not finite is reported in `reasons`
    def growth(self, targets: NDArray[np.int64] | None = None) -> Growth:
        """The way back from the loss, and whether all of it is in the model's domain."""
        a, blocks, residual_std = self.architecture, self.blocks, self.residual_std
        n_blocks = blocks.sizes.size
        final, scale = normalised(self.stream, a.eps) if a.final_norm else (self.stream, np.ones(n_blocks))
        own_share = np.clip((self.own / np.sqrt(np.maximum(self.stream.diag, SMALLEST_SQUARE))) ** 2, 0.0, 1.0)
        own = own_word(a, final, own_share) if a.tied else np.zeros(n_blocks)
        isotropic = head_gradient(a, final, targets, distinct=self.distinct)
        along = head_tilt(a, final) * np.maximum(1 - own, 0.0)  # the gradient's part along the stream x, over x
        if a.final_norm:
            along = behind_norm(along, final.diag, own, own_share) / scale**2
        isotropic, row = isotropic.over_outer(scale), own / scale
        gradient = isotropic + own_gradient(self.stream, along, row, own_share)
        norms = [blocks.trace(gradient)]
        if a.block == "post-ln":  # the last norm of its layers takes that out too, with the mean
            along = behind_norm(along, self.stream.diag, row, own_share)
            kept = 1.0 if a.final_norm else norm_gain(a.norm, a.d_model, fixed_scale=True)
            gradient = isotropic * kept + own_gradient(self.stream, along, row, own_share)
        whole = blocks.total(gradient)
        running = blocks.total(self.stream.outer(along)) / whole if whole > 0 else 0.0
        # Each norm takes its token's direction out: over the places of a token's gradient, the sum of |g|^2/|x|^2.
        radial = gradient.diag / scale**2 if a.final_norm else np.zeros(n_blocks)
        scattered, below_norms, aligned, through = 0.0, 0.0, 0.0, {"attention": 0.0, "feedforward": 0.0}
        for update in reversed(self.updates):
            if update.after is not None:
                gradient = gradient.over_outer(1 / update.after)
                radial = gradient.diag * update.after**2
                along = along * update.after**2
            total, below = gradient * a.shortcut_multiplier**2 * update.kept, radial * a.shortcut_multiplier**4
            passed: dict[str, float] = {}
            for branch in update.branches:
                # Of what runs along its output its norm leaves the eps, and its own weights send back more.
                own_part = branch.applied.output.outer(along * branch.factor * a.residual_multiplier)
                sent = own_part.outer(branch.loose) * own_gain(a, branch.name, branch.lacking)
                reached = gradient - own_part + sent
                added = _backward(a, branch, reached, _share(branch.size * radial, gradient.diag))
                total = total + added
                if a.block in ("pre-ln", "peri-ln"):
                    below = below + added.diag * branch.passed**2
                passed[branch.name] = blocks.trace(added)
            gradient, radial, along = total, below, along * a.shortcut_multiplier**2
            norms.append(blocks.trace(gradient))
            passed = {name: part / norms[-1] if norms[-1] else 0.0 for name, part in passed.items()}
            shares = [passed.get(name, 0.0) for name in through]
            scattered += float(scatter(a, *map(np.array, shares)))
            below_norms += output_norm_error(a, *shares)
            for name, part in passed.items():
                through[name] += part
            for branch in update.branches:
                part = float(np.mean(_share(branch.size, update.stream))) * branch.lacking * (1 - branch.fixed)
                aligned += (running + aligned) * passed[branch.name] * part * growth_domain.alignment(a, branch.name)
            if a.block == "post-ln":
                lacking = update.branches[-1].lacking
                along, running = along * lacking, running * lacking**2
        profile = tuple(_root(norm / norms[0]) if norms[0] else math.nan for norm in reversed(norms))
        entering = blocks.trace(final) / self.n_tokens
        written = {name: float(np.sum(np.square(self.branch_std[n::2]))) for n, name in enumerate(through)}
        reasons = growth_domain.reasons(
            a,
            self.n_tokens,
            logit_variance=self.logit_variance,
            qk_kept=self.qk_kept,
            attention_squared=self._attention_squared(),
            scattered=scattered,
            stream=self.stream_scatter,
            norms=below_norms,
            head_variance=head_variance(a, entering),
            along_own=growth_domain.along_own(
                a, self.n_tokens, float(np.mean(own**2)), float(np.mean(own_share)), written, through
            ),
            aligned=aligned,
            block=int(np.max(blocks.sizes)),
            uneven=self.uneven,
            tokens=self.tokens,
        )
        if not all(map(math.isfinite, (*profile, *residual_std))):
            reasons = (*reasons, "the recursion breaks down: a mean square overflows or comes out negative")
        return Growth(
            value=profile[0],
            residual_std=residual_std,
            gradient=profile,
            branch_std=self.branch_std,
            in_domain=not reasons,
            reasons=reasons,
        )

    def _attention_squared(self) -> float:
        """Sum over the layers of the squared share of their attention in the stream's mean square at its end."""
        a, steps = self.architecture, len(self.architecture.updates)
        left = steps * (a.n_layers - np.arange(a.n_layers)) - 1  # updates that are still to come
        shares = np.array(self.branch_std[::2]) / max(self.residual_std[-1], math.sqrt(SMALLEST_SQUARE))
        return float(np.sum((shares * a.residual_multiplier * np.float64(a.shortcut_multiplier) ** left) ** 4))


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
    return forward.growth(targets)


@np.errstate(over="ignore", invalid="ignore")
def forward_pass(
    architecture: Architecture,
    n_tokens: int,
    *,
    tokens: NDArray[np.int64] | None = None,
    attention: AttentionModel = "expanded",
    exact: bool = False,
    distinct: bool = False,
) -> ForwardPass:
    """The residual stream at initialisation, and from there `growth`; arguments as in `gradient_growth`.

    Raises:
        ValueError: n_tokens is below 1 or beyond the learned positions, or tokens are not one for each.
    """
    a = architecture
    n_tokens = require_tokens(n_tokens, a)
    if tokens is not None and np.shape(tokens) != (n_tokens,):
        raise ValueError(f"tokens has shape {np.shape(tokens)}; give one id for each of n_tokens={n_tokens}")
    require_scale(a)
    largest = growth_domain.largest_block(a, n_tokens)
    blocks = Blocks.of(n_tokens, exact=exact or tokens is not None, largest=largest)
    stream = embedding_gram(a, blocks, tokens, distinct=distinct)
    updates: list[_Update] = []
    residual_std = [_root(blocks.trace(stream.varied) / n_tokens)]
    branch_std: list[float] = []
    scattered, most = np.zeros(blocks.sizes.size), 0.0
    logit_variance, uneven, qk_kept = 0.0, 0.0, 1.0
    own = a.embedding_multiplier * a.stds.embedding  # size of a token's embedding in the stream
    if a.embedding_norm:
        own /= math.sqrt(raw_variance(a) + a.eps)
    for layer in range(a.n_layers):
        for names in a.updates:
            first = not updates
            branches: list[_Branch] = []
            total = stream.scaled(a.shortcut_multiplier**2)
            own *= a.shortcut_multiplier
            for name in names:
                branch = _branch(a, blocks, layer, name, stream, attention, fixed=first and a.embedding_norm)
                output = branch.applied.output
                branch_std.append(_root(blocks.trace(output) / n_tokens))
                logit_variance = max(logit_variance, branch.applied.logit_variance)
                uneven = max(uneven, branch.applied.uneven)
                qk_kept = min(qk_kept, branch.applied.qk_kept)
                added = output if branch.after is None else output.over_outer(1 / branch.after)
                added = added * a.residual_multiplier**2
                total = total._replace(varied=total.varied + added)
                branches.append(branch._replace(size=added.diag))
            seen = total.read(a.norm).diag
            sizes = {branch.name: branch.size for branch in branches}
            shares = [_share(sizes.get(n, np.zeros_like(scattered)), seen) for n in ("attention", "feedforward")]
            gates = sum(b.applied.routed[1].scatter for b in branches if b.applied.routed is not None)
            fixed = {branch.name: branch.fixed for branch in branches}
            loose = 1 - fixed.get("attention", 0.0), 1 - fixed.get("feedforward", 0.0)
            scattered = stream_scatter(a, scattered, *shares, loose=loose, gates=gates)
            most = max(most, float(blocks.sizes @ scattered) / n_tokens)
            after, kept = None, 1.0
            if a.block == "post-ln":
                scattered = np.zeros_like(scattered)
                gain, kept = post_norm(a, *shares, first=first and not a.embedding_norm)
                if first:
                    kept = 1.0  # no norm is below
                total, scale = total.normalised(a.norm, a.eps)
                after = np.sqrt(gain) / scale
                own /= _root(float(np.mean(scale**2)))
            updates.append(_Update(tuple(branches), after, kept, seen))
            stream = total
            residual_std.append(_root(blocks.trace(stream.varied) / n_tokens))
    return ForwardPass(
        architecture=a,
        n_tokens=n_tokens,
        blocks=blocks,
        tokens=tokens,
        distinct=distinct,
        updates=tuple(updates),
        stream=stream.read(a.norm if a.final_norm else None),
        residual_std=tuple(residual_std),
        branch_std=tuple(branch_std),
        logit_variance=logit_variance,
        uneven=uneven,
        qk_kept=qk_kept,
        stream_scatter=most,
        own=own,
    )


def _branch(
    a: Architecture, blocks: Blocks, layer: int, name: str, stream: Stream, model: AttentionModel, *, fixed: bool
) -> _Branch:
    """A sub-layer applied to the stream."""
    sublayer = attention_map(a, blocks, layer, model) if name == "attention" else feedforward_map(a, layer)
    normed, below = a.block in ("pre-ln", "peri-ln"), a.block == "post-ln" and (layer > 0 or name != "attention")
    kernel, passed, kept = stream.read(a.norm if normed else None), np.ones(blocks.sizes.size), 1.0
    if normed:
        kernel, scale = normalised(kernel, a.eps)
        passed, kept = 1 / scale, norm_gain(a.norm, a.d_model, fixed_scale=fixed)
    elif below:
        kept = norm_gain(a.norm, a.d_model, fixed_scale=True)  # the norm below removes the token's own direction
    lacking = max(1 - float(np.mean(kernel.diag)), 0.0) if normed or below else 1.0
    if a.norm_depth_scaling:
        kernel, kept = kernel * (1 / (layer + 1)), kept / (layer + 1)
    applied, after = sublayer.at(kernel), None
    if a.block in ("peri-ln", "branch-ln"):
        after = 1 / np.sqrt(applied.output.diag + a.eps)
    return _Branch(name, applied, passed, kept, after, applied.output.diag, lacking)


def _backward(a: Architecture, branch: _Branch, gradient: Gram, radial: Array) -> Gram:
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


def _share(part: Array, whole: Array) -> Array:
    """Elementwise, and 0 where the whole is."""
    return np.clip(part / np.where(whole > 0, whole, 1.0), 0.0, 1.0)


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


def _root(square: float) -> float:
    """Square root; not a number where the expansion in the logits, far outside its domain, made a square negative."""
    return math.sqrt(square) if square >= 0 else math.nan
