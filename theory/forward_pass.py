"""The residual stream's Gram matrix from the embedding to the head, with what the gradient's way back needs.

Positions are kept in blocks (`theory.grams`); (B,) is one number a block.
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
from theory.embedding_gram import SMALLEST_SQUARE, Stream, embedding_gram, raw_variance, require_scale
from theory.gram_maps import Applied, AttentionModel
from theory.grams import Blocks, Gram, normalised
from theory.logits import norm_gain
from theory.scatter import post_norm, stream_scatter
from theory.sublayer_maps import attention_map, feedforward_map

Array = NDArray[np.float64]


class Branch(NamedTuple):
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


class Update(NamedTuple):
    """One update of the residual stream: its branches, and the norm after it in post-ln.

    after: (B,) root of the norm's backward gain, E[1/s^2] in it. kept: share of the gradient along the shortcut that
    the norm below lets through; what the norm above took out is nearly the direction that it takes out itself.
    stream: (B,) mean square of the sum.
    """

    branches: tuple[Branch, ...]
    after: Array | None
    kept: float
    stream: Array


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardPass:
    """The recursion up to the head, with what its way back needs.

    Attributes:
        stream: Gram matrix of the residual stream at its end, as the final norm sees it.
        residual_std, branch_std: as in `theory.growth.Growth`.
        logit_variance, uneven, qk_kept: largest two and smallest of `gram_maps.Applied`, of all layers.
        stream_scatter: largest relative variance of a token's mean square, as tokens have it on average.
        own: root mean square of what a token's embedding has become in its stream.
    """

    architecture: Architecture
    n_tokens: int
    blocks: Blocks
    tokens: NDArray[np.int64] | None
    distinct: bool
    updates: tuple[Update, ...]
    stream: Gram
    residual_std: tuple[float, ...]
    branch_std: tuple[float, ...]
    logit_variance: float
    uneven: float
    qk_kept: float
    stream_scatter: float
    own: float

    @property
    def attention_squared(self) -> float:
        """Sum over the layers of the squared share of their attention in the stream's mean square at its end."""
        a, steps = self.architecture, len(self.architecture.updates)
        left = steps * (a.n_layers - np.arange(a.n_layers)) - 1  # updates that are still to come
        shares = np.array(self.branch_std[::2]) / max(self.residual_std[-1], math.sqrt(SMALLEST_SQUARE))
        return float(np.sum((shares * a.residual_multiplier * np.float64(a.shortcut_multiplier) ** left) ** 4))


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
    """The residual stream at initialisation, which `theory.growth` goes back from; arguments as there.

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
    updates: list[Update] = []
    residual_std = [root(blocks.trace(stream.varied) / n_tokens)]
    branch_std: list[float] = []
    scattered, most = np.zeros(blocks.sizes.size), 0.0
    logit_variance, uneven, qk_kept = 0.0, 0.0, 1.0
    own = a.embedding_multiplier * a.stds.embedding  # size of a token's embedding in the stream
    if a.embedding_norm:
        own /= math.sqrt(raw_variance(a) + a.eps)
    for layer in range(a.n_layers):
        for names in a.updates:
            first = not updates
            branches: list[Branch] = []
            total = stream.scaled(a.shortcut_multiplier**2)
            own *= a.shortcut_multiplier
            for name in names:
                branch = _branch(a, blocks, layer, name, stream, attention, fixed=first and a.embedding_norm)
                output = branch.applied.output
                branch_std.append(root(blocks.trace(output) / n_tokens))
                logit_variance = max(logit_variance, branch.applied.logit_variance)
                uneven = max(uneven, branch.applied.uneven)
                qk_kept = min(qk_kept, branch.applied.qk_kept)
                added = output if branch.after is None else output.over_outer(1 / branch.after)
                added = added * a.residual_multiplier**2
                total = total._replace(varied=total.varied + added)
                branches.append(branch._replace(size=added.diag))
            seen = total.read(a.norm).diag
            sizes = {branch.name: branch.size for branch in branches}
            shares = [share(sizes.get(n, np.zeros_like(scattered)), seen) for n in ("attention", "feedforward")]
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
                own /= root(float(np.mean(scale**2)))
            updates.append(Update(tuple(branches), after, kept, seen))
            stream = total
            residual_std.append(root(blocks.trace(stream.varied) / n_tokens))
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
) -> Branch:
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
    return Branch(name, applied, passed, kept, after, applied.output.diag, lacking)


def share(part: Array, whole: Array) -> Array:
    """Elementwise, and 0 where the whole is."""
    return np.clip(part / np.where(whole > 0, whole, 1.0), 0.0, 1.0)


def root(square: float) -> float:
    """Square root; not a number where the expansion in the logits, far outside its domain, made a square negative."""
    return math.sqrt(square) if square >= 0 else math.nan
