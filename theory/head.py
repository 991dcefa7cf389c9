"""What the loss sends back into the residual stream, from the softmax over the vocabulary at initialisation.

The derivation `head-gradient` has every line.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from theory.architecture import Architecture
from theory.embedding_gram import equality
from theory.grams import Gram
from theory.kernels import gauss_hermite
from theory.softmax_moments import normal_grid, soft_cap, softmax_moments

Array = NDArray[np.float64]

SMALLEST = 1e-300  # mean square of the head's input; its inverse fits a double


def head_gradient(
    architecture: Architecture, final: Gram, targets: NDArray[np.int64] | None, *, distinct: bool = False
) -> Gram:
    """Gram of the loss gradient at the head's input, up to a factor: (y - p_t).(y' - p_t') over the vocabulary.

    y is a target, p_t the predicted distribution: a softmax of independent logits, whose covariance between tokens is
    `final`, the Gram matrix of the head's input. Its rows are isotropic here: see `head_tilt`.
    """
    a, n = architecture, final.diag.size
    vocabulary, size = np.array(float(a.vocab_size)), _variance_gain(a, final)
    itself = softmax_moments(vocabulary, size * final.diag).gain
    covariance = size * final.off  # negative ones by exp(-c) - 1 = -exp(-c) (exp(c) - 1)
    together = softmax_moments(vocabulary, np.abs(covariance)).gain
    together = np.where(covariance < 0, -np.exp(np.minimum(covariance, 0.0)) * together, together)
    rest = 1 - 1 / a.vocab_size
    same = equality(targets, n, 0.0 if distinct else 1 / a.vocab_size)
    return Gram(1 + (rest * itself - 1) / a.vocab_size, same + (rest * together - 1) / a.vocab_size)


def head_tilt(architecture: Architecture, final: Gram) -> float:
    """Over the token, the part of the gradient that runs along it, in the same units: E[W'p] = m sigma^2 x.

    Logits m W x tilt p towards the rows of W along x. The norm before the head takes it out, but for its eps.
    """
    a, mean_square = architecture, float(np.mean(final.diag))
    variance, cap = _uncapped(a, mean_square), a.logit_softcap
    if cap and variance:
        z, weights = normal_grid(variance, cap)
        logits, slopes = soft_cap(math.sqrt(variance) * z, cap)
        p = np.exp(logits) * weights
        # Stein: E_p[l'^2 + l''] over the standard deviation is E_p[z l']; over the square of the target's slope.
        variance = float(z * slopes @ p / p.sum()) ** 2 / max(float(slopes**2 @ weights), SMALLEST)
    return math.sqrt(variance / max(mean_square, SMALLEST) / a.d_model)


def own_word(architecture: Architecture, final: Gram, share: Array) -> Array:
    """(B,) weight, in the same units, of a token's own row in its gradient at a tied head: its probability p.

    The row has the logit m sigma d sqrt(share <x, x>/d), others a mean e^l of e^(variance/2); a soft-cap's slopes are
    taken in.

    Args:
        share: (B,) of the token's embedding in the mean square of the head's input.
    """
    a, mean_square = architecture, float(np.mean(final.diag))
    z, weights, cap = *normal_grid(_uncapped(a, mean_square), a.logit_softcap), a.logit_softcap
    deviation = math.sqrt(_uncapped(a, mean_square))
    logits, slopes = soft_cap(deviation * z, cap)
    own, slope = soft_cap(a.logit_multiplier * a.stds.head * a.d_model * np.sqrt(share * final.diag), cap)
    others = math.log(a.vocab_size) + math.log(float(np.exp(logits - np.max(logits)) @ weights)) + np.max(logits)
    return slope / math.sqrt(max(float(slopes**2 @ weights), SMALLEST)) / (1 + np.exp(np.minimum(others - own, 700.0)))


def behind_norm(along: Array, mean_square: Array, weight: Array, share: Array) -> Array:
    """(B,) what a norm of tokens x of this mean square leaves of a part `along` of the gradient, over x.

    Of x it leaves what lacks of mean square 1, by its eps. Of the own row e it takes (e.x) x.

    Args:
        weight, share: (B,) of the own row in the gradient, and of the token's embedding in the mean square.
    """
    return along * np.maximum(1 - mean_square, 0.0) - weight * np.sqrt(share * mean_square)


def own_gradient(tokens: Gram, along: Array, weight: Array, share: Array) -> Gram:
    """Gram of the part of the gradient along the tokens x and their own rows e: along x + weight e."""
    crossed = 2 * weight * along * np.sqrt(share * tokens.diag)
    return tokens.outer(along) + Gram(weight**2 + crossed, np.zeros_like(tokens.off))


def _variance_gain(architecture: Architecture, final: Gram) -> float:
    """Of the output logits over the mean square of the head's input."""
    mean_square = float(np.mean(final.diag))
    return head_variance(architecture, mean_square) / max(mean_square, SMALLEST)


def head_variance(architecture: Architecture, mean_square: float = 1.0) -> float:
    """Variance of an output logit of a token of this mean square, soft-capped where the logits are."""
    variance, cap = _uncapped(architecture, mean_square), architecture.logit_softcap
    if cap == 0:
        return variance
    nodes, weights = gauss_hermite()
    return float((cap * np.tanh(math.sqrt(variance) * nodes / cap)) ** 2 @ weights)


def _uncapped(architecture: Architecture, mean_square: float) -> float:
    a = architecture
    return (a.logit_multiplier * a.stds.head) ** 2 * a.d_model * mean_square
