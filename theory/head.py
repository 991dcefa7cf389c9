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
from theory.softmax_moments import softmax_moments

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


def head_tilt(architecture: Architecture, final: Gram) -> Gram:
    """Gram, in the same units, of the part of the gradient that runs along the token: E[W'p] = m sigma^2 x.

    Logits m W x tilt p towards the rows of W along x. The norm before the head, orthogonal to its token, takes it out.
    """
    return final * (_variance_gain(architecture, final) / architecture.d_model)


def _variance_gain(architecture: Architecture, final: Gram) -> float:
    """Of the output logits over the mean square of the head's input."""
    mean_square = float(np.mean(final.diag))
    return head_variance(architecture, mean_square) / max(mean_square, SMALLEST)


def head_variance(architecture: Architecture, mean_square: float = 1.0) -> float:
    """Variance of an output logit of a token of this mean square, soft-capped where the logits are."""
    a = architecture
    variance, cap = (a.logit_multiplier * a.stds.head) ** 2 * a.d_model * mean_square, a.logit_softcap
    if cap == 0:
        return variance
    nodes, weights = gauss_hermite()
    return float((cap * np.tanh(math.sqrt(variance) * nodes / cap)) ** 2 @ weights)
