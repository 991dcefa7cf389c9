"""Where the growth recursion is valid: what it takes from infinite width, and how far a configuration is from that.

The limits are conventions of validity. Each is tested just inside it, by a network that is built and measured, and just
outside it, by the recursion's own answer; no prediction depends on them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from theory.architecture import Architecture
from theory.embedding_gram import raw_variance
from theory.logits import normalised_widths
from theory.scatter import units
from theory.softmax_moments import square_scatter
from theory.words import counted

MAX_LOGIT_VARIANCE = 4.0  # beyond, two softmax rows are not independent to first order in their covariance
SHARP_LOGITS = "attention logits have variance"  # so begins the reason; `theory.remedies` has its remedy
# Positions in blocks, of a value each. What attends to few neighbours sees more of them than a block's mean, by up to
# 38 % at a window of 2; in blocks of an eighth of the window by 2 % at logits of variance 4, and from windows of 64 on
# in any. Each of ALiBi's heads decays within a few tokens: 5 % off at logits of variance 1, 15 % at 4.
BLOCK_OF_WINDOW, MAX_BLOCKS, WIDE_WINDOW = 8, 512, 64
MAX_COARSE_LOGITS = 1.0
# A token that fills much of a row varies less against it than others do, and loses weight: a relative shift d of the
# mean row, taken to first order. A square has (1 + d + d^2/2)^2 = 1 + 2 d + 2 d^2, a growth d^2: the stated accuracy.
MAX_UNEVEN = 0.08
MIN_DISTINCT = 16  # tokens that repeat; measured 3 to 5 % high at 16
MIN_WIDTH = 32  # narrower, fluctuations between tokens and heads are no longer small
MIN_QK_HEAD = 8  # n normal numbers' inverse square length scatters without bound for n < 5; measured 27 % off at 4
MAX_LAYERS = 96  # docs/accuracy.md measures up to 24, where errors do not grow with depth; beyond this it is a guess

# A log-normal's geometric mean lies below its root mean square by the variance of its logarithm, v/4 where that of its
# square is v: 8 %, the stated accuracy. Measured errors: below 10 % inside; 20 to 180 % at 0.6 to 5.
MAX_SCATTER = 0.32
# A norm divides by a mean square that is not every token's: E[1/s^2] E[s^2] = 1 + v of the square, and 8 % are v/2.
MAX_STREAM_SCATTER = 0.16
MAX_MISSED = 0.16  # share of the squared growth that is known to be left out: 8 % of the growth


def reasons(
    architecture: Architecture,
    n_tokens: int,
    *,
    logit_variance: float,
    qk_kept: float,
    attention_squared: float,
    scattered: float,
    stream: float,
    norms: float,
    head_variance: float,
    along_own: float,
    aligned: float,
    block: int,
    uneven: float,
    tokens: NDArray[np.int64] | None,
) -> tuple[str, ...]:
    """Why the prediction is outside its domain; empty inside.

    Args:
        logit_variance, qk_kept: as `growth.ForwardPass` has them.
        attention_squared: sum over the layers of the squared share of attention in the stream's mean square at its end.
        scattered: sum of `scatter` over the updates, as the gradient has it.
        stream: largest of `stream_scatter`. norms: sum of `output_norm_error`; all three are of `theory.scatter`.
        head_variance: of the output logits. along_own: as the function of this name has it.
    """
    a, found = architecture, list(lasting(architecture, n_tokens, tokens=tokens))
    if raw_variance(a) == 0:
        found.append("an embedding of zeros leaves the stream at zero, where an activation may have no slope")
    if logit_variance > MAX_LOGIT_VARIANCE:
        found.append(f"{SHARP_LOGITS} {logit_variance:.3g}, above {MAX_LOGIT_VARIANCE}")
    elif logit_variance > a.d_head and a.qk_norm != "head":
        # Given its query q a logit has variance a |q|^2 / d_h, of which the softmax's moments take the mean alone:
        # measured 10 to 17 % high at a = 3.9 and heads of 2 and 1, 3 % at 4, nothing at 8.
        found.append(f"heads of {a.d_head} are narrower than the variance {logit_variance:.3g} of their logits")
    if a.block == "pre-ln" and a.final_norm:
        # Attention's mean square at a token is that of its softmax rows, |p_t|^2 averaged over heads, and so is the
        # way back. The final norm divides by it: E[1/s^2] is above 1/E[s^2]. A norm of each branch or sum cancels it.
        spread = square_scatter(n_tokens, min(MAX_LOGIT_VARIANCE, logit_variance)) / a.n_heads
        if (missed := attention_squared * spread) > MAX_MISSED:
            heads = counted(a.n_heads, "head")
            found.append(
                f"outputs of {heads} scatter with the softmax rows: their squares have relative variance {missed:.3g}, "
                f"above {MAX_MISSED}"
            )
    if (missed := eps_in_qk_norm(a, qk_kept) * min(logit_variance, 1.0)) > MAX_MISSED:
        found.append(
            f"eps={a.eps:g} is as large as the mean square that QK-norm divides by: a share {missed:.3g} of the "
            f"gradient through the logits is not there, above {MAX_MISSED}"
        )
    widths = f"d_model={a.d_model}, n_kv_heads*d_head={a.n_kv_heads * a.d_head}, d_ffn={a.d_ffn}"
    if scattered > MAX_SCATTER:
        found.append(
            f"networks of {widths} and branches this strong scatter: the square of the growth has relative variance "
            f"{scattered:.3g}, above {MAX_SCATTER}"
        )
    elif stream > MAX_STREAM_SCATTER:
        gates = " and gates of unequal size" if a.n_experts else ""
        found.append(
            f"tokens of {widths}{gates} scatter: their mean square in the stream has relative variance {stream:.3g}, "
            f"above {MAX_STREAM_SCATTER}"
        )
    elif norms > MAX_STREAM_SCATTER:
        found.append(
            f"output norms over branches of {widths} divide by scales that scatter: the square of the growth is off by "
            f"{norms:.3g}, above {MAX_STREAM_SCATTER}"
        )
    if head_variance > (limit := max_head_variance(a.vocab_size)):
        found.append(f"output logits have variance {head_variance:.3g}, above {limit:.3g}: the softmax is sharp")
    if along_own > MAX_MISSED:
        found.append(
            f"the tied head knows its own token: a share {along_own:.3g} of the gradient's square, above {MAX_MISSED}, "
            "comes of what runs along the branches' own outputs, or is lost along the embedding"
        )
    if aligned > MAX_MISSED:
        found.append(
            "the loss gradient runs along the stream, which no norm takes out of it (there is none, or its eps is as "
            f"large as what it normalises): branches send back {aligned:.3g} more of its square, above {MAX_MISSED}"
        )
    if tokens is not None and uneven > MAX_UNEVEN:
        found.append(
            f"a few tokens fill the rows of attention: their weights shift by {math.sqrt(uneven):.2g} of themselves, "
            f"above {math.sqrt(MAX_UNEVEN):.2g}"
        )
    window = shortest_window(a)
    if 0 < window < WIDE_WINDOW and block > max(window // BLOCK_OF_WINDOW, 1):
        found.append(f"{n_tokens} tokens are too many for a window of {window}, whose neighbours are too alike")
    if a.positions == "alibi" and block > 1 and logit_variance > MAX_COARSE_LOGITS:
        found.append(
            f"ALiBi's neighbours are too alike over {n_tokens} tokens for logits of variance {logit_variance:.3g}, "
            f"above {MAX_COARSE_LOGITS:g}"
        )
    return tuple(found)


def shortest_window(architecture: Architecture) -> int:
    """Of all layers; 0 if none has one."""
    return min(filter(None, map(architecture.window_at, range(architecture.n_layers))), default=0)


def largest_block(architecture: Architecture, n_tokens: int) -> int:
    """Of positions that share a value, 0 for any: a part of the shortest window, as far as they are not too many."""
    window = shortest_window(architecture)
    return max(window // BLOCK_OF_WINDOW, -(-n_tokens // MAX_BLOCKS), 1) if window else 0


def eps_in_qk_norm(architecture: Architecture, kept: float) -> float:
    """What the recursion has too much of the gradient through logits whose QK-norm has an eps; 0 without either.

    It takes the scale of n numbers, of relative variance 2/n, as if eps were 0: a mean 1/s^2 of n/(n - 2), of which a
    share k = s^2/(s^2 + eps) leaves k^2 of the excess. And the normalised query and key have mean squares below k, by
    2/n of k (1 - k) each: x/(x + eps) is concave.
    """
    if architecture.qk_norm == "none":
        return 0.0
    width = max(min(normalised_widths(architecture)), 3)
    return 2 / (width - 2) * (1 - kept**2) + 4 / width * kept * (1 - kept)


def along_own(
    architecture: Architecture,
    n_tokens: int,
    own_square: float,
    share: float,
    written: Mapping[str, float],
    through: Mapping[str, float],
) -> float:
    r"""Share of the squared gradient that a tied head's own rows add to or take from what the recursion has; 0 untied.

    Of the row e of a token x the final norm leaves e - (e.x) x/|x|^2, whose squared cosine with the branches' outputs f
    is the embedding's share s in |x|^2. Along f the recursion, which has f random, misses two things, both at leading
    order. The feed-forward W_2 h sends W_2'W_2 h = (1 + d/m) h back, and a ReLU lets all of it pass where it lets half
    of others. Attention W A u sends A'W'W A u, in all N layers along the same A'A u, of whose square a norm
    before takes the diagonal. Both are upper estimates. An output norm takes f out; the norms of post-ln take
    the embedding out as well.

    Args:
        own_square: of `head.own_word`. share: s.
        written, through: mean squares of the outputs, and shares of the squared gradient, of all "attention" and all
            "feedforward".
    """
    a, outputs = architecture, sum(written.values())
    whole = 1 + own_square * (1 - share)
    embedding = own_square * (1 - share) ** 2 / whole if a.block == "post-ln" else 0.0
    if not outputs or a.block in ("peri-ln", "branch-ln") or (a.block == "pre-ln" and not a.final_norm):
        return embedding
    inverse = 1 / np.arange(1, n_tokens + 1)
    columns = np.cumsum((inverse**2)[::-1])  # the diagonal of A'A
    coherent = n_tokens * max(np.sum(2 * inverse - inverse**2) - np.sum(columns**2), 0.0) / np.sum(inverse) ** 2
    gains = {
        "attention": coherent * (1 + (1 + a.d_model / (a.n_heads * a.d_head)) / a.n_layers),
        "feedforward": 2 * a.d_model / (units(a) * a.n_layers),
    }
    along = own_square * share * (1 - share) / whole
    return max(embedding, along * sum(gain * through[name] * written[name] / outputs for name, gain in gains.items()))


def alignment(architecture: Architecture, name: str) -> float:
    """How much more a branch sends back of the square of a gradient along its own output than of another's, at most."""
    a = architecture
    if name == "attention":
        return (1 + a.n_heads * a.d_head / a.d_model) * (1 + a.d_model / (a.n_kv_heads * a.d_head)) - 1
    return 2 * (1 + a.d_model / units(a)) - 1


def lasting(
    architecture: Architecture,
    n_tokens: int,
    *,
    tokens: NDArray[np.int64] | None = None,
) -> tuple[str, ...]:
    """Those of the reasons that are in the sizes and tokens: no embedding and no initialisation takes them away."""
    a, found = architecture, list[str]()
    if a.qk_norm != "none" and (width := min(normalised_widths(a))) < MIN_QK_HEAD:
        kind = "heads" if a.qk_norm == "head" else "keys"
        found.append(f"{kind} of {width} are too narrow for QK-norm: below {MIN_QK_HEAD} their scale scatters")
    if a.d_model < MIN_WIDTH:
        found.append(f"d_model={a.d_model} is below {MIN_WIDTH}, too narrow for a large-width prediction")
    if a.vocab_size < 2:
        found.append("a vocabulary of 1 leaves the loss nothing to send back")
    if a.n_layers > MAX_LAYERS:
        found.append(
            f"{a.n_layers} layers are more than {MAX_LAYERS}: how the recursion's error adds up over so "
            "many was never measured"
        )
    if tokens is None and n_tokens > a.vocab_size:
        found.append(
            f"{n_tokens} tokens of a vocabulary of {a.vocab_size} repeat more often than was measured: at most once "
            "on average"
        )
    if a.norm_depth_scaling and a.block != "pre-ln":
        found.append(f"LayerNorm scaling is predicted with pre-ln alone, not with {a.block}")
    if tokens is not None and (different := np.unique(tokens).size) < min(MIN_DISTINCT, tokens.size):
        # A row that averages few different values does not lose its fluctuations: measured 27 % off at 4 tokens.
        repeat = counted(different, "distinct token repeats", "distinct tokens repeat")
        found.append(f"{repeat} over the sequence, fewer than {MIN_DISTINCT}")
    return tuple(found)


def max_head_variance(vocabulary: int) -> float:
    """Of output logits: sums of e^logit over the vocabulary are their mean as far as e^variance is below its size."""
    return math.log(vocabulary) - 2
